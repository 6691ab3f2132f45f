"""How long a host dials, in a probe of which hosts reach each other, and how long the manager waits for it."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster.agent import reachability as on_host
from lazycluster.runtime import reachability
from lazycluster.runtime.reachability import ProbedHost, _Party


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


def test_a_host_dials_on_as_long_as_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least six seconds, after them while answers come each second, and not longer than twenty."""
    loop, events = _Loop(), list[dict[str, Any]]()
    monkeypatch.setattr(on_host, "time", SimpleNamespace(monotonic=lambda: loop.now))
    monkeypatch.setattr(on_host._Dial, "begin", lambda dial, on_end: setattr(dial, "_on_end", on_end))
    params = {"me": 0, "key": "00", "ports": []}
    channel: Any = SimpleNamespace(params=params, loop=loop, event=lambda **event: events.append(event))
    on_host._Participant(channel)
    channel.on_control({"dial": [[peer, f"10.0.{peer}.1", [25001], []] for peer in range(1, 100)]})
    (participant,) = {callback.__self__ for _, callback in loop.timers}
    dials = participant._open

    def answered() -> None:
        next(iter(dials))._end("")

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
