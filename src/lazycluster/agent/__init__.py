"""The part that runs on hosts: Python 3.8 or newer, standard library only, imports nothing else of lazycluster."""
