"""Memory that runs out in this process: what holds most of it is given up, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from typing import Any, Protocol

__all__ = ["Holder", "guard", "hold", "no_room", "relieve"]

_RESERVE = 4 * 1024 * 1024  # bytes that are free for what has to be done when there are no others
_WORTH_IT = 64 * 1024  # bytes; who holds less is not to blame
_MEBIBYTE = 1024 * 1024
_PAUSE = 0.05  # seconds, while nothing can be given up
_SAY_AGAIN = 60.0  # seconds

logger = logging.getLogger("lazycluster")


class Holder(Protocol):
    """Holder of bytes that come from a host, until they are complete.

    Attributes:
        held: How many bytes.
    """

    held: int

    def give_up(self, error: MemoryError) -> None:
        """Let go of them; whoever waits for them gets the error."""


_holders: weakref.WeakSet[Any] = weakref.WeakSet()
_reserve: bytearray | None = None
_said = -_SAY_AGAIN


def hold(holder: Holder) -> None:
    """Have something given up when memory runs out and nothing else holds more."""
    global _reserve
    if _reserve is None:
        with contextlib.suppress(MemoryError):
            _reserve = bytearray(_RESERVE)
    _holders.add(holder)


def relieve() -> bool:
    """Make room after a `MemoryError`, on the event loop's thread.

    Returns:
        Whether there is some now; else nothing was held that is worth it.
    """
    global _reserve
    _reserve = None
    with contextlib.suppress(MemoryError):
        largest = max(_holders, key=lambda holder: holder.held, default=None)
        size = largest.held if largest is not None else 0
        if largest is not None and size >= _WORTH_IT:
            largest.give_up(no_room(size))
            return True
        _say()
    return False


def no_room(size: int) -> MemoryError:
    """Log that a result is given up, and return the error for whoever waits for it.

    Args:
        size: How many bytes of it had come.
    """
    with contextlib.suppress(MemoryError):
        logger.error("this process has no memory left: a result is given up, of which %d bytes had come", size)
    return MemoryError(
        f"this process had no memory left when {size / _MEBIBYTE:.1f} MiB of the result had come.\n"
        "  Next step: return less, or have it written to a file and get that"
    )


def _say() -> None:
    global _said
    if time.monotonic() - _said >= _SAY_AGAIN:
        _said = time.monotonic()
        logger.error("this process is out of memory: it reads nothing from hosts until some is free")


def guard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle what a callback of the event loop raises; for a lack of memory some is made, and little is said."""
    if isinstance(context.get("exception"), MemoryError):
        if not relieve():
            time.sleep(_PAUSE)  # what waits to be read is tried again at once
        return
    loop.default_exception_handler(context)
