"""Tasks: their steps, their execution, and their results."""
