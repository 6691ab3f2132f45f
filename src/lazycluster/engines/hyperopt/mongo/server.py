"""The server: connections, and which requests are written to the disk together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections import deque
from typing import Any

from ....cluster.sent.auth_limit import AuthLimit, limited_logger, room_for_connections
from ....cluster.sent.messages import LOOPBACK
from . import tls_context, wire
from .dispatch import ClientSession, Dispatcher
from .errors import CommandError

logger = logging.getLogger("lazycluster.mongo")

_LARGEST_BEFORE_LOGIN = 64 * 1024  # a stranger shall not make the server hold more
_MOST_AT_ONCE = 16  # requests of a stranger; drivers wait for each answer before they log in
_MOST_CONNECTIONS = 4000
_HIGH_WATER = 1024 * 1024
_BACKLOG = 512
_SWEEP_EVERY = 1.0


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._received = bytearray()
        self._transport: Any = None
        self._tls = tls_context.TlsChannel(server.tls) if server.tls is not None else None
        self.session = ClientSession()
        self.held: deque[wire.MongoRequest] = deque()
        self.writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if len(self._server.connections) >= self._server.most:
            self._transport.abort()
            return
        self._server.connections.add(self)
        if self._server.asks_for_login:
            self._server.unauthenticated.came(self)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        with contextlib.suppress(OSError):  # a half-open connection is noticed sooner or later
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        try:
            self._received += data if self._tls is None else self._decrypted(data)
            self._parse()
        except (wire.MessageError, ssl.SSLError) as error:
            log = logger if self.session.authenticated else limited_logger()
            log.warning("a connection is closed: %s", error)
            self._transport.abort()
            return
        self._server.wake()

    def _decrypted(self, data: bytes) -> bytes:
        assert self._tls is not None
        try:
            return self._tls.received(data)
        finally:
            if answer := self._tls.pending():
                self._write(answer)

    def _parse(self) -> None:
        received = self._received
        at_once = 0
        while len(received) >= 4:
            strange = self._server.asks_for_login and not self.session.authenticated
            length = wire.length_of(received, _LARGEST_BEFORE_LOGIN if strange else wire.LARGEST)
            if len(received) < length:
                return
            message = bytes(memoryview(received)[:length])
            del received[:length]
            self._server.pending.append((self, wire.parse(message)))
            if strange:
                # What comes next may be longer, if this logs in.
                self._server.run_pending()
                self._server.heard(self)
                at_once += 1
                if at_once > _MOST_AT_ONCE:
                    raise wire.MessageError("many requests at once of somebody who has not logged in")

    def send(self, data: bytes) -> None:
        """Send an answer."""
        try:
            self._write(data if self._tls is None else self._tls.encrypted(data))
        except ssl.SSLError:  # it has said that it takes no more
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def pause_writing(self) -> None:
        # A client that does not read its answers is not read from, either: nothing piles up.
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.unauthenticated.gone(self)
        self._received.clear()

    def abort(self) -> None:
        self._transport.abort()


class Server:
    """Listens on the loopback interface and runs what comes.

    Requests that arrive in the same turn of the loop share one transaction, so one synchronisation of the disk; none
    is answered before that.

    Args:
        engine: What runs the commands.
        asks_for_login: Whether clients have to log in.
        tls: What connections are encrypted with; None: they are not.
    """

    def __init__(self, engine: Dispatcher, asks_for_login: bool, tls: ssl.SSLContext | None = None) -> None:
        self._engine = engine
        self.asks_for_login = asks_for_login
        self.tls = tls
        self.connections: set[_Connection] = set()
        self.most = room_for_connections(_MOST_CONNECTIONS)
        self.unauthenticated: AuthLimit[_Connection] = AuthLimit(time.monotonic, _Connection.abort, self.most)
        self.pending: deque[tuple[_Connection, wire.MongoRequest]] = deque()
        self._woken = False
        self._listener: asyncio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    async def listen(self, port: int) -> int:
        """Begin to listen; returns the port.

        Raises:
            OSError: If the port is taken.
        """
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _Connection(self), LOOPBACK, port, backlog=_BACKLOG)
        self._sweep()
        return int(self._listener.sockets[0].getsockname()[1])

    def _sweep(self) -> None:
        self.unauthenticated.sweep()
        self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_EVERY, self._sweep)

    def heard(self, connection: _Connection) -> None:
        """Note that a connection which had not logged in has asked for something, perhaps for that."""
        if connection.session.authenticated:
            self.unauthenticated.gone(connection)
        elif connection in self.connections:
            self.unauthenticated.heard(connection)

    def wake(self) -> None:
        """Have what has come run, once everything that is there already was read."""
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self.run_pending)

    def run_pending(self) -> None:
        """Run what has come, bring it to the disk, and only then answer."""
        self._woken = False
        answers: list[tuple[_Connection, wire.MongoRequest, dict[str, Any]]] = []
        while self.pending:
            connection, request = self.pending.popleft()
            answers.append((connection, request, self._engine.run(connection.session, request.command)))
        failure = self._engine.commit()
        for connection, request, document in answers:
            if failure is not None and document.get("ok"):
                document = failure.reply()
            if request.answered:
                connection.send(_bytes_of(request, document))

    async def close(self) -> None:
        """Stop listening, and end all connections."""
        if self._listener is not None:
            self._listener.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)


def _bytes_of(request: wire.MongoRequest, document: dict[str, Any]) -> bytes:
    try:
        data = wire.answer(request, document)
    except (OverflowError, ValueError, TypeError) as error:
        logger.exception("an answer cannot be sent")
        return wire.answer(request, CommandError(8, f"the answer cannot be sent: {error}").reply())
    if len(data) > wire.LARGEST:
        return wire.answer(request, CommandError(10334, "the answer is too large: ask for less at once").reply())
    return data
