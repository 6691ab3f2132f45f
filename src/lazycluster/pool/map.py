"""`map`: a call for each item of iterables, with as many under way as keep the hosts busy, and no more."""

from __future__ import annotations

import concurrent.futures
import functools
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from lazycluster.core import event_loop, interruptible
from lazycluster.exceptions import LazyclusterError
from lazycluster.tasks.pickling import name_of

from .blob_store import SharedArrays
from .chunks import Chunk, ChunkResult, Failure, call_name, read_results
from .scheduler import ChunkScheduler
from .serialization import Packed, PackedCalls, pack_calls

__all__ = ["MapRun", "check_arguments"]

Arrived = tuple[Chunk, ChunkResult | Failure] | None  # None: nothing more will come

_EAGER = 0.05  # seconds for which items are taken before the first result is asked for
_MAX_OPEN = 2048  # chunks whose results have not been handed on, unless the caller says how many
_MAX_BYTES = 128 * 1024 * 1024  # of arguments and results that are held here


def check_arguments(timeout: float | None, chunksize: int, buffersize: int | None) -> None:
    """Check the arguments of `map`.

    Raises:
        TypeError, ValueError: If one makes no sense.
    """
    if timeout is not None and not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    for name, value in (("chunksize", chunksize), ("buffersize", buffersize)):
        if value is None and name == "buffersize":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


class _Slot:
    """Place of a chunk in the order of results."""

    __slots__ = ("chunk", "left", "results", "size")

    def __init__(self, count: int, chunk: Chunk) -> None:
        self.left = count
        self.results: list[tuple[bool, Any]] = [(False, None)] * count
        self.chunk = chunk
        self.size = chunk.packed.size


class MapRun:
    """One `map`.

    Args:
        scheduler: Runs the calls.
        function: The function.
        packed: The same, packed.
        iterables: Their items are the arguments.
        timeout: Seconds from now until the last result that is waited for.
        chunksize: Calls per chunk.
        buffersize: Calls whose results have not been handed on, at most.
        ordered: Whether results come in the order of the items.
    """

    def __init__(
        self,
        scheduler: ChunkScheduler,
        function: Callable[..., Any],
        packed: Packed,
        iterables: Sequence[Iterable[Any]],
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
    ) -> None:
        self._scheduler = scheduler
        self._function = function
        self._name = name_of(function)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._timeout = timeout
        self._items: Iterator[tuple[Any, ...]] = zip(*iterables)  # noqa: B905  (as `map` does: until the shortest ends)
        self._chunksize = chunksize if buffersize is None else min(chunksize, buffersize)
        self._most = _MAX_OPEN if buffersize is None else max(1, buffersize // self._chunksize)
        self._ordered = ordered
        self._exhausted = False
        self._open: dict[int, _Slot] = {}
        self._next = 0  # the number of the next slot
        self._bytes = 0
        self._arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._changed = interruptible.Condition()
        self._unsettled = 0
        self._sealed = False
        self._sharing = SharedArrays(scheduler.blobs)
        self._blob = scheduler.blobs.take(packed).number
        self._closed = False

    # --- a sink, on the loop's thread ----------------------------------------------------------
    def call_name(self, chunk: Chunk, call: int) -> str:
        """Return the name of a call, for messages."""
        return f"{call_name(self._name, chunk.packed, call)} (item {chunk.key * self._chunksize + call})"

    def is_wanted(self, chunk: Chunk) -> bool:
        """Tell whether results are still wanted."""
        return not self._closed

    def mark_started(self, chunk: Chunk) -> bool:
        """Learn that a chunk is given to a host."""
        return not self._closed

    def settle(self, chunk: Chunk, outcome: ChunkResult | Failure) -> None:
        """Take the result of a chunk."""
        self._arrived.put((chunk, outcome))
        with self._changed:
            self._unsettled -= chunk.count
            if not self._unsettled:
                self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """True if something that was submitted is not settled."""
        return self._unsettled > 0 and not self._closed

    # --- the executor's end --------------------------------------------------------------------
    def wait(self) -> None:
        """Wait until all that was submitted is settled."""
        self._sealed = True
        with self._changed:
            self._changed.wait_for(lambda: not self._unsettled or self._closed)

    def abandon(self) -> None:
        """Wake whoever waits for results: no more will come."""
        self._sealed = True
        self._arrived.put(None)

    # --- in the caller's thread ----------------------------------------------------------------
    def fill(self) -> None:
        """Start with the first calls."""
        end = time.monotonic() + _EAGER
        try:
            while self._has_capacity() and time.monotonic() < end:
                self._submit()
        except BaseException:
            self.close()
            raise

    def _has_capacity(self) -> bool:
        if self._exhausted or len(self._open) >= self._most:
            return False
        return self._bytes < _MAX_BYTES or len(self._open) < 2

    def _submit(self) -> None:
        """Take the items of one chunk and have it run."""
        calls = list(islice(self._items, self._chunksize))
        if not calls:
            self._exhausted = True
            return
        try:
            self._add(len(calls), pack_calls(self._function, calls, None, self._sharing.share))
        except TypeError:
            for arguments in calls:  # those that cannot be sent are to be told apart from those that can
                self._submit_alone(arguments)

    def _submit_alone(self, arguments: tuple[Any, ...]) -> None:
        try:
            self._add(1, pack_calls(self._function, [arguments], None, self._sharing.share))
        except TypeError as error:
            chunk = self._new_chunk(1, PackedCalls(0, (), 0))
            self._arrived.put((chunk, Failure(error)))

    def _new_chunk(self, count: int, packed: PackedCalls) -> Chunk:
        chunk = Chunk(packed, 0, count, self._blob, self._sharing.taken(), self, self._next)
        self._open[self._next] = _Slot(count, chunk)
        self._next += 1
        self._bytes += packed.size
        return chunk

    def _add(self, count: int, packed: PackedCalls) -> None:
        if self._sealed:
            raise RuntimeError("the executor was shut down before all items were taken")
        chunk = self._new_chunk(count, packed)
        with self._changed:
            self._unsettled += count
        self._scheduler.submit(chunk)

    def results(self) -> Iterator[Any]:
        """Yield what the calls return.

        Raises:
            TimeoutError: If a result did not come in time.
            Exception: What a call has raised.
        """
        try:
            ready: deque[int] = deque()
            while True:
                self._receive_arrived(ready)
                head = next(iter(self._open), None) if self._ordered else (ready[0] if ready else None)
                if head is not None and self._open[head].left == 0:
                    if not self._ordered:
                        ready.popleft()
                    yield from self._values(self._open.pop(head))
                elif self._has_capacity():
                    self._submit()
                elif head is None and not self._open:
                    return
                else:
                    self._receive(ready, self._wait_for_arrival())
        finally:
            self.close()

    def _values(self, slot: _Slot) -> Iterator[Any]:
        self._bytes -= slot.size
        if slot.chunk.shared:
            self._scheduler.release(slot.chunk.shared)
        results = slot.results[::-1]
        slot.results.clear()
        while results:  # nothing here holds a result that was handed on: the caller alone decides how long it lives
            good, *box = results.pop()
            if not good:
                raise box.pop()
            yield box.pop()

    def _wait_for_arrival(self) -> Arrived:
        if event_loop.in_loop():
            raise LazyclusterError("results cannot be waited for in a callback of the library: they would never come")
        if self._deadline is None:
            return self._arrived.get()
        try:
            return self._arrived.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"a result of {self._name}() did not come within {self._timeout:g} s") from None

    def _receive_arrived(self, ready: deque[int]) -> None:
        while not self._arrived.empty():
            self._receive(ready, self._arrived.get())

    def _receive(self, ready: deque[int], arrived: Arrived) -> None:
        if arrived is None:
            raise concurrent.futures.CancelledError("the executor was ended")
        chunk, outcome = arrived
        slot = self._open[chunk.key]
        name = functools.partial(self.call_name, chunk)
        slot.results[chunk.first : chunk.first + chunk.count] = read_results(outcome, chunk.first, chunk.count, name)
        slot.left -= chunk.count
        slot.size += outcome.size
        self._bytes += outcome.size
        if slot.left == 0:
            ready.append(chunk.key)

    def close(self) -> None:
        """End what still runs."""
        if self._closed:
            return
        self._closed = True
        left = [slot.chunk for slot in self._open.values() if slot.left]
        shared = [blob for slot in self._open.values() for blob in slot.chunk.shared]
        self._open.clear()
        with self._changed:
            self._changed.notify_all()
        self._scheduler.cancel(left)
        self._scheduler.release([*shared, *self._sharing.taken(), self._blob])
