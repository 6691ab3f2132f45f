"""Groups of runtimes."""
