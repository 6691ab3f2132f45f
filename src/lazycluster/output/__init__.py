"""What people see: tables, progress, and lines of output, on terminals, in files and in notebooks."""
