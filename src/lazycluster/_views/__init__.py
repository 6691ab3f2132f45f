"""What people see of things: tables on a terminal, in a file and in a notebook."""
