"""How the programs talk to the manager."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MARKER = "\x1elazycluster "
LOOPBACK = "127.0.0.1"
READY, CUT_OFF = b"r", b"c"  # what the process that evaluates trials says to the one that watches it
PACKAGES = ("hyperopt", "pymongo", "cloudpickle", "numpy")


def emit(event: str, **fields: Any) -> None:
    """Tell the manager something."""
    data = (MARKER + json.dumps({"event": event, **fields}) + "\n").encode()
    os.write(1, data)  # at once and in one piece: other processes print to the same pipe


def read_settings() -> dict[str, Any]:
    """Return the settings, once the manager sends them."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit("the manager ended before it sent the settings")
    settings: dict[str, Any] = json.loads(line)
    return settings


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter, without importing them."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
