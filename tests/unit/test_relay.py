"""One end of a relay through the agent, whose other end is played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lazycluster.agent import relay, wire
from lazycluster.core import event_loop
from lazycluster.ssh.config import Settings
from lazycluster.ssh.local_connection import LocalConnection


class _Played:
    """An end, with the stream in our hands."""

    def __init__(self, connection: LocalConnection) -> None:
        self._connection = connection
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._decoder = wire.Decoder()
        self._frames: list[tuple[int, int, bytes]] = []

    async def start(self) -> _Played:
        self.channel = self._connection.channel("relay", {"first": False}, event=self._events.put_nowait)
        path = (await self._events.get())["socket"]
        self.stream, theirs = socket.socketpair()
        self.stream.setblocking(False)
        with theirs, socket.socket(socket.AF_UNIX) as giver:
            giver.connect(path)
            rights = struct.pack("2i", theirs.fileno(), theirs.fileno())
            giver.sendmsg([b"stream"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert await self._events.get() == {"ready": True}
        return self

    async def ask(self, **message: Any) -> dict[str, Any]:
        self.channel.control(**message)
        return await self._events.get()

    async def send(self, number: int, kind: int, payload: bytes = b"") -> None:
        await asyncio.get_running_loop().sock_sendall(self.stream, wire.frame(number, kind, payload))

    async def frame(self) -> tuple[int, int, bytes]:
        """Return the next frame that it sends."""
        while not self._frames:
            data = await asyncio.get_running_loop().sock_recv(self.stream, 65536)
            if not data:
                raise EOFError
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    async def has_ended(self) -> bool:
        """Whether its process ends by itself."""
        await asyncio.wait_for(self.channel.result(), 10)
        with contextlib.suppress(EOFError, ConnectionResetError):
            while await self.frame():
                pass
        return True


def _with_end(body: Callable[[_Played], Awaitable[None]]) -> None:
    async def whole() -> None:
        connection = LocalConnection()
        await connection.open()
        played = _Played(connection)
        try:
            await body(await played.start())
        finally:
            await connection.close()
            played.stream.close()

    event_loop.run(whole(), timeout=60)


@contextlib.asynccontextmanager
async def _listener(serve: Any) -> Any:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write((await reader.read()).upper())
    writer.close()


def _tunnel(number: int) -> bytes:
    return struct.pack("!I", number)


def test_it_connects_to_its_targets_and_ends_each_way_on_its_own() -> None:
    async def body(end: _Played) -> None:
        async with _listener(_shout) as port:
            assert await end.ask(target=7, port=port) == {"done": 7}
            await end.send(1, wire.REQUEST, _tunnel(7))
            await end.send(1, wire.INPUT, b"hal")
            await end.send(1, wire.INPUT, b"lo")
            await end.send(1, wire.INPUT_END)
            assert await end.frame() == (1, wire.INPUT, b"HALLO")
            assert await end.frame() == (1, wire.INPUT_END, b"")

    _with_end(body)


def test_it_listens_and_says_what_comes() -> None:
    async def body(end: _Played) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
            assert (await end.ask(listen=3, port=port))["errno"]
        assert await end.ask(listen=3, port=port) == {"done": 3}
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await end.frame() == (2, wire.REQUEST, _tunnel(3))
        writer.write(b"to be carried")
        assert await end.frame() == (2, wire.INPUT, b"to be carried")
        await end.send(2, wire.INPUT, b"last words")
        await end.send(2, wire.RESULT)
        assert await reader.read() == b"last words"  # delivered before it is closed
        writer.close()
        assert await end.ask(close=3) == {"done": 3}
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)

    _with_end(body)


def test_it_reaches_nothing_that_it_was_not_told_of() -> None:
    async def body(end: _Played) -> None:
        async with _listener(_shout) as port:
            await end.send(1, wire.REQUEST, _tunnel(port))
            assert await end.frame() == (1, wire.RESULT, b"")
            await end.ask(target=1, port=port)
            await end.ask(close=1)
            await end.send(3, wire.REQUEST, _tunnel(1))
            assert await end.frame() == (3, wire.RESULT, b"")

    _with_end(body)


def test_a_port_where_nobody_listens_ends_the_connection() -> None:
    async def body(end: _Played) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        await end.ask(target=1, port=port)
        await end.send(1, wire.REQUEST, _tunnel(1))
        await end.send(1, wire.INPUT, b"is anybody there?")
        assert await end.frame() == (1, wire.RESULT, b"")

    _with_end(body)


def test_it_sends_no_more_than_it_was_allowed() -> None:
    async def body(end: _Played) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(3 * relay.WINDOW))
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()

        async with _listener(talk) as port:
            await end.ask(target=1, port=port)
            await end.send(1, wire.REQUEST, _tunnel(1))
            got = 0
            while got < relay.WINDOW:
                got += len((await end.frame())[2])
            assert got == relay.WINDOW
            await end.ask(target=2, port=port)  # it has gone round its loop, and sent nothing
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(end.frame(), 0.05)
            await end.send(1, wire.CREDIT, struct.pack("!I", 5))
            assert len((await end.frame())[2]) == 5
            await end.send(1, wire.RESULT)

    _with_end(body)


@pytest.mark.parametrize(
    "messages",
    [
        [(2, wire.REQUEST, _tunnel(1))],  # a number that is ours to give
        [(1, wire.REQUEST, b"")],
        [(1, wire.REQUEST, _tunnel(1) + b"and more")],
        [(1, wire.REQUEST, _tunnel(1)), (1, wire.REQUEST, _tunnel(1))],
        [(1, wire.REQUEST, _tunnel(1)), *[(1, wire.INPUT, bytes(wire.MAX_PAYLOAD))] * 80],
        [(1, wire.REQUEST, _tunnel(1)), (1, wire.CREDIT, b"x")],
        [(1, 99, b"")],
    ],
)
def test_whoever_breaks_the_rules_is_left(messages: list[tuple[int, int, bytes]]) -> None:
    async def body(end: _Played) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # nobody takes what comes
            await end.ask(target=1, port=silent.getsockname()[1])
            for message in messages:
                with contextlib.suppress(ConnectionError):
                    await end.send(*message)
            assert await end.has_ended()

    _with_end(body)


def test_it_ends_with_its_stream_and_with_its_channel() -> None:
    async def with_stream(end: _Played) -> None:
        end.stream.shutdown(socket.SHUT_WR)
        assert await end.has_ended()

    async def with_channel(end: _Played) -> None:
        end.channel.close()
        with pytest.raises(EOFError):
            await end.frame()

    _with_end(with_stream)
    _with_end(with_channel)


@pytest.mark.parametrize(("value", "error"), [("yes", ValueError), ("", ValueError), (True, TypeError), (1, TypeError)])
def test_the_setting_is_checked(value: Any, error: type[Exception]) -> None:
    assert Settings.parse("host", {"relay": "agent"}).relay == "agent"
    assert Settings.parse("host", {"relay": None}).relay is None
    with pytest.raises(error, match="relay"):
        Settings.parse("host", {"relay": value})
