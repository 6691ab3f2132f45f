"""What a runtime is made of."""
