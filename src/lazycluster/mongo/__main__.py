"""Starts the server for hyperopt: see `lazycluster.engines.hyperopt.mongo.__main__`."""

from __future__ import annotations

from lazycluster.engines.hyperopt.mongo.__main__ import main

if __name__ == "__main__":
    main()
