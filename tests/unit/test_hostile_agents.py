"""What an agent can do to its manager that is not the agent that the manager has sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lazycluster.agent import wire
from lazycluster.exceptions import AgentError, ConnectionLostError, LazyclusterError
from lazycluster.ssh.hello import Hello
from lazycluster.ssh.link import AgentLink


class Host:
    """The other side of a link."""

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self.fd_in, self.fd_out = fd_in, fd_out

    async def say(self, data: bytes) -> None:
        """Write, and leave the manager time to read."""
        os.set_blocking(self.fd_out, False)
        while data:
            try:
                data = data[os.write(self.fd_out, data) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                return
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[AgentLink, Host, list[Exception | None]]]:
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    lost: list[Exception | None] = []

    def on_lost(error: Exception | None) -> None:
        lost.append(error)
        link.lost(str(error or "gone"))

    link = AgentLink("host1", ours_in, ours_out, on_lost)
    try:
        yield link, Host(theirs_in, theirs_out), lost
    finally:
        os.close(theirs_out)
        os.close(theirs_in)
        link.lost("the end of the test")


@pytest.mark.parametrize(
    "payload", [b"[]", b"7", b"null", b'"ok"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b""]
)
@pytest.mark.parametrize("kind", [wire.RESULT, wire.EVENT])
def test_what_is_no_message_ends_the_link_and_whoever_waits(kind: int, payload: bytes) -> None:
    async def attempt() -> None:
        async with linked() as (link, host, lost):
            channel = link.open_channel("info", {}, event=lambda _: None)
            await host.say(wire.frame(1, kind, payload))
            with pytest.raises(ConnectionLostError):
                await asyncio.wait_for(channel.result(), 10)
            assert isinstance(lost[0], wire.ProtocolError)
            assert len(str(lost[0])) < 500

    asyncio.run(attempt())


def test_a_link_event_that_is_no_message_ends_the_link() -> None:
    async def attempt() -> None:
        async with linked() as (link, host, lost):
            await host.say(wire.frame(0, wire.EVENT, b"[]"))
            with pytest.raises(ConnectionLostError, match="not an object"):
                await asyncio.wait_for(link.hello, 10)
            assert lost

    asyncio.run(attempt())


@pytest.mark.parametrize("kind", [wire.RESULT, wire.STDOUT, wire.OUTPUT, wire.CREDIT])
def test_a_huge_frame_is_refused_by_its_header(kind: int) -> None:
    """What is announced is not waited for, and not held."""

    async def attempt() -> None:
        async with linked() as (link, host, lost):
            channel = link.open_channel("run", {})
            tracemalloc.start()
            await host.say(wire.HEADER.pack(wire.FROM_AGENT + 1, 1, kind) + bytes(100_000))
            with pytest.raises(ConnectionLostError, match="not a frame"):
                await asyncio.wait_for(channel.result(), 10)
            assert lost
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
            tracemalloc.stop()

    asyncio.run(attempt())


def test_channels_that_nobody_opened_take_no_memory() -> None:
    async def attempt() -> None:
        async with linked() as (_, host, lost):
            tracemalloc.start()
            for number in range(2, 2000):
                await host.say(wire.frame(number, wire.STDOUT, bytes(2000)) + wire.frame(number, wire.RESULT, b"{}"))
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
            tracemalloc.stop()
            assert not lost

    asyncio.run(attempt())


def test_a_channel_has_one_result() -> None:
    async def attempt() -> None:
        async with linked() as (link, host, _):
            seen: list[bytes] = []
            channel = link.open_channel("run", {}, stdout=seen.append)
            result = wire.json_frame(1, wire.RESULT, {"ok": True, "exit": 0})
            await host.say(wire.frame(1, wire.STDOUT, b"a") + result + wire.frame(1, wire.STDOUT, b"b") + result)
            assert await channel.result() == {"exit": 0}
            assert seen == [b"a"]

    asyncio.run(attempt())


def test_an_error_of_a_host_does_not_steer_the_terminal() -> None:
    async def attempt() -> None:
        async with linked() as (link, host, _):
            channel = link.open_channel("info", {})
            said = "gone\x1b]0;title\x07\x1b[2J\r\nsecond\u202e line\x9b"
            await host.say(wire.json_frame(1, wire.RESULT, {"ok": False, "error": "os", "message": said}))
            with pytest.raises(AgentError) as caught:
                await channel.result()
            assert str(caught.value) == "host1: gone\\x1b]0;title\\x07\\x1b[2J\nsecond\\u202e line\\x9b"
            assert caught.value.message == said

    asyncio.run(attempt())


def test_errors_can_be_shown_whatever_is_in_them() -> None:
    text = "".join(map(chr, range(0x300))) + "\udc80\ud800"
    shown = str(LazyclusterError(text))
    shown.encode("utf-8")
    assert all(letter.isprintable() or letter in "\n\t\xa0\xad" for letter in shown)


_HELLO = {
    "python": [3, 11, 2], "executable": "/usr/bin/python3", "pid": 1, "uid": 0, "user": "u", "home": "/", "shell": "sh",
    "hostname": "h", "directory": "/tmp/x", "identity": "i", "platform": "linux", "boot_id": "", "machine_id": "",
    "network": "", "path": "", "booted": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"python": "3.11"}, {"python": [3]}, {"python": [3, "11", 2]}, {"pid": "1"}, {"directory": None},
        {"home": ["/"]}, {"uid": 1.5}, {"identity": {}},
    ],
)  # fmt: skip
def test_a_hello_is_checked(change: dict[str, Any]) -> None:
    assert Hello.parse(json.loads(json.dumps(_HELLO))).python == (3, 11, 2)
    with pytest.raises(ValueError, match=next(iter(change))):
        Hello.parse({**_HELLO, **change})
    with pytest.raises(ValueError, match="python"):
        Hello.parse({})
