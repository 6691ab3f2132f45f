"""The command line, ``lazycluster``: what it shows and asks; the work is done by the rest of the library."""
