"""What runs on a host: Python 3.8 or newer, standard library only, imports nothing else of lazycluster."""
