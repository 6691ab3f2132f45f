"""What runs on the manager and concerns the connection to one host."""
