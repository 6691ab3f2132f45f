"""The watch over a master that a launcher of the user's own has started, as a process on the manager."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from typing import Any

from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError
from lazycluster.ssh import workspace

from .health import ProcessStatus, Watch, how_it_ended
from .worker_hosts import MANAGER

__all__ = ["OwnMasterWatch"]

logger = logging.getLogger("lazycluster")

_LOOK_EVERY = 0.25  # seconds


class OwnMasterWatch:
    """Looks at a process with the interface of `subprocess.Popen`, until it ends or is to be ended.

    One that is a `Popen` ends with the manager, in whatever way that ends.

    Args:
        events: Is told what happens to it.
    """

    def __init__(self, events: Watch) -> None:
        self._events = events
        self._process: Any = None
        self._state, self._problem = "new", ""
        self._space: workspace.Workspace | None = None
        self._looking: asyncio.Task[None] | None = None

    def begin(self, process: Any) -> None:
        """Watch a process; one that tells nothing of itself is left alone."""
        if callable(getattr(process, "poll", None)):
            event_loop.run(self._begin(process))

    async def _begin(self, process: Any) -> None:
        self._process, self._state, self._problem = process, "ready", ""
        if isinstance(process, subprocess.Popen):
            with contextlib.suppress(LazyclusterError, OSError):  # it is no worse off than without us
                self._space = await workspace.acquire()
                self._space.end_with_manager(process.pid)
        self._events.note_of("master", MANAGER, "ready")
        self._looking = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        while (status := self._process.poll()) is None:
            await asyncio.sleep(_LOOK_EVERY)
        self._state, self._problem = "failed", how_it_ended(status)
        logger.error("%s: the master: %s", MANAGER, self._problem)
        self._events.note_of("master", MANAGER, "failed", self._problem)

    @property
    def problem(self) -> str:
        """Reason why the master is no longer there, "" if it is."""
        return f"the master: {self._problem}" if self._state == "failed" else ""

    @property
    def status(self) -> ProcessStatus | None:
        """The present state; None if there is nothing to be watched."""
        if self._process is None:
            return None
        pid, status = getattr(self._process, "pid", None), self._process.poll()
        return ProcessStatus("master", MANAGER, self._state, pid, 0, status, self._problem, "", "")

    def cleanup(self) -> None:
        """Look at it no more, before it is ended. Doing it again does nothing."""
        if self._process is not None:
            event_loop.run(self._stop())

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
            self._looking = None
        if self._state == "ready":
            self._state = "ended"
            self._events.note_of("master", MANAGER, "ended")
        if self._space is not None:
            space, self._space = self._space, None
            space.unwatch(process.pid)
            await space.release()
