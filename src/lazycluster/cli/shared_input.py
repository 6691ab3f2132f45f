"""Standard input for many hosts: read once, and given to each as fast as that host takes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
import tempfile
from typing import TYPE_CHECKING

from lazycluster.exceptions import LazyclusterError

if TYPE_CHECKING:
    from lazycluster.ssh.channel import Channel

__all__ = ["SharedInput"]

_PART = 256 * 1024
_AHEAD = 64 * 1024 * 1024  # bytes that are read before the slowest host has taken them


class SharedInput:
    """What comes from standard input, on disk, so that a host that begins late gets it from the start."""

    def __init__(self) -> None:
        self._source = sys.stdin.fileno()
        self._regular = stat.S_ISREG(os.fstat(self._source).st_mode)
        self._start = os.lseek(self._source, 0, os.SEEK_CUR) if self._regular else 0
        self._file = None if self._regular else tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._size = 0
        self._over = self._regular
        self.error: OSError | None = None
        self._places: dict[int, int] = {}
        self._changed = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None

    async def feed(self, channel: Channel) -> None:
        """Send all of it to a command, and the end."""
        if self._reading is None and not self._regular:
            self._reading = asyncio.ensure_future(self._read())
        fd = self._source if self._file is None else self._file.fileno()
        self._places[id(channel)] = 0
        try:
            while data := await self._part(fd, self._places[id(channel)]):
                await channel.send(data)
                self._places[id(channel)] += len(data)
                await self._tell()
            await channel.send_end()
        finally:
            self._places.pop(id(channel), None)
            await self._tell()

    async def _part(self, fd: int, place: int) -> bytes:
        async with self._changed:
            await self._changed.wait_for(lambda: self._over or self._size > place)
        if self.error is not None:
            raise LazyclusterError(f"standard input cannot be passed on: {self.error}") from None
        return os.pread(fd, _PART, self._start + place)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _read(self) -> None:
        from lazycluster.core import event_loop

        assert self._file is not None
        try:
            while data := await event_loop.in_thread(os.read, self._source, _PART):
                self._file.write(data)
                self._file.flush()
                self._size += len(data)
                async with self._changed:
                    self._changed.notify_all()
                    await self._changed.wait_for(lambda: self._size - min(self._places.values(), default=0) < _AHEAD)
        except OSError as error:  # the temporary directory is full, say
            self.error = error
        self._over = True
        await self._tell()

    def close(self) -> None:
        """Let go of it."""
        if self._reading is not None:
            self._reading.cancel()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it could not write is told as its error
                self._file.close()
