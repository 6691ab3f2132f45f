"""Which host a file on the manager came from, so that what one host gave is not overwritten unnoticed by another."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from lazycluster.exceptions import TaskExecutionError

__all__ = ["claimed"]

_logger = logging.getLogger("lazycluster")
_lock = threading.Lock()
_being_written: dict[str, str] = {}
_written: OrderedDict[str, tuple[str, tuple[int, int, int]]] = OrderedDict()
_REMEMBERED = 10_000


@contextlib.contextmanager
def claimed(path: str, host: str) -> Iterator[None]:
    """Hold a path on the manager while a file from a host is written there.

    Args:
        path: The path.
        host: The host.

    Raises:
        TaskExecutionError: If a file from another host is just being written there.
    """
    key = os.path.realpath(path)
    with _lock:
        other = _being_written.get(key)
        if other is not None:
            whose = "this host" if other == host else other
            raise TaskExecutionError(
                f"{path} is just being written with what comes from {whose}: give each its own local_path"
            )
        _being_written[key] = host
    try:
        _warn_of_loss(key, host)
        yield
    finally:
        with _lock:
            del _being_written[key]
            _written.pop(key, None)
            stamp = _stamp(key)
            if stamp is not None:
                _written[key] = host, stamp
                while len(_written) > _REMEMBERED:
                    _written.popitem(last=False)


def _warn_of_loss(key: str, host: str) -> None:
    before = _written.get(key)
    # If it is still what the other host gave, nobody has taken notice of it by renaming or changing it.
    if before is not None and before[0] != host and _stamp(key) == before[1]:
        _logger.warning("%s: what came from %s is replaced with what comes from %s", key, before[0], host)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
