"""The messages of OpenSSH's multiplexing protocol (its PROTOCOL.mux), and a connection that carries them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from enum import IntEnum

from lazycluster.core import forks

__all__ = ["MuxClient", "MuxReply", "MuxRequest", "Reader", "pack"]

_VERSION = 4
_HELLO = 1
_LONGEST = 256 * 1024
_CHUNK = 64 * 1024


class MuxRequest(IntEnum):
    """Requests of a client."""

    NEW_SESSION = 0x10000002
    ALIVE_CHECK = 0x10000004
    TERMINATE = 0x10000005
    OPEN_FORWARD = 0x10000006
    CLOSE_FORWARD = 0x10000007
    NEW_STREAM = 0x10000008


class MuxReply(IntEnum):
    """Answers of a master."""

    OK = 0x80000001
    DENIED = 0x80000002
    FAILURE = 0x80000003
    EXIT = 0x80000004
    ALIVE = 0x80000005
    SESSION_OPENED = 0x80000006
    REMOTE_PORT = 0x80000007
    TTY_FAILED = 0x80000008


def pack(*fields: int | str) -> bytes:
    """Return a message: numbers of 32 bits, and strings with their length, behind the length of all."""
    body = bytearray()
    for field in fields:
        if isinstance(field, int):
            body += struct.pack("!I", field)
        else:
            text = field.encode("utf-8", "surrogateescape")
            body += struct.pack("!I", len(text)) + text
    return struct.pack("!I", len(body)) + bytes(body)


class Reader:
    """Takes a message apart. What is missing raises EOFError."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def _take(self, size: int) -> bytes:
        part = self._body[self._at : self._at + size]
        if len(part) != size:
            raise EOFError("the master sent a message that is too short")
        self._at += size
        return part

    def u32(self) -> int:
        """Return the number that comes next."""
        return int(struct.unpack("!I", self._take(4))[0])

    def text(self) -> str:
        """Return the string that comes next."""
        return self._take(self.u32()).decode(errors="replace")


class MuxClient:
    """A connection to a master. Every method raises OSError or EOFError when the master has gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()

    @classmethod
    async def connect(cls, path: str) -> MuxClient:
        """Connect, and exchange greetings."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        forks.close_in_children(connection.fileno())
        client = cls(connection)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, path)
            await client.send(pack(_HELLO, _VERSION))
            kind, reader = await client.receive()
            if kind != _HELLO or (version := reader.u32()) != _VERSION:
                what = f"version {version} of its protocol" if kind == _HELLO else "another protocol"
                raise ConnectionError(f"the master speaks {what}")
        except BaseException:
            client.close()
            raise
        return client

    async def send(self, messages: bytes) -> None:
        """Send packed messages."""
        await asyncio.get_running_loop().sock_sendall(self._socket, messages)

    async def send_descriptor(self, descriptor: int) -> None:
        """Send a file descriptor, with one byte of its own as the master expects it."""
        while True:
            try:
                socket.send_fds(self._socket, [b"\0"], [descriptor])
                return
            except (BlockingIOError, InterruptedError):
                await self._writable()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self._socket, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self._socket)

    async def receive(self) -> tuple[int, Reader]:
        """Return the kind of the next message, and what follows."""
        while (message := self._next()) is None:
            data = await asyncio.get_running_loop().sock_recv(self._socket, _CHUNK)
            if not data:
                raise EOFError("the master closed the connection")
            self._received += data
        reader = Reader(message)
        return reader.u32(), reader

    def _next(self) -> bytes | None:
        if len(self._received) < 4:
            return None
        size = struct.unpack_from("!I", self._received)[0]
        if size > _LONGEST:
            raise ConnectionError("the master sent a message that is too long")
        if len(self._received) < 4 + size:
            return None
        message = bytes(self._received[4 : 4 + size])
        del self._received[: 4 + size]
        return message

    def close(self) -> None:
        """Close the connection. The master ends a session that was opened on it."""
        with contextlib.suppress(OSError):
            self._socket.close()
