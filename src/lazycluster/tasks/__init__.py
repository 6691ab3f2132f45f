"""Tasks: their steps, how those are carried out, and what comes out."""
