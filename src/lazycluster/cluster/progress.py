"""A line on the terminal while something takes long."""

from __future__ import annotations

import asyncio
import sys
import time
from types import TracebackType

_SILENT = 2.0  # seconds; who waits shorter need not read anything
_EVERY = 0.5


class Progress:
    """Shows on standard error how many of several are done; only on a terminal, and only if it takes long.

    Args:
        what: What is said about those that are done.
        total: How many there are.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._begin = time.monotonic()
        self._shown = 0
        self._task: asyncio.Task[None] | None = None

    def advance(self) -> None:
        """Note that one more is done."""
        self._done += 1

    async def __aenter__(self) -> Progress:
        if sys.stderr is not None and sys.stderr.isatty():
            self._task = asyncio.ensure_future(self._show())
        return self

    async def _show(self) -> None:
        await asyncio.sleep(_SILENT)
        while True:
            seconds = time.monotonic() - self._begin
            self._write(f"lazycluster: {self._done} of {self._total} {self._what} ({seconds:.0f} s)")
            await asyncio.sleep(_EVERY)

    def _write(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._shown))
        sys.stderr.flush()
        self._shown = len(text)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            if self._shown:
                self._write("")
                sys.stderr.write("\r")
