"""Waiting that Ctrl-C may interrupt at any moment.

`threading.Condition` takes and gives back its lock in Python code. A signal's handler may run, and raise
`KeyboardInterrupt`, between that code's having the lock and the ``with`` block's knowing of it; then nobody ever gives
it back, and the thread that wants to say that something is done (here the loop's, which does everything) stands still
for good. A ``with`` block on a lock that is written in C has no such moment; so what the main thread shares with others
is built on one.

Python's imports have such a moment, too. Whoever begins to wait here imports nothing, so the lock of the import system,
if he has it, was left to him by Ctrl-C; it is given back.
"""

from __future__ import annotations

import _imp
import _thread
import concurrent.futures
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Condition", "Event", "Future"]

T = TypeVar("T")

_logger = logging.getLogger("lazycluster")


class Condition(_thread.RLock):  # type: ignore[misc]
    """A condition that is its own lock; as `threading.Condition`, as far as it goes.

    The stubs of some Pythons call that class final; it is not.
    """

    def __init__(self) -> None:
        self._sleepers: list[_thread.LockType] = []

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until notified; the lock is given back meanwhile.

        Returns:
            False if the seconds have passed.
        """
        lock: Any = super()
        _let_others_import()
        sleeper = _thread.allocate_lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        held = None

        def take_back() -> None:
            if not lock._is_owned():
                lock._acquire_restore(held or (1, threading.get_ident()))

        try:
            try:
                held = lock._release_save()
                return sleeper.acquire(True, -1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
            finally:
                take_back()
        finally:  # once more: Ctrl-C may come while the first does it
            take_back()
            with contextlib.suppress(ValueError):
                self._sleepers.remove(sleeper)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> bool:
        """Wait until something holds.

        Returns:
            Whether it does; False only after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not predicate():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            self.wait(left)
        return True

    def notify_all(self) -> None:
        """Wake all who wait. The lock must be held."""
        while self._sleepers:
            self._sleepers.pop().release()


def _let_others_import() -> None:
    with contextlib.suppress(RuntimeError):  # it is another thread's
        while _imp.lock_held():
            _imp.release_lock()


class Event:
    """As `threading.Event`, as far as it goes."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._flag = False

    def is_set(self) -> bool:
        """Return whether it has happened."""
        return self._flag

    def set(self) -> None:
        """Let it happen."""
        with self._condition:
            self._flag = True
            self._condition.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for it, and return whether it has happened."""
        with self._condition:
            return self._condition.wait_for(self.is_set, timeout)


class Future(concurrent.futures.Future[T]):
    """A future on which the main thread may wait."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()  # type: ignore[assignment]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, and return whether it is."""
        with self._condition:
            return self._condition.wait_for(self.done, timeout)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        """Have a function called when it is done; one that wants to end the process ends no thread of the library."""
        super().add_done_callback(functools.partial(_call, fn))


def _call(function: Callable[[Any], object], future: Any) -> None:
    try:
        function(future)
    except Exception:
        raise  # it is logged by whoever calls this
    except BaseException:
        if threading.current_thread() is threading.main_thread():
            raise
        _logger.exception("a callback of a future raised SystemExit or KeyboardInterrupt")
