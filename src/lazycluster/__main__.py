"""The command line as ``python -m lazycluster``."""

from .cli import main

if __name__ == "__main__":
    main()
