"""Many hosts connected at once."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

from lazycluster._runtime.session import HostSpec, Session
from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError

__all__ = ["Connected", "close_all", "connect_all"]

Connected: TypeAlias = Session | InvalidRuntimeError

_SILENCE = 2.0  # seconds until something is said about those that are waited for
_REFRESH = 0.5
_NAMED = 3


async def connect_all(specs: Sequence[HostSpec]) -> list[Connected]:
    """Connect hosts, all at once.

    If it takes more than two seconds and standard error is a terminal, a line there tells how far it is. If it is
    cancelled, all connections are closed.

    Args:
        specs: The hosts.

    Returns:
        For each host the session, or why there is none.
    """
    tasks = [asyncio.ensure_future(Session.open(spec)) for spec in specs]
    waiting = {task: spec.host for task, spec in zip(tasks, specs, strict=True)}
    try:
        async with _progress(waiting):
            await asyncio.wait(tasks) if tasks else None
    except BaseException:
        for task in tasks:
            task.cancel()
        settled = await asyncio.gather(*tasks, return_exceptions=True)
        await close_all([item for item in settled if isinstance(item, Session)])
        raise
    return [_outcome(task, spec.host) for task, spec in zip(tasks, specs, strict=True)]


def _outcome(task: asyncio.Task[Session], host: str) -> Connected:
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


async def close_all(sessions: Sequence[Session]) -> None:
    """Close sessions, all at once."""
    await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)


@contextlib.asynccontextmanager
async def _progress(waiting: dict[asyncio.Task[Session], str]) -> AsyncIterator[None]:
    if not _is_terminal():
        yield
        return
    ticker = asyncio.ensure_future(_tell(waiting))
    try:
        yield
    finally:
        ticker.cancel()
        await asyncio.gather(ticker, return_exceptions=True)


async def _tell(waiting: dict[asyncio.Task[Session], str]) -> None:
    started = time.monotonic()
    await asyncio.sleep(_SILENCE)
    try:
        while True:
            left = [host for task, host in waiting.items() if not task.done()]
            names = ", ".join(left[:_NAMED]) + (", ..." if len(left) > _NAMED else "")
            seconds = time.monotonic() - started
            _write(
                f"\r\033[KConnecting: {len(waiting) - len(left)} of {len(waiting)} hosts after {seconds:.0f} s; "
                f"waiting for {names}"
            )
            await asyncio.sleep(_REFRESH)
    finally:
        _write("\r\033[K")


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
