"""Running programs on this machine: uv, and git."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lazycluster.output.lines import Tail

__all__ = ["Ended", "run_here"]

_END_LIMIT = 5.0  # seconds
_MOST_OUTPUT = 64 * 1024 * 1024  # bytes; what a lock file of thousands of packages takes is less
_CHUNK = 64 * 1024


class Ended(NamedTuple):
    """What came of a program.

    Attributes:
        status: Its exit status.
        output: What it printed.
        errors: The end of what it printed to its standard error.
    """

    status: int
    output: str
    errors: str


async def run_here(argv: Sequence[str], env: Mapping[str, str], *, stdin: str = "", cwd: Path | None = None) -> Ended:
    """Run a program until it ends; if this is cancelled, it is ended with all that it has started.

    Args:
        argv: The program and its arguments.
        env: All its environment variables.
        stdin: What it reads.
        cwd: Its working directory.

    Raises:
        OSError: If it cannot be run.
    """
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env=env,
            start_new_session=True,  # Ctrl-C reaches the manager, which ends it
        )
    )
    try:
        process = await asyncio.shield(starting)
        output, errors, _ = await asyncio.gather(
            _end_of(process.stdout, Tail(_MOST_OUTPUT)), _end_of(process.stderr, Tail()), _feed(process.stdin, stdin)
        )
        return Ended(await process.wait(), output, errors)
    except asyncio.CancelledError:
        await _end(await starting)
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _END_LIMIT)


async def _end_of(stream: asyncio.StreamReader | None, tail: Tail) -> str:
    assert stream is not None
    while data := await stream.read(_CHUNK):
        tail.put(data)
    return tail.text()


async def _feed(stream: asyncio.StreamWriter | None, text: str) -> None:
    assert stream is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its exit status tells
        stream.write(text.encode())
        await stream.drain()
    stream.close()
