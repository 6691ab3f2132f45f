"""Engines: each in a package of its own, with its statement, its client API and the programs that it sends to hosts."""
