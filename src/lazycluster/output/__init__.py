"""Output for people: tables, progress, and lines of output, on terminals, in files and in notebooks."""
