"""Hosts that write to the same file system, found by trying: its number differs from host to host."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import secrets
from collections.abc import Sequence
from typing import Any

from lazycluster.exceptions import AgentError, LazyclusterError
from lazycluster.runtimes import Runtime
from lazycluster.tasks.steps import SendFile, Step

__all__ = ["send_locks"]

_PROBE = ".lazycluster-probe-{}"
_LONGEST_PATH = 4096


async def send_locks(runtimes: Sequence[Runtime], steps: Sequence[Step]) -> list[asyncio.Lock | None]:
    """Return for each runtime a lock that it shares with those that write the same files, None if there are none.

    The first that has the lock sends; the next ones find what it has sent, unchanged, and send nothing.

    Args:
        runtimes: The runtimes that are about to carry out the same steps.
        steps: The steps.
    """
    paths = {step.remote_path or "." for step in steps if isinstance(step, SendFile)}
    found: list[asyncio.Lock | None] = [None] * len(runtimes)
    if len(runtimes) < 2 or not paths:
        return found
    # Temporary directories have names of their own.
    exposed = [path for path in paths if path.startswith(("/", "~", "$")) or ".." in path]
    if len(exposed) < len(paths):
        exposed.append(".")
    for path in set(exposed):
        for shared in await _hosts_sharing(runtimes, path):
            lock = next((lock for index in shared if (lock := found[index]) is not None), None) or asyncio.Lock()
            for index in shared:
                found[index] = lock
    return found


async def _hosts_sharing(runtimes: Sequence[Runtime], path: str) -> list[list[int]]:
    """Return the sets of runtimes for which the path is in the same directory of one file system."""
    directories = await asyncio.gather(*(_directory(runtime, path) for runtime in runtimes))
    candidates: dict[Any, list[int]] = {}
    for index, directory in enumerate(directories):
        if directory is not None:
            # Hosts that share a directory see the same number for it, whatever they call its file system.
            candidates.setdefault(directory[1], []).append(index)
    sets: list[list[int]] = []
    for indexes in candidates.values():
        while len(indexes) > 1:
            shared = await _probe(runtimes, directories, indexes)
            indexes = [index for index in indexes if index not in shared]
            if len(shared) > 1:
                sets.append(shared)
    return sets


async def _directory(runtime: Runtime, path: str) -> tuple[str, int] | None:
    """Return the nearest directory that exists at or above a path, and its inode number."""
    context = runtime._context()
    if path == "." and runtime.has_temporary_working_dir:
        return None
    try:
        found = await runtime._session.ask("expand", path=path, cwd=context.cwd, env=dict(context.env))
        above = str(found["path"])[:_LONGEST_PATH]
        # What a host says must not make this endless: the names that are asked for become shorter.
        while not found["directory"] and above.strip("/"):
            above = posixpath.dirname(above)
            found = await runtime._session.ask("expand", path=above)
    except AgentError:
        return None
    if not found["directory"] or len(found["identity"] or ()) != 2:
        return None
    return str(found["path"]), int(found["identity"][1])


async def _probe(
    runtimes: Sequence[Runtime], directories: Sequence[tuple[str, int] | None], indexes: Sequence[int]
) -> list[int]:
    """Return those of the runtimes that see a directory which the first of them makes."""
    name = _PROBE.format(secrets.token_hex(16))

    async def sees(index: int) -> bool:
        directory = directories[index]
        assert directory is not None
        return bool(
            (await runtimes[index]._session.ask("expand", path=posixpath.join(directory[0], name)))["directory"]
        )

    first = indexes[0]
    directory = directories[first]
    assert directory is not None
    path = posixpath.join(directory[0], name)
    try:
        await runtimes[first]._session.ask("mkdir", path=path)
    except AgentError:
        return [first]  # it cannot write there anyway
    try:
        seen = await asyncio.gather(*(sees(index) for index in indexes[1:]))
    finally:
        with contextlib.suppress(LazyclusterError):
            await runtimes[first]._session.ask("remove", path=path)
    return [first, *(index for index, shares in zip(indexes[1:], seen, strict=True) if shares)]
