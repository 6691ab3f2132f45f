"""The output of a host's login shell up to the marker that Python prints there when it has started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from dataclasses import dataclass

__all__ = ["StartError", "StartMarker", "read_marker", "read_some", "shown", "skip_to_marker", "write_all"]

_OUTPUT_LIMIT = 1024 * 1024  # bytes that a login shell may print
_CHUNK = 64 * 1024
_SHOWN = 4096  # bytes
_LINE = re.compile(rb"([0-9]{1,5})\.([0-9]{1,5})\.([0-9]{1,5}) ([A-Za-z0-9_.+-]{1,100})(?: (kept|new))?")


class StartError(Exception):
    """The agent did not start.

    Attributes:
        output: What came instead of the marker.
        status: The exit status of the process, None if it still ran.
        is_too_much: True if it printed more than is read.
    """

    def __init__(self, output: str, status: int | None, is_too_much: bool = False) -> None:
        self.output = output
        self.status = status
        self.is_too_much = is_too_much
        super().__init__(output)


@dataclass(frozen=True)
class StartMarker:
    """The line that Python prints when it has started on a host, or a shell if it finds no Python.

    Attributes:
        version: Its version; empty for a shell, which reads a program of its own then.
        tag: Its `sys.implementation.cache_tag`.
        rejoined: Whether the streams lead to an agent that was there before.
        on_terminal: Whether a terminal is between, which changes what goes through it.
        rest: What came after.
    """

    version: tuple[int, ...]
    tag: str
    rejoined: bool
    rest: bytes
    on_terminal: bool = False


def shown(seen: bytes | bytearray) -> str:
    """Return the end of what a login shell printed."""
    return bytes(seen[-_SHOWN:]).decode("utf-8", "replace")


async def read_marker(fd: int, marker: bytes, exited: asyncio.Future[int], seen: bytearray) -> StartMarker:
    """Read up to the marker's line.

    Args:
        fd: The output of the login shell, non-blocking.
        marker: The beginning of the line.
        exited: Done with the status of what is to print it when that has ended.
        seen: Takes all that came, for the error message if this is cancelled.

    Raises:
        StartError: If it does not come.
    """
    while True:
        data = await read_some(fd)
        seen.extend(data)
        start = seen.find(marker)
        end = seen.find(b"\n", start + len(marker)) if start >= 0 else -1
        if end >= 0:
            parsed = _parsed(bytes(seen[start + len(marker) : end]), bytes(seen[end + 1 :]))
            if parsed is not None:
                return parsed
        if end >= 0 or not data or len(seen) > _OUTPUT_LIMIT:
            break
    if len(seen) > _OUTPUT_LIMIT:
        raise StartError(shown(seen), None, True)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(exited), 1.0)
    raise StartError(shown(seen), exited.result() if exited.done() else None)


async def read_some(fd: int) -> bytes:
    """Return what comes next through a non-blocking descriptor, nothing at its end."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        while True:
            await ready.wait()
            try:
                return os.read(fd, _CHUNK)
            except BlockingIOError:
                ready.clear()
            except OSError:
                return b""
    finally:
        loop.remove_reader(fd)


async def write_all(fd: int, data: bytes) -> None:
    """Write to a non-blocking descriptor, as it takes it; nothing more once nobody reads it."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        while data:
            await ready.wait()
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                ready.clear()
            except OSError:
                return  # what it printed tells why
    finally:
        loop.remove_writer(fd)


async def skip_to_marker(stream: socket.socket, marker: bytes) -> None:
    """Read a stream up to the end of the marker's line, and no further; a blocking one is so again in the end.

    Args:
        stream: The streams of a session, of which the login shell may say something first.
        marker: The beginning of the line; nothing follows in it.

    Raises:
        StartError: If it does not come.
    """
    loop, seen, wanted = asyncio.get_running_loop(), bytearray(), marker + b"\n"
    stream.setblocking(False)
    while not seen.endswith(wanted):
        begun = next(length for length in range(len(wanted) - 1, -1, -1) if seen.endswith(wanted[:length]))
        data = await loop.sock_recv(stream, len(wanted) - begun)
        seen += data
        if not data or len(seen) > _OUTPUT_LIMIT:
            raise StartError(shown(seen), None)
    stream.setblocking(True)


def _parsed(line: bytes, rest: bytes) -> StartMarker | None:
    """Return what the line says; None if it is not the line of our program."""
    if line.strip() == b"sh":
        return StartMarker((), "", False, rest)
    words = _LINE.fullmatch(line.strip())
    if words is None:
        return None
    version = tuple(int(words[number]) for number in (1, 2, 3))
    return StartMarker(version, words[4].decode("ascii"), words[5] == b"kept", rest, line.endswith(b"\r"))
