"""Files that a copy could not finish because its link dropped, kept for the next try. Used on the host and here.

They have no name: nothing of them is left when whoever holds them ends. On the host that is the agent: the process
that received them has ended with its stream.
"""

from __future__ import annotations

import _thread
import fcntl
import json
import os
from typing import Any, List, NamedTuple, Optional

from . import descriptors
from .stream import raw, text

WORTH_IT = 1024 * 1024  # bytes below which a file is rather sent again
_MOST = 4
_MESSAGE = 64 * 1024


class PartialFile(NamedTuple):
    """A file of which the beginning has come.

    Attributes:
        path: Where it belongs.
        size: How long the whole is.
        mtime: The time of change of the whole.
        fd: The file.
        done: How many bytes of it are there.
    """

    path: bytes
    size: int
    mtime: int
    fd: int
    done: int


class PartialFiles:
    """The latest few of them. May be used from any thread."""

    def __init__(self) -> None:
        self._parts: List[PartialFile] = []
        self._lock = _thread.allocate_lock()
        self._closed = False

    def put(self, part: PartialFile) -> None:
        """Keep one, and let go of the oldest."""
        fcntl.flock(part.fd, fcntl.LOCK_UN)
        with self._lock:
            self._parts = [other for other in self._parts if not _replaced(other, part)] + [part]
            while len(self._parts) > (0 if self._closed else _MOST):
                os.close(self._parts.pop(0).fd)

    def take(self, path: bytes, size: int, mtime: int) -> Optional[PartialFile]:
        """Return what there is of a file, which is the caller's then.

        That may be of the file before it grew: the sender compares what it holds with the beginning of what there is.
        """
        with self._lock:
            found = [
                part
                for part in self._parts
                if part.path == path and (size > part.size or (size, mtime) == (part.size, part.mtime))
            ]
            for part in found:
                self._parts.remove(part)
        return _owned(found[0]) if found else None

    def drop(self, part: PartialFile) -> None:
        """Let go of one, if it is still there."""
        with self._lock:
            if any(other is part for other in self._parts):
                self._parts.remove(part)
                os.close(part.fd)

    @property
    def descriptors(self) -> List[int]:
        """The files."""
        return [part.fd for part in self._parts]

    def close(self) -> None:
        """Let go of all, also of those that come later."""
        with self._lock:
            self._closed = True
            while self._parts:
                os.close(self._parts.pop().fd)

    def send_to(self, connection: Any) -> None:
        """Give all of them to another process."""
        for part in self._parts:
            message = json.dumps([text(part.path), *part[1:3], *part[4:]]).encode("ascii")
            try:
                descriptors.send(connection, [part.fd], message)
            except OSError:
                return  # nobody wants them any more


def _owned(part: PartialFile) -> Optional[PartialFile]:
    """Return a part that no other process takes up; None if one does, or has done so and given it its name."""
    fd = -1
    try:
        # A description of our own: the lock, and the position in the file, are not those of others.
        fd = os.open("/proc/self/fd/{}".format(part.fd), os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink == 0 and os.fstat(fd).st_size >= part.done:
            mine, fd = fd, -1
            return part._replace(fd=mine)
    except OSError:
        pass  # it is sent again from its beginning
    finally:
        os.close(part.fd)
        if fd >= 0:
            os.close(fd)
    return None


def _replaced(one: PartialFile, other: PartialFile) -> bool:
    if one.path == other.path:
        os.close(one.fd)
        return True
    return False


def received(connection: Any) -> Optional[PartialFile]:
    """Take one from another process; None if no more come."""
    message, fds = descriptors.receive(connection, 1, _MESSAGE)
    if not message or not fds:
        return None
    path, size, mtime, done = json.loads(message)
    return PartialFile(raw(path), size, mtime, fds[0], done)
