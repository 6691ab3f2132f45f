"""The clean-up at the end of the interpreter, and when SIGTERM is to end it.

By default SIGTERM ends a process without a word, and the keeper cleans up. In a container the manager may be process 1:
the kernel does not let SIGTERM end that one, and what comes next, SIGKILL, ends the keeper and every ssh along with it,
which to the hosts looks like a link that has dropped.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import itertools
import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, runtime_checkable

from . import event_loop, ipython

__all__ = ["register", "when_forgotten"]

_logger = logging.getLogger("lazycluster")

_LIMIT = 60.0  # seconds for all that is ended at once
_UNWIND_LIMIT = 5.0  # seconds that the user's own `finally` blocks get after SIGTERM, once the hosts are clean


class Cleanable(Protocol):
    """Something that is to be cleaned up at the end of the interpreter."""

    def cleanup(self) -> None:
        """End it; does nothing the second time."""


@runtime_checkable
class CleanableTogether(Protocol):
    """Something that can be cleaned up at the same time as others of its kind."""

    def _cleanup_async(self) -> Coroutine[Any, Any, None]:
        """Return what ends it, to be run on the loop."""


_lock = threading.Lock()
_numbers = itertools.count()
_things: dict[int, tuple[int, weakref.ref[Any]]] = {}


def register(thing: Cleanable) -> None:
    """Have something cleaned up at the end of the interpreter, if it still exists then.

    What was registered last is cleaned up first. Neighbours that have a method ``_cleanup_async()`` are cleaned up at
    once.

    Args:
        thing: What to clean up.
    """
    ipython.register(thing)
    _clean_up_on_sigterm()
    number = next(_numbers)
    with _lock:
        if not _things:
            # The first in each process, so after the event loop: what is registered last runs first.
            event_loop.get_loop()
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
    _termination.at_exit = os.getpid()
    _clean_all()
    if _termination.under_way == os.getpid():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        _termination.unwound.set()
        threading.Event().wait()  # for the thread that ends the process, with SIGTERM as its status


def _clean_all() -> None:
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
    event_loop.run(_all(things), _LIMIT)


async def _all(things: list[CleanableTogether]) -> None:
    for result in await asyncio.gather(*(thing._cleanup_async() for thing in things), return_exceptions=True):
        if isinstance(result, Exception):
            _logger.error("at the end of the interpreter: %s", result)


def _quietly(cleanup: Any) -> None:
    try:
        cleanup()
    except Exception as error:  # noqa: BLE001 - the others are to be cleaned up, too
        _logger.error("cleaning up: %s", error)


# --- SIGTERM --------------------------------------------------------------------------------------
class _Termination:
    """The state of this process's end by SIGTERM.

    A forked child inherits all of it, and is told from its parent by its pid.

    Attributes:
        owner: The process that has the handler.
        at_exit: The process whose interpreter cleans up at its end already.
        under_way: The process that a thread of its own cleans up, and then ends.
        unwound: Set when the main thread has nothing left to do.
    """

    def __init__(self) -> None:
        self.owner = 0
        self.at_exit = 0
        self.under_way = 0
        self.unwound = threading.Event()


_termination = _Termination()


def _clean_up_on_sigterm() -> None:
    """Have SIGTERM clean up first, where nobody else handles it. Only the main thread may say so."""
    if _termination.owner == os.getpid() or threading.current_thread() is not threading.main_thread():
        return
    # ValueError: a subinterpreter.
    with contextlib.suppress(ValueError):
        # A forked child has its parent's.
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _terminate):
            signal.signal(signal.SIGTERM, _terminate)
            _termination.owner = os.getpid()


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    if _termination.owner != os.getpid():
        _die()
    if _termination.at_exit == os.getpid():
        return  # it is about to end anyway
    _termination.under_way = os.getpid()
    # A thread: the main one may hold a lock that the clean-up wants, and gives it back as it unwinds.
    threading.Thread(target=_clean_and_die, name="lazycluster SIGTERM", daemon=True).start()
    raise SystemExit(128 + number)


def _clean_and_die() -> None:
    _clean_all()
    _termination.unwound.wait(_UNWIND_LIMIT)
    _die()


def _die() -> None:
    """End this process as SIGTERM would have."""
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(128 + signal.SIGTERM)  # process 1 of a container
