"""The server for tests of other programs: ``python -m lazycluster.mongo --dbpath DIRECTORY --port PORT``.

Nobody has to log in, so it is not for anything that matters; clusters start the server with a password.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from .program import serve


def main() -> None:
    """Serve until asked to end."""
    parser = argparse.ArgumentParser(prog="python -m lazycluster.mongo", description=__doc__.splitlines()[0])
    parser.add_argument("--dbpath", required=True)
    parser.add_argument("--port", type=int, default=27017)
    options, _ = parser.parse_known_args()

    def told(event: str, **fields: Any) -> None:
        print(f"waiting for connections on port {fields['port']}", file=sys.stderr)  # noqa: T201

    asyncio.run(serve(options.dbpath, options.port, None, None, told=told))


if __name__ == "__main__":
    main()
