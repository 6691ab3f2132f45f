"""What an agent can do to its manager that is not the agent that the manager has sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.agent import wire
from lazycluster.agent.operations import HANDLERS
from lazycluster.core import event_loop
from lazycluster.exceptions import AgentError, ConnectionLostError, InvalidRuntimeError, LazyclusterError
from lazycluster.output import log_limit
from lazycluster.ssh import agent_replies
from lazycluster.ssh import link as link_module
from lazycluster.ssh.agent_replies import AgentInfo
from lazycluster.ssh.channel import Channel
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
    link._sent_for.update(HANDLERS)  # as later on: the first request is number 1
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
            assert isinstance(lost[0], wire.FrameError)
            assert len(str(lost[0])) < 500

    asyncio.run(attempt())


def test_a_link_event_that_is_no_message_ends_the_link() -> None:
    async def attempt() -> None:
        async with linked() as (link, host, lost):
            await host.say(wire.frame(0, wire.EVENT, b"[]"))
            with pytest.raises(ConnectionLostError, match="not an object"):
                await asyncio.wait_for(link.started, 10)
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
            result = wire.json_frame(1, wire.RESULT, {"ok": True, "exit": 0, "signal": None})
            await host.say(wire.frame(1, wire.STDOUT, b"a") + result + wire.frame(1, wire.STDOUT, b"b") + result)
            assert await channel.result() == {"exit": 0, "signal": None}
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


@pytest.mark.parametrize("kind", ["problem", "crash"])
def test_what_a_host_has_logged_is_limited_in_number(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by equal text: a million different ones would fill the log, and keep all others waiting."""
    monkeypatch.setattr(log_limit, "SPAN", 1.0)
    monkeypatch.setattr(log_limit, "_accounts", {})
    caplog.set_level(logging.WARNING, "lazycluster")

    async def attempt() -> None:
        async with linked() as (link, host, lost):
            channel = link.open_channel("ping", {})
            for number in range(3000):
                await host.say(wire.json_frame(0, wire.EVENT, {kind: f"no {number}"}))
            await host.say(wire.json_frame(1, wire.RESULT, {"ok": True}))
            assert await channel.result() == {}
            assert not lost
            while "more messages of this host were left out" not in caplog.text:
                await asyncio.sleep(0.01)

    asyncio.run(attempt())
    told = [record.getMessage() for record in caplog.records if "left out" not in record.getMessage()]
    assert len(told) % log_limit.MOST == 0
    left_out = [record.args[1] for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) + sum(left_out) <= 3000
    assert sum(left_out) > 1000


def test_a_host_that_says_very_much_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a mebibyte of short frames takes long: what else is to be done does not wait for all of them."""
    handled: list[str] = []

    async def attempt() -> None:
        async with linked() as (loud, _, lost), linked() as (quiet, other, _):
            monkeypatch.setattr(link_module, "_TURN", 0.0)
            loud.open_channel("run", {}, event=lambda _: handled.append("loud"))
            answer = quiet.open_channel("ping", {})
            loud._feed(wire.json_frame(1, wire.EVENT, {}) * 5000)
            await other.say(wire.json_frame(1, wire.RESULT, {"ok": True}))
            await answer.result()
            handled.append("quiet")
            while handled.count("loud") < 5000:
                await asyncio.sleep(0)
            assert not lost

    asyncio.run(attempt())
    assert handled.index("quiet") < 100
    assert handled.count("loud") == 5000  # nothing is lost, or comes twice


def test_errors_can_be_shown_whatever_is_in_them() -> None:
    text = "".join(map(chr, range(0x300))) + "\udc80\ud800"
    shown = str(LazyclusterError(text))
    shown.encode("utf-8")
    assert all(letter.isprintable() or letter in "\n\t\xa0\xad" for letter in shown)


@pytest.mark.parametrize(
    ("request_", "answer", "where"),
    [
        ({"op": "ports"}, {}, "free is missing"),
        ({"op": "ports"}, {"free": 7}, "free is not a list"),
        ({"op": "ports"}, {"free": [1, "2"]}, "free is '2'"),
        ({"op": "mkdtemp"}, {"path": None}, "path is None"),
        ({"op": "setup"}, {"env": {"PATH": ["/"]}}, "env.PATH is"),
        ({"op": "setup"}, {"env": []}, "env is not an object"),
        ({"op": "interpreters"}, {"interpreters": [{"path": "/p"}]}, "interpreters.version is missing"),
        ({"op": "run"}, {"exit": "0", "signal": None}, "exit is '0'"),
        ({"op": "run"}, {"exit": float("nan"), "signal": None}, "NaN is not finite"),
        ({"op": "call"}, {"status": {}}, "status is"),
        (
            {"op": "activity"},
            dict.fromkeys(("busy", "total", "tasks", "workers", "tunnels"), float("inf")),
            "Infinity is not finite",
        ),
        ({"op": "usage"}, {"services": {"7": [1, "2"]}, "time": 1.0, "hertz": 100}, "services.7 is '2'"),
        ({"op": "detached", "do": "list"}, {"tasks": [None]}, "tasks is not an object"),
        ({"op": "environment", "action": "find"}, {"found": "yes", "prefix": "/"}, "found is 'yes'"),
        ({"op": "environment", "action": "survey"}, {"interpreters": [], "reachable": [["a", []]]}, "reachable is []"),
        ({"op": "environment", "action": "wheels"}, {"missing": None, "directory": "/"}, "missing is not a list"),
        ({"op": "environment", "action": "compiled"}, {"compiled": 1.0}, "compiled is 1.0"),
        ({"op": "environment", "action": "sift"}, {"removed": "all"}, "removed is 'all'"),
        ({"op": "ports"}, {"free": [-1]}, "free is -1"),
        ({"op": "ports"}, {"free": [65536]}, "free is 65536"),
        ({"op": "ports"}, {"free": [True]}, "free is True"),
        ({"op": "ports"}, {"free": [], "denied": 7}, "denied is not a list"),
        ({"op": "nonce"}, {"port": 22.0, "nonce": ""}, "port is 22.0"),
        ({"op": "nonce"}, {"port": 22, "nonce": "\udc80"}, "nonce is"),
        ({"op": "mkdtemp"}, {"path": "\ud800"}, "is not text"),
        ({"op": "mkdtemp"}, {"path": "\udc7f"}, "is not text"),
        ({"op": "ping"}, {"a": {"\ud800": 1}}, "is not text"),
        ({"op": "ping"}, {"a": 10**400}, "more than 64 bits"),
        ({"op": "ping"}, {"a": 2**64}, "more than 64 bits"),
        ({"op": "ping"}, {"a": [-(2**63) - 1]}, "more than 64 bits"),
        ({"op": "ping"}, {"a": json.loads("[" * 60 + "]" * 60)}, "nested too deeply"),
        ({"op": "ping"}, {"a": float("-inf")}, "-Infinity is not finite"),
        ({"op": "run"}, {"exit": 2**40, "signal": None}, "exit is 1099511627776"),
        ({"op": "run"}, {"exit": 0, "signal": -9}, "signal is -9"),
        ({"op": "detached", "do": "list"}, {"tasks": [{"id": "../x"}]}, "tasks.id is '../x'"),
        ({"op": "environment", "action": "facts"}, {"root": "/", "system": "../x"}, "system is '../x'"),
        ({"op": "expand"}, {"path": "x" * 1_000_000, "directory": "x" * 1_000_000, "identity": None}, "directory is"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(request_: dict[str, Any], answer: Any, where: str) -> None:
    async def attempt() -> None:
        async with linked() as (link, host, _):
            params = {key: value for key, value in request_.items() if key != "op"}
            channel = link.open_channel(request_["op"], params)
            await host.say(wire.json_frame(1, wire.RESULT, {"ok": True, **answer}))
            with pytest.raises(AgentError, match="is invalid") as caught:
                await asyncio.wait_for(channel.result(), 10)
            assert where in str(caught.value)
            assert caught.value.kind == "protocol"
            assert len(str(caught.value)) < 1000

    asyncio.run(attempt())


@pytest.mark.parametrize(
    "payload",
    [b'{"a":%s}' % (b"1" * 5000), b'{"a":1e999}', b'{"a":-%s}' % (b"9" * 20), b'{"a":"\\ud800"}', b'{"a":NaN}'],
)
@pytest.mark.parametrize("kind", [wire.RESULT, wire.EVENT])
def test_a_value_that_cannot_be_used_ends_its_request_alone(kind: int, payload: bytes) -> None:
    async def attempt() -> None:
        async with linked() as (link, host, lost):
            channel = link.open_channel("info", {}, event=lambda _: None)
            other = link.open_channel("ping", {})
            await host.say(wire.frame(1, kind, payload) + wire.json_frame(2, wire.RESULT, {"ok": True}))
            with pytest.raises(AgentError, match=r"host1: its answer to 'info' is invalid"):
                await asyncio.wait_for(channel.result(), 10)
            assert await other.result() == {}
            assert not lost

    asyncio.run(attempt())


@pytest.mark.parametrize("payload", [b'{"hello":%s}' % (b"1" * 5000), b'{"user":"\\ud800"}'])
def test_a_hello_that_cannot_be_used_is_told_at_once(payload: bytes) -> None:
    async def attempt() -> None:
        async with linked() as (link, host, lost):
            await host.say(wire.frame(0, wire.EVENT, payload))
            with pytest.raises(InvalidRuntimeError, match="host1"):
                await asyncio.wait_for(link.started, 10)
            assert not lost
            await host.say(wire.frame(0, wire.EVENT, payload))
            with pytest.raises(ConnectionLostError):
                await asyncio.wait_for(link.open_channel("ping", {}).result(), 10)

    asyncio.run(attempt())


@pytest.mark.parametrize(
    "message", [{"a": 2**64 - 1, "b": -(2**63)}, {"a": 1e300, "b": -0.0}, {"name": "\udc80\udcff"}, {"a": "\U0001f600"}]
)
def test_what_an_agent_may_say_is_left_as_it_is(message: dict[str, Any]) -> None:
    assert agent_replies.decoded(json.dumps(message).encode()) == message


@pytest.mark.parametrize("kind", [wire.EVENT, wire.OUTPUT])
def test_who_is_told_what_cannot_be_handled_does_not_wait_for_ever(kind: int) -> None:
    """The request is given up, on both sides; the others go on."""

    async def attempt() -> None:
        async with linked() as (link, host, lost):
            channel = link.open_channel("pool", {}, event=lambda said: said["x"], output=lambda data: [][len(data)])
            other = link.open_channel("ping", {})
            await host.say(wire.json_frame(1, kind, {"y": "\x1b[2J"}) + wire.json_frame(2, wire.RESULT, {"ok": True}))
            with pytest.raises(AgentError, match="is invalid"):
                await asyncio.wait_for(channel.result(), 10)
            assert await other.result() == {}
            assert not lost
            os.set_blocking(host.fd_in, False)
            assert b'{"abandon":true}' in os.read(host.fd_in, 65536)

    asyncio.run(attempt())


@pytest.mark.parametrize(
    "said",
    [
        {"ready": True}, {"ready": True, "workers": 0}, {"ready": True, "workers": [None]}, {"workers": 2},
        {"back": [[]]}, {"died": {"signal": "x"}, "number": 1, "at": 0, "innocent": False},
        {"died": {"signal": None}, "number": 1, "at": None, "innocent": False},
    ],
)  # fmt: skip
def test_nobody_waits_for_workers_that_make_no_sense(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    received = Channel.received

    def changed(self: Channel, kind: int, payload: bytes) -> None:
        hostile = kind == wire.EVENT and b'"ready"' in payload
        received(self, kind, json.dumps(said).encode() if hostile else payload)

    monkeypatch.setattr(Channel, "received", changed)
    with RuntimeGroup([LocalRuntime()]) as group, pytest.raises(AgentError, match="is invalid"):
        list(group.map(abs, range(3), timeout=20))


def test_logs_do_not_steer_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    """What ssh and the host's session print goes there, too."""
    event_loop.get_loop()
    logging.getLogger("lazycluster").warning("%s: the link is interrupted: %s\x9b", "host1", "\x1b]0;title\x07 gone")
    logging.getLogger("lazycluster").warning("50 %% of %d", 7)
    assert [record.getMessage() for record in caplog.records] == [
        "host1: the link is interrupted: \\x1b]0;title\\x07 gone\\x9b",
        "50 % of 7",
    ]


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
    assert AgentInfo.parse(json.loads(json.dumps(_HELLO))).python == (3, 11, 2)
    with pytest.raises(ValueError, match=next(iter(change))):
        AgentInfo.parse({**_HELLO, **change})
    with pytest.raises(ValueError, match="python"):
        AgentInfo.parse({})
