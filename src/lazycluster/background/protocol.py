"""The messages between the process of a cluster and other processes of its user: lines of JSON, and never pickles."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from lazycluster.core import unix
from lazycluster.exceptions import LazyclusterError

__all__ = ["ALWAYS", "VERSION", "MessageStream", "connected", "listening"]

VERSION = 1
"""Of the requests and answers. Processes of other versions answer those in `ALWAYS` only, and say so."""

ALWAYS = ("status", "down")
"""Requests that each version has, in the same form: ``{"command": "status"}``."""

_LARGEST = 64 * 1024 * 1024  # bytes of a message: the user's own modules are some
_PATIENCE = 10.0  # seconds for a connection, and for a message that has begun


class MessageStream:
    """Messages over a socket: JSON objects, one to a line.

    Args:
        connection: The socket; it is closed with this.
        received: What has been read from it already.
    """

    def __init__(self, connection: socket.socket, received: bytes = b"") -> None:
        self._socket = connection
        self._received = bytearray(received)
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """Return the descriptor, to wait for messages; a part of one may have come before."""
        return self._socket.fileno()

    def send(self, **message: Any) -> bool:
        """Send a message. May be called from any thread.

        Returns:
            False if nobody is there any more.
        """
        data = _encoded(message)
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError:
            return False
        return True

    def offer(self, **message: Any) -> bool:
        """Send a short message unless one would have to wait for that. May be called from any thread.

        Returns:
            False if it was left out, or nobody is there any more.
        """
        if not self._sending.acquire(blocking=False):
            return False
        data = _encoded(message)
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            return False
        finally:
            self._sending.release()
        if sent < len(data):  # what follows would not be understood
            self.end()
        return sent == len(data)

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """Return the next message; None at the end.

        Args:
            timeout: Seconds to wait; None: as long as it takes.

        Raises:
            TimeoutError: If none has come.
            ValueError: If what has come is none.
        """
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > _LARGEST:
                raise ValueError("a message is too long")
            self._socket.settimeout(timeout)
            try:
                data = self._socket.recv(65536)
            except ConnectionError:
                data = b""
            finally:
                if self._socket.fileno() >= 0:
                    self._socket.settimeout(None)
            if not data:
                return None
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line)
        except RecursionError:
            message = None
        if not isinstance(message, dict):
            raise ValueError("what was sent is not a JSON object")
        return message

    def end(self) -> None:
        """Have whoever waits for a message, here or at the other side, see the end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> MessageStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


class _SocketDirectory:
    """A directory by a path that is short enough for a socket's: that of the user's home may be long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) < unix.SOCKET_PATH_SIZE - 16:
            return str(self._path)
        self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return unix.descriptor_path(self._fd)

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def listening(path: Path) -> socket.socket:
    """Return a socket at which this process listens, for its own user only.

    Args:
        path: Where: in a directory that is this user's alone.

    Raises:
        OSError: If the file system has no sockets.
    """
    path.unlink(missing_ok=True)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _SocketDirectory(path.parent) as directory:
            found.bind(f"{directory}/{path.name}")
        path.chmod(0o600)
        found.listen(64)
    except BaseException:
        found.close()
        raise
    return found


def connected(path: Path) -> MessageStream:
    """Return a connection to a process that listens.

    Raises:
        LazyclusterError: If another user's process does.
        OSError: If none does.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.settimeout(_PATIENCE)
        with _SocketDirectory(path.parent) as directory:
            found.connect(f"{directory}/{path.name}")
        if not unix.is_own_peer(found):
            raise LazyclusterError(f"the process that listens at {path} is another user's: it is not trusted")
        found.settimeout(None)
    except BaseException:
        found.close()
        raise
    return MessageStream(found)
