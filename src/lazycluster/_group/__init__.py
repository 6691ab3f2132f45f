"""What a group of runtimes is made of."""
