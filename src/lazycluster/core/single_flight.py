"""Work that several want at once, done once: it ends when nobody waits for it any more."""

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
    """Does what is asked for under a key, once for all who ask for it meanwhile. For the event loop's thread."""

    def __init__(self) -> None:
        self._running: dict[K, _Entry[T]] = {}

    async def do(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what the work returns, which begins unless it is under way.

        Whoever is cancelled waits no longer; the last one has the work end, and waits for that.

        Args:
            key: What tells it from other work.
            work: What is to be done.
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
                self._forget(key, entry)  # whoever comes now begins anew
                entry.task.cancel()
                await asyncio.gather(entry.task, return_exceptions=True)

    def _forget(self, key: K, entry: _Entry[T]) -> None:
        if self._running.get(key) is entry:
            del self._running[key]
