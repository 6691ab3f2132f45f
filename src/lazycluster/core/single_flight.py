"""Work that concurrent callers share: it runs once, and is cancelled with the last of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["SingleFlight"]

K = TypeVar("K")
T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    task: asyncio.Task[T]
    waiting: int = 0


class SingleFlight(Generic[K, T]):
    """Runs a coroutine once for all concurrent callers with the same key. For the event loop's thread."""

    def __init__(self) -> None:
        self._running: dict[K, _Entry[T]] = {}

    async def do(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the work, which is started unless it is running.

        A caller that is cancelled stops waiting; the last one cancels the work, and waits for its end.

        Args:
            key: The identity of the work.
            work: Makes the coroutine.
        """
        entry = self._running.get(key)
        if entry is None:
            entry = self._running[key] = _Entry(asyncio.ensure_future(work()))
            entry.task.add_done_callback(lambda _: self._forget(key, entry))
        entry.waiting += 1
        try:
            return await asyncio.shield(entry.task)
        finally:
            entry.waiting -= 1
            if not entry.waiting and not entry.task.done():
                self._forget(key, entry)  # a new caller starts it again
                entry.task.cancel()
                await asyncio.gather(entry.task, return_exceptions=True)

    def _forget(self, key: K, entry: _Entry[T]) -> None:
        if self._running.get(key) is entry:
            del self._running[key]
