"""What comes of a host's login shell, until Python has started there and says so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from dataclasses import dataclass

__all__ = ["StartError", "StartMarker", "past_noise", "read_mark"]

_NOISE_LIMIT = 1024 * 1024
_SHOWN = 4096
_LINE = re.compile(rb"([0-9]{1,5})\.([0-9]{1,5})\.([0-9]{1,5}) ([A-Za-z0-9_.+-]{1,100})(?: (kept|new))?")


class StartError(Exception):
    """The agent did not start.

    Attributes:
        output: What came instead of the agent's mark.
        status: The exit status of the process, None if it still ran.
    """

    def __init__(self, output: str, status: int | None) -> None:
        self.output = output
        self.status = status
        super().__init__(output)


@dataclass(frozen=True)
class StartMarker:
    """What Python says when it has started on a host.

    Attributes:
        version: Its version.
        tag: Its `sys.implementation.cache_tag`.
        kept: Whether the streams lead to an agent that was there before.
        rest: What came after.
    """

    version: tuple[int, ...]
    tag: str
    kept: bool
    rest: bytes


def shown(seen: bytes | bytearray) -> str:
    """Return the end of what a login shell printed."""
    return bytes(seen[-_SHOWN:]).decode("utf-8", "replace")


async def read_mark(fd: int, mark: bytes, exited: asyncio.Future[int], seen: bytearray) -> StartMarker:
    """Read until the mark's line.

    Args:
        fd: Where from, non-blocking.
        mark: How the line begins.
        exited: Is done with the status of what is to print it when that has ended.
        seen: Takes all that came, for the error message if this is cancelled.

    Raises:
        StartError: If it does not come.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[StartMarker] = loop.create_future()

    def readable() -> None:
        if found.done():
            return  # nobody waits any more
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        seen.extend(data)
        start = seen.find(mark)
        end = seen.find(b"\n", start + len(mark)) if start >= 0 else -1
        if end >= 0:
            loop.remove_reader(fd)
            parsed = _parsed(bytes(seen[start + len(mark) : end]), bytes(seen[end + 1 :]))
            found.set_exception(StartError("", None)) if parsed is None else found.set_result(parsed)
        elif not data or len(seen) > _NOISE_LIMIT:
            loop.remove_reader(fd)
            found.set_exception(StartError("", None))

    loop.add_reader(fd, readable)
    try:
        return await found
    except StartError:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(exited), 1.0)
        status = exited.result() if exited.done() else None
        raise StartError(shown(seen), status) from None
    except asyncio.CancelledError:
        loop.remove_reader(fd)
        raise


async def past_noise(stream: socket.socket, mark: bytes) -> None:
    """Read a stream up to the end of the mark's line, and no further; a blocking one is so again in the end.

    Args:
        stream: The streams of a session, of which the login shell may say something first.
        mark: How the line begins; nothing follows in it.

    Raises:
        StartError: If it does not come.
    """
    loop, seen, wanted = asyncio.get_running_loop(), bytearray(), mark + b"\n"
    stream.setblocking(False)
    while not seen.endswith(wanted):
        begun = next(length for length in range(len(wanted) - 1, -1, -1) if seen.endswith(wanted[:length]))
        data = await loop.sock_recv(stream, len(wanted) - begun)
        seen += data
        if not data or len(seen) > _NOISE_LIMIT:
            raise StartError(shown(seen), None)
    stream.setblocking(True)


def _parsed(line: bytes, rest: bytes) -> StartMarker | None:
    """Return what the line says; None if it is not the line of our program."""
    words = _LINE.fullmatch(line.strip())
    if words is None:
        return None
    version = tuple(int(words[number]) for number in (1, 2, 3))
    return StartMarker(version, words[4].decode("ascii"), words[5] == b"kept", rest)
