"""A nanny that tells the manager what becomes of its worker, and a scheduler that is waited for."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed import Nanny
from distributed.comm import connect

from ....agent import oom
from ....cluster.sent import messages

_PATIENCE = 90.0  # seconds for a scheduler to come back
_TRY_EVERY = 0.2
# Why a nanny closes that could not start its worker again. It would end as if it had been asked to.
_FAILURES = ("nanny-instantiate-failed", "nanny-instantiate-timeout", "nanny-unregister-failed")

logger = logging.getLogger("distributed.nanny")


class WatchedNanny(Nanny):  # type: ignore[misc]
    """A nanny that says when its worker process has ended by itself, and why it has closed.

    Attributes:
        lost_scheduler: Whether it was the scheduler that has gone.
        failed: Whether its worker could not be started again.
    """

    lost_scheduler = False
    failed = False
    _kills = False

    def __init__(self, *args: Any, nanny_address: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if nanny_address is not None:
            self._address = nanny_address  # else it is known by the one that it listens on
        self._killed_before = oom.killed()
        logger.addFilter(self._is_news)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Tell whether something is to be logged: not, as a warning, a restart that was asked for."""
        return not (self._kills and str(record.msg).startswith("Restarting worker"))

    async def _on_worker_exit(self, exitcode: int) -> None:
        before, self._killed_before = self._killed_before, oom.killed()
        if self.status.name == "running" and not self._kills:  # else somebody has asked for a restart
            manager = getattr(self, "memory_manager", None)
            at_limit = getattr(manager, "_last_terminated_pid", -1) not in (-1, None)
            if manager is not None and at_limit:
                manager._last_terminated_pid = -1
            verdict = oom.verdict(before, self._killed_before)
            messages.emit("respawned", status=exitcode, out_of_memory="worker" if at_limit else verdict)
        await super()._on_worker_exit(exitcode)

    async def kill(self, *args: Any, **kwargs: Any) -> None:
        """End the worker process, as it was asked to."""
        self._kills = True
        await super().kill(*args, **kwargs)

    async def instantiate(self) -> Any:
        """Start a worker process."""
        try:
            return await super().instantiate()
        finally:
            self._kills = False

    def close_gracefully(self, *args: Any, **kwargs: Any) -> None:
        """Take note of why, and do what nannies do."""
        self._take_note(str(kwargs.get("reason")))
        super().close_gracefully(*args, **kwargs)

    async def close(self, *args: Any, **kwargs: Any) -> Any:
        """Take note of why, and do what nannies do."""
        self._take_note(str(kwargs.get("reason")))
        return await super().close(*args, **kwargs)

    def _take_note(self, reason: str) -> None:
        self.lost_scheduler = self.lost_scheduler or "connection-broken" in reason
        self.failed = self.failed or reason in _FAILURES


async def answers(address: str, security: Any) -> None:
    """Wait until a scheduler answers; one that is started again is not there at once.

    Raises:
        OSError: It does not, for too long.
    """
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        try:
            comm = await connect(address, timeout=10, **security.get_connection_args("worker"))
        # distributed's own errors are OSErrors; tornado tells by a ValueError of a tunnel that ends before TLS begins.
        except (OSError, ValueError, asyncio.TimeoutError):
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(_TRY_EVERY)  # whoever listens in its place is the tunnel, which says nothing
        else:
            await comm.close()
            return
