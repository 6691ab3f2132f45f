"""The one hook that cleans up at the end of the interpreter."""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, runtime_checkable

from . import _ipython, _loop

__all__ = ["register", "when_forgotten"]

_logger = logging.getLogger("lazycluster")

_LIMIT = 60.0  # seconds for all that is ended at once


class Cleanable(Protocol):
    """Something that is to be cleaned up at the end of the interpreter."""

    def cleanup(self) -> None:
        """End it; does nothing the second time."""


@runtime_checkable
class CleanableTogether(Protocol):
    """Something that can be cleaned up at the same time as others of its kind."""

    def cleanup_soon(self) -> Coroutine[Any, Any, None]:
        """Return what ends it, to be run on the loop."""


_lock = threading.Lock()
_numbers = itertools.count()
_things: dict[int, tuple[int, weakref.ref[Any]]] = {}


def register(thing: Cleanable) -> None:
    """Have something cleaned up at the end of the interpreter, if it still exists then.

    What was registered last is cleaned up first. Neighbours that have a method ``cleanup_soon()`` are cleaned up at
    once.

    Args:
        thing: What to clean up.
    """
    _ipython.register(thing)
    number = next(_numbers)
    with _lock:
        if not _things:
            # The first in each process, so after the event loop: what is registered last runs first.
            _loop.get_loop()
            atexit.unregister(_at_exit)
            atexit.register(_at_exit)
        _things[number] = os.getpid(), weakref.ref(thing, lambda _: _things.pop(number, None))


def when_forgotten(thing: object, parts: Sequence[Cleanable]) -> weakref.finalize[Any, Any]:
    """Have parts of something cleaned up when nobody refers to it any more, as when a cell of a notebook is run again.

    Args:
        thing: What is forgotten; its parts must not refer to it.
        parts: What is cleaned up then, in this order.

    Returns:
        What undoes this, with ``detach()``.
    """
    finalizer = weakref.finalize(thing, _clean_in_thread, os.getpid(), list(parts))
    finalizer.atexit = False  # at the end of the interpreter, what is registered is cleaned up
    return finalizer


def _clean_in_thread(owner: int, parts: list[Cleanable]) -> None:
    # Garbage may be collected on any thread, also on the loop's, which must not wait.
    if owner == os.getpid():
        work = functools.partial(_clean_each, parts)
        threading.Thread(target=work, name="lazycluster clean-up", daemon=True).start()


def _clean_each(parts: list[Cleanable]) -> None:
    for part in parts:
        _quietly(part.cleanup)


def _at_exit() -> None:
    with _lock:
        entries = [_things[number] for number in sorted(_things, reverse=True)]
        _things.clear()
    # What a forked child has inherited belongs to its parent.
    things = [thing for owner, ref in entries if owner == os.getpid() and (thing := ref()) is not None]
    for together, neighbours in itertools.groupby(things, lambda thing: isinstance(thing, CleanableTogether)):
        part = list(neighbours)
        if together:
            _quietly(functools.partial(_clean_together, part))
        else:
            for thing in part:
                _quietly(thing.cleanup)


def _clean_together(things: list[CleanableTogether]) -> None:
    _loop.run(_all(things), _LIMIT)


async def _all(things: list[CleanableTogether]) -> None:
    for result in await asyncio.gather(*(thing.cleanup_soon() for thing in things), return_exceptions=True):
        if isinstance(result, Exception):
            _logger.error("at the end of the interpreter: %s", result)


def _quietly(cleanup: Any) -> None:
    try:
        cleanup()
    except Exception as error:  # noqa: BLE001 - the others are to be cleaned up, too
        _logger.error("cleaning up: %s", error)
