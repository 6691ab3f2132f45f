"""Output that waits on the host while the manager cannot be reached: what memory is not meant for goes to a file."""

from __future__ import annotations

import os
import tempfile
from collections import deque

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Deque, Union

LIMIT = 256 * 1024 * 1024  # bytes above which those who produce output have to wait
_PIECE = 256 * 1024


class Spool:
    """Bytes in order, in a file that has no name, so that nothing of it can be left.

    Attributes:
        size: How many there are.
        limit: How many there should be: beyond half of what is free, others would suffer.
    """

    def __init__(self, directory: str) -> None:
        self.size = 0
        self.limit = LIMIT
        self._read = self._write = 0  # positions in the file
        self._rest: Deque[bytes] = deque()  # what the file did not take
        self._fd = -1
        try:
            self._fd, path = tempfile.mkstemp(prefix="output-", dir=directory)
            os.unlink(path)
            space = os.fstatvfs(self._fd)
            self.limit = min(LIMIT, space.f_bavail * space.f_frsize // 2)
        except OSError:
            self.limit = 0  # it works with memory alone, but not for long

    @property
    def full(self) -> bool:
        """True if no more should come."""
        return self.size >= self.limit or bool(self._rest)

    def put(self, data: Union[bytes, memoryview]) -> None:
        """Add bytes, whether it is full or not."""
        self.size += len(data)
        view = memoryview(data)
        try:
            while view and self._fd >= 0 and not self._rest:
                count = os.pwrite(self._fd, view, self._write)
                self._write += count
                view = view[count:]
        except OSError:
            pass  # the disk is full: it has to stay in memory, and who looks sees that no more should come
        if view:
            self._rest.append(bytes(view))

    def take(self) -> bytes:
        """Return the next bytes, at most some hundred KiB of what is in the file."""
        if self._read < self._write:
            try:
                data = os.pread(self._fd, min(_PIECE, self._write - self._read), self._read)
            except OSError as error:
                raise RuntimeError("output that was kept in a file cannot be read again: {}".format(error)) from error
            if not data:
                raise RuntimeError("the file with the output that was kept was cut short")
            self._read += len(data)
            if self._read == self._write:
                os.ftruncate(self._fd, 0)
                self._read = self._write = 0
        else:
            data = self._rest.popleft()
        self.size -= len(data)
        return data

    def close(self) -> None:
        """Drop what is there."""
        self._rest.clear()
        self.size = 0
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
