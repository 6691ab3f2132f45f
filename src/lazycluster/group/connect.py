"""Many hosts connected at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError
from lazycluster.output.progress import Progress
from lazycluster.runtime.session import HostSession, HostSpec

__all__ = ["Connected", "close_all", "connect_all"]

Connected: TypeAlias = HostSession | InvalidRuntimeError


async def connect_all(specs: Sequence[HostSpec]) -> list[Connected]:
    """Connect hosts, all at once.

    If it is cancelled, all connections are closed.

    Args:
        specs: The hosts.

    Returns:
        For each host the session, or why there is none.
    """
    tasks = [asyncio.ensure_future(HostSession.open(spec)) for spec in specs]
    waiting = {task: spec.host for task, spec in zip(tasks, specs, strict=True)}
    try:
        left = lambda: [host for task, host in waiting.items() if not task.done()]  # noqa: E731
        with Progress("Connecting", len(specs), "hosts", left) as progress:
            for task in tasks:
                task.add_done_callback(lambda _: progress.advance())
            await asyncio.wait(tasks) if tasks else None
    except BaseException:
        for task in tasks:
            task.cancel()
        settled = await asyncio.gather(*tasks, return_exceptions=True)
        await close_all([item for item in settled if isinstance(item, HostSession)])
        raise
    return [_outcome(task, spec.host) for task, spec in zip(tasks, specs, strict=True)]


def _outcome(task: asyncio.Task[HostSession], host: str) -> Connected:
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, InvalidRuntimeError):
        return error
    if isinstance(error, LazyclusterError):
        return InvalidRuntimeError(host, "lost", str(error))
    if isinstance(error, OSError):
        return InvalidRuntimeError(host, "ssh", str(error))
    raise error


async def close_all(sessions: Sequence[HostSession]) -> None:
    """Close sessions, all at once."""
    await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)
