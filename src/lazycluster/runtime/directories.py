"""Directories of a host: made, and removed with all that they hold."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from typing import Any

from lazycluster.exceptions import AgentError, PathCreationError
from lazycluster.tasks.context import Context

from .session import HostSession

__all__ = ["make", "make_temporary", "remove"]

_logger = logging.getLogger("lazycluster")


async def make(session: HostSession, context: Context, path: str) -> None:
    """Make a directory, and those above it; see `Runtime.create_dir`."""
    _check_path(session.host, path)
    try:
        await session.ask("mkdir", path=path, **_place(context))
    except AgentError as error:
        raise PathCreationError(f"{session.host}: {path} cannot be made: {error.message}") from None


async def make_temporary(session: HostSession) -> str:
    """Make a directory that is removed at the end of the session, and return its path."""
    try:
        path = str((await session.ask("mkdtemp"))["path"])
    except AgentError as error:
        raise PathCreationError(f"{session.host}: no temporary directory: {error.message}") from None
    session.temporary.append(path)
    return path


async def remove(session: HostSession, context: Context, path: str) -> bool:
    """Remove a directory; returns whether all of it is removed, see `Runtime.delete_dir`."""
    _check_path(session.host, path)
    try:
        await session.ask("remove", path=path, folder=True, kept=_kept(session), **_place(context))
    except AgentError as error:
        if error.kind == "value":
            raise ValueError(f"{error}\n  Next step: fix the path") from None
        if error.evidence.get("errno") == errno.ENOENT:
            return True
        _logger.warning("%s: not all of %s was removed: %s", session.host, path, error.message)
        return False
    return True


def _place(context: Context) -> dict[str, Any]:
    return {"cwd": context.cwd, "env": dict(context.env)}


def _kept(session: HostSession) -> dict[str, str]:
    """Return directories that are not removed beside those that the host knows of."""
    with contextlib.suppress(OSError):  # this process may be in a directory that was removed
        if session.spec.local:
            return {"the working directory of this process": os.getcwd()}
    return {}


def _check_path(host: str, path: str) -> None:
    if not isinstance(path, str):
        raise TypeError(f"a path must be a string, not {type(path).__name__}")
    if not path or "\0" in path:
        raise ValueError(f"{host}: not usable as a path: {path!r}")
