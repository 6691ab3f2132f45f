"""Futures of an executor, and the thread that settles them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
import threading
import weakref
from typing import Any, TypeVar

from lazycluster.core import event_loop, interruptible
from lazycluster.exceptions import LazyclusterError

from .chunks import Chunk, ChunkResult, Failure, call_name, read_results, unreadable_error
from .scheduler import ChunkScheduler

__all__ = ["CallFuture", "Futures"]

T = TypeVar("T")

_NOTIFIED = "CANCELLED_AND_NOTIFIED"  # the state of a future that was cancelled, and whose waiters know


class CallFuture(interruptible.Future[T]):
    """Future of a call. Where waiting for it would last for ever, asking for its result is an error.

    Args:
        futures: Settles it.
    """

    def __init__(self, futures: Futures) -> None:
        super().__init__()
        self._futures = weakref.ref(futures)
        self._owner = os.getpid()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, see :meth:`concurrent.futures.Future.result`."""
        self._check()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return the error, see :meth:`concurrent.futures.Future.exception`."""
        self._check()
        return super().exception(timeout)

    def set_running_or_notify_cancel(self) -> bool:
        """Do what that of any future does; several may see to the end of one that was cancelled."""
        with self._condition:
            return self._state != _NOTIFIED and super().set_running_or_notify_cancel()

    def _check(self) -> None:
        if self.done():
            return
        if os.getpid() != self._owner:
            raise LazyclusterError(f"this call runs for the process {self._owner}; a forked child cannot wait for it")
        futures = self._futures()
        if event_loop.in_loop() or (futures is not None and futures.in_callback):
            raise LazyclusterError("a call cannot be waited for in a callback of the library: it would never end")


class Futures:
    """The futures of an executor. They are settled in a thread of its own: their callbacks may do anything.

    Args:
        scheduler: Runs the calls.
    """

    def __init__(self, scheduler: ChunkScheduler) -> None:
        self._scheduler = scheduler
        self._lock = interruptible.Condition()
        self._open: dict[Chunk, tuple[concurrent.futures.Future[Any], str]] = {}
        self._arrived: queue.SimpleQueue[tuple[Chunk, ChunkResult | Failure] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, future: concurrent.futures.Future[Any], name: str, chunk: Chunk) -> None:
        """Have a chunk run whose result is a future's."""
        chunk.key = chunk
        try:
            with self._lock:
                self._open[chunk] = future, name
            self._scheduler.submit(chunk)
        except BaseException:  # Ctrl-C: nobody has the future, and nobody is to wait for it
            self._forget(chunk)
            raise

    @property
    def in_callback(self) -> bool:
        """True in the thread in which futures are settled, which must not wait for them."""
        return threading.current_thread() is self._thread

    @property
    def busy(self) -> bool:
        """True if a future is not done."""
        return bool(self._open)

    # --- a sink, on the loop's thread ----------------------------------------------------------
    def call_name(self, chunk: Chunk, call: int) -> str:
        """Return the name of a call, for messages."""
        entry = self._open.get(chunk.key)
        return call_name(entry[1] if entry else "a call", chunk.packed, call)

    def is_wanted(self, chunk: Chunk) -> bool:
        """Tell whether a future that waits was not cancelled."""
        entry = self._open.get(chunk.key)
        if entry is None or not entry[0].cancelled():
            return entry is not None
        entry[0].set_running_or_notify_cancel()
        self._forget(chunk)
        return False

    def mark_started(self, chunk: Chunk) -> bool:
        """Learn that a chunk is given to a host; a future that was cancelled before is over then."""
        entry = self._open.get(chunk.key)
        if entry is None:
            return False
        if entry[0].running():
            return True
        if entry[0].set_running_or_notify_cancel():
            return True
        self._forget(chunk)
        return False

    def settle(self, chunk: Chunk, outcome: ChunkResult | Failure) -> None:
        """Take the result of a chunk."""
        if self._thread is None:  # here, since Ctrl-C does not come to the loop's thread
            self._thread = threading.Thread(target=self._settle_all, name="lazycluster futures", daemon=True)
            self._thread.start()
        self._arrived.put((chunk, outcome))

    # --- in its own thread ---------------------------------------------------------------------
    def _settle_all(self) -> None:
        for chunk, outcome in iter(self._arrived.get, None):
            entry = self._open.get(chunk.key)
            if entry is not None:
                _settle(*entry, outcome)
                del entry
                self._forget(chunk)
            del chunk, outcome

    def _forget(self, chunk: Chunk) -> None:
        with self._lock:
            if self._open.pop(chunk.key, None) is None:
                return
            if not self._open:
                self._lock.notify_all()
        self._scheduler.release([chunk.blob, *chunk.shared])

    # --- the end -------------------------------------------------------------------------------
    def cancel_waiting(self, begun: int) -> None:
        """Cancel the futures whose calls were not given to a host.

        Args:
            begun: How many of the first count as given if none was yet, since no worker is there, or just came.
        """
        with self._lock:
            futures = [future for future, _ in self._open.values()]
        if not any(future.running() or future.done() for future in futures):
            futures = futures[begun:]
        for future in futures:
            future.cancel()
        self._scheduler.drop_unwanted()

    def abort(self, futures: set[concurrent.futures.Future[Any]]) -> None:
        """Cancel some futures, and end those of their calls that run."""
        with self._lock:
            entries = [(chunk, future) for chunk, (future, _) in self._open.items() if future in futures]
        self._scheduler.cancel([chunk for chunk, _ in entries])
        for chunk, future in entries:
            future.cancel()
            self._scheduler.settle(chunk, Failure(concurrent.futures.CancelledError()))

    def wait(self) -> None:
        """Wait until all are done."""
        with self._lock:
            self._lock.wait_for(lambda: not self._open)

    def close(self) -> None:
        """Cancel what is not done, and end the thread."""
        with self._lock:
            entries, self._open = list(self._open.items()), {}
        for _, (future, _) in entries:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # its result came just now
                if not future.done() and not future.cancel():
                    future.set_exception(concurrent.futures.CancelledError())
                elif future.cancelled():
                    future.set_running_or_notify_cancel()
        self._arrived.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _settle(future: concurrent.futures.Future[Any], name: str, outcome: ChunkResult | Failure) -> None:
    try:
        good, value = read_results(outcome, 0, 1, lambda _: f"{name}()")[0]
    except BaseException as error:  # noqa: BLE001  (a class's own code may even end the thread, and others wait)
        good, value = False, unreadable_error(error, getattr(outcome, "host", ""), f"{name}()")
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # `close` was faster
        if future.cancelled():
            future.set_running_or_notify_cancel()
        elif good:
            future.set_result(value)
        else:
            future.set_exception(value)
