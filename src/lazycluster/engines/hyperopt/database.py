"""The database of a Hyperopt cluster, as the manager uses it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazycluster.agent.ownership import make
from lazycluster.utils import Environment

from .access import DatabaseAccess
from .programs import compat

_ANSWER_LIMIT = 5000  # milliseconds


def make_directory(path: Path) -> None:
    """Make the directory of a database if it is missing; only its owner can read it.

    Raises:
        PermissionError: If that is not allowed.
        OSError: If it cannot be made.
    """
    try:
        make(str(path), 0o700, Environment.trust_group)
    except PermissionError as error:
        why = f"{error.filename}: {error.strerror}" if error.errno == errno.EPERM else str(path)
        raise PermissionError(error.errno, f"the directory of the database cannot be used: {why}") from None


def checked_name(name: str) -> str:
    """Return the name of a database.

    Raises:
        ValueError: If it cannot be one.
    """
    if not isinstance(name, str) or not name or len(name) > 63 or set(name) & set('/\\. "$*<>:|?@#%\0'):
        raise ValueError(f'dbname must be a name of at most 63 characters without /\\. "$*<>:|?@#%, not {name!r}')
    return name


def checked_seconds(interval: float, what: str) -> float:
    """Return a time in seconds.

    Raises:
        ValueError: If it cannot be one.
    """
    if isinstance(interval, bool) or not isinstance(interval, (int, float)) or not 0 < interval < 3600:
        raise ValueError(f"{what} must be greater than 0 seconds, not {interval!r}")
    return float(interval)


def connect(access: DatabaseAccess, port: int) -> Any:
    """Return a client of the database of a cluster, to be closed."""
    from pymongo import MongoClient

    url = access.url(port, "mongodb", options=compat.LOGIN)
    return MongoClient(url, serverSelectionTimeoutMS=_ANSWER_LIMIT, directConnection=True)


@contextlib.contextmanager
def database(access: DatabaseAccess, port: int) -> Iterator[Any]:
    """Connect to the database of a cluster, for a moment."""
    client = connect(access, port)
    try:
        yield client[access.dbname]
    finally:
        client.close()
