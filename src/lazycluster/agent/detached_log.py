"""The log of a detached task: its beginning and its end, so that no output fills the disk.

The file `log` has the beginning. What follows is in files `log-N`, N being the number of the first byte in all of the
output; of these only the last ones are kept. What lies between two files was left out.
"""

from __future__ import annotations

import os
import re

from .wire import MAX_PAYLOAD

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import List, Tuple

    from .session import RequestChannel

HEAD = 16 << 20  # bytes of the beginning
TAIL = 16 << 20  # bytes of each of the files with the end, of which there are two
_FILE = re.compile("log(?:-([0-9]{1,18}))?")


def _files(directory: str) -> List[Tuple[int, str]]:
    """Return the files of a log, each with the number of its first byte, in order."""
    found = [_FILE.fullmatch(name) for name in os.listdir(directory)]
    return sorted((int(one.group(1) or 0), os.path.join(directory, one.group())) for one in found if one)


class LogWriter:
    """Writes the log of a task.

    Args:
        directory: The directory of the task.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._at = 0  # the number of the next byte
        self._fd = -1
        self._room = 0
        self._path = ""
        self._begin()

    def _begin(self) -> None:
        """Begin a file, with the next byte; of those before it, the beginning and the last one stay."""
        for start, path in _files(self._directory)[:-1]:
            if start:
                os.unlink(path)
        self.close()
        self._path = os.path.join(self._directory, "log-{}".format(self._at) if self._at else "log")
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._room = TAIL if self._at else HEAD

    def write(self, data: bytes) -> None:
        """Write output. What the disk has no room for is left out: the task is not to suffer from that."""
        view = memoryview(data)
        while view:
            try:
                if not self._room:
                    self._begin()
                written = os.write(self._fd, view[: self._room])
            except OSError:
                if self._room == TAIL:
                    os.unlink(self._path)  # nothing is in it
                self._at += len(view)
                self._room = 0  # what comes later is behind a gap
                return
            self._at, self._room, view = self._at + written, self._room - written, view[written:]

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LogOutput:
    """Sends a log, no faster than it is taken, with a line where something was left out.

    The result has `end`, the number of the byte behind the last one that was sent: a later request goes on there.

    Args:
        channel: The request.
        directory: The directory of the task.
        offset: The number of the first byte that is wanted.
    """

    def __init__(self, channel: RequestChannel, directory: str, offset: int) -> None:
        self._channel = channel
        self._directory = directory
        self._at = offset
        self._fd = -1
        channel.on_drain = self._go_on
        channel.on_abandon = self._close
        self._go_on()

    def _go_on(self) -> None:
        while self._channel.writable:
            data = os.read(self._fd, MAX_PAYLOAD) if self._fd >= 0 else b""
            if data:
                self._at += len(data)
                self._channel.output(data)
            elif not self._open_next():
                self._channel.result(end=self._at)
                return

    def _open_next(self) -> bool:
        """Open the file that has the next bytes; return whether there is one."""
        self._close()
        for start, path in _files(self._directory):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:  # it has just made room for another one
                continue
            if start + os.fstat(fd).st_size <= self._at:
                os.close(fd)
                continue
            if start > self._at:
                line = "\n[lazycluster: {} bytes of the output are left out here]\n".format(start - self._at)
                self._channel.output(line.encode())
                self._at = start
            os.lseek(fd, self._at - start, os.SEEK_SET)
            self._fd = fd
            return True
        return False

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
