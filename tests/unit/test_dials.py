"""How long a host dials, in a probe of which hosts reach each other, and how long the manager waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import resource
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster.agent import reachability as on_host
from lazycluster.agent.loop import Loop
from lazycluster.runtime import reachability
from lazycluster.runtime.reachability import ProbedHost, _Party

_NETWORK = f"127.{1 + os.getpid() // 250 % 250}.{os.getpid() % 250}"  # of this process alone


class _Dialing:
    """A connection to a host that says again and again that it is still answered, and then what it has found, if ever.

    Attributes:
        asked: How often it was told to dial.
    """

    def __init__(self, times: float) -> None:
        self._times, self._left = times, times
        self.asked = 0

    def channel(self, op: str, params: Any, event: Any) -> _Dialing:
        self._event = event
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        event({"state": "listening", "addresses": ["10.0.0.1"], "own": ["10.0.0.1"], "taken": [], "problem": ""})
        return self

    def control(self, dial: Any) -> None:
        self.asked += 1
        self._left = self._times
        self._say()

    def _say(self) -> None:
        self._left -= 1
        if self._left < 0:
            self._event({"state": "dialed", "failed": [], "translated": []})
        else:
            self._event({"state": "dialing"})
            self._timer = asyncio.get_running_loop().call_later(0.05, self._say)

    async def result(self) -> None:
        await asyncio.shield(self._ended)

    def close(self) -> None:
        self._timer.cancel()


@pytest.mark.parametrize(("times", "problem"), [(12, ""), (math.inf, "it has not finished dialing within")])
def test_a_host_that_is_still_answered_is_waited_for(
    times: float, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not by whoever says so without end."""
    monkeypatch.setattr(reachability, "_ROUND_LIMIT", 0.3)
    monkeypatch.setattr(reachability, "_STILL_LIMIT", 0.3)
    monkeypatch.setattr(reachability, "_LONGEST_ROUND", 1.5)

    async def dial() -> _Party:
        party = _Party(0, ProbedHost("host", _Dialing(times), (25001,)), "00")  # type: ignore[arg-type]
        await party.listen()
        await party.dial([])
        party.close()
        return party

    said = asyncio.run(dial()).problem
    assert said.startswith(problem) if problem else not said


class _Loop:
    """A loop whose time is what the test says; timers are called by it, too."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Any]] = []

    def call_later(self, seconds: float, callback: Any) -> Any:
        self.timers.append((seconds, callback))
        return SimpleNamespace(cancel=lambda: None)

    def watch(self, fd: int, callback: Any = None) -> None:
        """Nothing happens here but what the test does."""

    add_reader = add_writer = remove_reader = remove_writer = watch


def test_a_host_dials_on_as_long_as_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least six seconds, after them while answers come each second, and not longer than twenty."""
    loop, events = _Loop(), list[dict[str, Any]]()
    monkeypatch.setattr(on_host, "time", SimpleNamespace(monotonic=lambda: loop.now))
    monkeypatch.setattr(on_host._Dial, "begin", lambda dial: setattr(dial, "since", loop.now))
    monkeypatch.setattr(on_host._Dial, "look", lambda dial: dial.is_over)
    monkeypatch.setattr(on_host._Dial, "fileno", lambda dial: 0)
    params = {"me": 0, "key": "00", "ports": []}
    channel: Any = SimpleNamespace(params=params, loop=loop, event=lambda **event: events.append(event))
    monkeypatch.setattr(on_host, "interface_addresses", list)
    on_host._Participant(channel)
    channel.on_control({"dial": [[peer, f"10.{peer // 250}.{peer % 250}.1", [25001], []] for peer in range(1, 2000)]})
    (participant,) = {callback.__self__ for _, callback in loop.timers}
    dials = participant._open

    def answered() -> None:
        next(iter(dials))._end("")
        participant._go_on()

    seconds, late = loop.timers[1]
    assert seconds == 6.0
    loop.now += 5.5
    answered()
    loop.now += 0.5
    late()
    assert (events[-1], loop.timers[-1]) == ({"state": "dialing"}, (pytest.approx(0.5), late))
    for _ in range(28):
        loop.now += 0.5
        answered()
        late()
    assert loop.now == 120.0
    assert events[-1]["state"] == "dialed"
    assert {why for *_, why in events[-1]["failed"]} == {"not tried", "no answer"}
    assert [event["state"] for event in events] == ["listening", *["dialing"] * 28, "dialed"]


class _Channel:
    """What a host of a probe has of its manager: all hosts of a test are in one loop."""

    def __init__(self, loop: Loop, index: int, ports: Sequence[int]) -> None:
        self.loop = loop
        self.params = {"me": index, "key": "07" * 32, "ports": list(ports), "address": f"{_NETWORK}.{index}"}
        self.on_control: Any = None
        self.on_abandon: Any = None
        self.dialed: dict[str, Any] = {}

    def event(self, **event: Any) -> None:
        if event["state"] == "dialed":
            self.dialed = event


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    try:
        yield loop
    finally:
        loop._poller._poll.close()
        os.close(loop._wake_read)
        os.close(loop._wake_write)


@contextmanager
def dialing(
    loop: Loop, numbers: Iterable[int], monkeypatch: pytest.MonkeyPatch, ports: Sequence[int] = (25001,)
) -> Iterator[list[_Channel]]:
    """Have some hosts listen, which are in one process."""
    channels = [_Channel(loop, number, ports) for number in numbers]
    try:
        for channel in channels:
            monkeypatch.setattr(on_host, "interface_addresses", lambda own=channel.params["address"]: [own])
            on_host.reach(channel)  # type: ignore[arg-type]
        yield channels
    finally:
        for channel in channels:
            channel.on_abandon()


def run(loop: Loop, channels: list[_Channel]) -> None:
    """Run the loop until all have dialed."""
    while not all(channel.dialed for channel in channels):
        loop._round()


def test_who_is_answered_by_many_wakes_up_for_few(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    count, watched = 40, []
    watch = on_host._Participant._watch

    def counted(participant: on_host._Participant, dial: on_host._Dial) -> None:
        watched.append(dial)
        watch(participant, dial)

    monkeypatch.setattr(on_host._Participant, "_watch", counted)
    with dialing(loop, range(1, count + 1), monkeypatch) as channels:
        dial = [[number, f"{_NETWORK}.{number}", [25001], []] for number in range(1, count + 1)]
        for channel in channels:
            channel.on_control({"dial": dial})
        run(loop, channels)
    assert len(watched) < count * (count - 1) / 3  # two to four times for each 32 dials, on a busy machine more often
    assert all(channel.dialed == {"state": "dialed", "failed": [], "translated": []} for channel in channels)


def test_a_host_without_descriptors_waits_for_them(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers once there are some, and does not ask for them again and again."""
    with dialing(loop, [15], monkeypatch) as (channel,), socket.socket() as caller:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as next_one:
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_one.fileno(), before[1]))
        try:
            caller.connect((f"{_NETWORK}.15", 25001))
            caller.sendall(on_host._Key(channel.params["key"]).question(bytes(16)))
            rounds, end = 0, time.monotonic() + 0.5
            while time.monotonic() < end:
                loop._round()
                rounds += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert rounds < 20
        caller.setblocking(False)
        while not has_answer(caller):
            loop.call_later(0.05, lambda: None)
            loop._round()


def test_a_host_that_knows_no_address_of_its_own_listens_at_what_was_stated(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = _Channel(loop, 15, [25001])
    monkeypatch.setattr(on_host, "interface_addresses", list)
    on_host.reach(channel)  # type: ignore[arg-type]
    try:
        with socket.create_connection((f"{_NETWORK}.15", 25001)):
            pass
    finally:
        channel.on_abandon()


def test_those_who_have_been_answered_make_room_for_others(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their connections are kept a while, of all ports together, and not for want of others."""
    monkeypatch.setattr(on_host, "_MOST_ANSWERED", 6)
    question = on_host._Key("07" * 32).question(bytes(16))
    with ExitStack() as stack:
        (channel,) = stack.enter_context(dialing(loop, [15], monkeypatch, [25001, 25002]))
        asking = [stack.enter_context(socket.socket()) for _ in range(12)]

        def ask(callers: list[socket.socket]) -> None:
            for index, caller in enumerate(callers):
                caller.connect((f"{_NETWORK}.15", 25001 + index % 2))
                caller.sendall(question)
                caller.setblocking(False)
            missing = set(callers)
            while missing:
                loop.call_later(0.05, lambda: None)
                loop._round()
                missing -= {caller for caller in callers if caller in missing and has_answer(caller)}

        ask(asking[:8])
        assert len(channel.on_abandon.__self__._callers) == 6
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as next_one:
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_one.fileno(), limits[1]))
        try:
            ask(asking[8:])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def has_answer(caller: socket.socket) -> bool:
    try:
        return len(caller.recv(100)) == on_host._ANSWER_SIZE
    except BlockingIOError:
        return False


_FOUND = {"silent": "no answer", "other": "other program", "refused": "refused", "mistaken": "host 15"}


@pytest.mark.parametrize("last", [*_FOUND, "service", "right"])
def test_whatever_is_dialed_last_each_is_found_out(last: str, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop watches the last one alone."""
    monkeypatch.setattr(on_host, "_DIAL_LIMIT", 1.0)
    monkeypatch.setattr(on_host, "_AGAIN_LIMIT", 0.5)
    order = sorted([*_FOUND, "service", "right"], key=lambda name: name == last)
    numbers = {name: 15 if name == "right" else order.index(name) * 10 + 1 for name in order}
    with ExitStack() as stack:
        dialer, _ = stack.enter_context(dialing(loop, [0, 15], monkeypatch))
        full, other, service = (
            stack.enter_context(socket.create_server((f"{_NETWORK}.99", 0), backlog=0)) for _ in "123"
        )
        for _ in range(3):  # whoever comes after them is not answered
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())

        def greet() -> None:
            with other.accept()[0] as connection, contextlib.suppress(OSError):  # who gave up before
                connection.sendall(b"SSH-2.0-other, and some more that is no answer of ours\r\n")

        loop.add_reader(other.fileno(), greet)
        ports: dict[str, tuple[str, list[int], list[int]]] = {
            "silent": (f"{_NETWORK}.99", [full.getsockname()[1]], []),
            "other": (f"{_NETWORK}.99", [other.getsockname()[1]], []),
            "service": (f"{_NETWORK}.99", [], [service.getsockname()[1]]),
            "refused": (f"{_NETWORK}.98", [25001], [25002]),
            "mistaken": (f"{_NETWORK}.15", [25001], []),
            "right": (f"{_NETWORK}.15", [25001], []),
        }
        dialer.on_control({"dial": [[numbers[name], *ports[name]] for name in order]})
        run(loop, [dialer])
        loop.remove_reader(other.fileno())
    failed = {(number, port, why) for number, _, port, why in dialer.dialed["failed"]}
    assert failed == {
        (numbers[name], port, why) for name, why in _FOUND.items() for port in [*ports[name][1], *ports[name][2]]
    }
