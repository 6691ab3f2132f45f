"""What processes of clusters use: asked from hosts that answer, that do not, and that answer nonsense."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any, cast

import pytest

from lazycluster.agent import processes
from lazycluster.agent import service_usage as agent_usage
from lazycluster.agent.processes import start_time
from lazycluster.cluster.services import Service
from lazycluster.cluster.usage import Meter, ProcessUsage
from lazycluster.core import event_loop
from lazycluster.exceptions import ConnectionLostError


class Host:
    """A connection, whose agent answers when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def request(self, op: str) -> Any:
        assert op == "usage"
        self.asked += 1
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def says(self, time: Any, figures: Any, hertz: Any = 100) -> None:
        self.answers.put_nowait({"services": figures, "time": time, "hertz": hertz})


class Worker:
    """As much of a service as is asked for."""

    def __init__(self, label: str, host: Host, pid: int | None) -> None:
        self.label, self.pid, self.place, self.connection = label, pid, self, host


def _looks(*workers: Worker) -> list[Service]:
    return [cast(Service, worker) for worker in workers]


def test_cpu_is_told_from_the_second_look_on() -> None:
    async def work() -> None:
        host, meter = Host(), Meter()
        services = _looks(Worker("a", host, 7), Worker("b", host, 8), Worker("not started", host, None))
        host.says(10.0, {"7": [100, 4096], "8": [50, 0], "9": [1, 1]})
        assert await meter.look(services, 5) == {"a": ProcessUsage(None, 4096), "b": ProcessUsage(None, 0)}
        host.says(12.0, {"7": [400, 8192], "8": [40, 0]})
        second = {"a": ProcessUsage(150.0, 8192), "b": ProcessUsage(0.0, 0)}
        assert await meter.look(services, 5) == second
        host.says(12.0, {"7": [400, 8192], "8": [40, 0]})  # the host has not looked again
        assert await meter.look(services, 5) == second
        host.says(1.0, {"7": [5, 4096]})  # it was restarted
        assert await meter.look(services, 5) == {"a": ProcessUsage(None, 4096)}

    event_loop.run(work(), 30)


def test_a_silent_host_is_waited_for_once_and_what_it_said_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        silent, fine, meter = Host(), Host(), Meter()
        services = _looks(Worker("a", silent, 1), Worker("b", fine, 2))
        silent.says(1.0, {"1": [0, 1]})
        fine.says(1.0, {"2": [0, 2]})
        assert len(await meter.look(services, 5)) == 2
        fine.says(2.0, {"2": [100, 2]})
        found = await meter.look(services, 0.01)
        assert found == {"a": ProcessUsage(None, 1), "b": ProcessUsage(100.0, 2)}
        fine.says(3.0, {"2": [150, 2]})
        await meter.look(services, 1000)  # that would be too long for this test
        assert silent.asked == 2
        monkeypatch.setattr("lazycluster.cluster.usage._STALE", -1)
        fine.says(4.0, {"2": [150, 2]})
        assert await meter.look(services, 5) == {}
        silent.answers.put_nowait(ConnectionLostError("silent", "it was restarted"))

    event_loop.run(work(), 30)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"services": [1], "time": 3.0, "hertz": 100},
        {"services": {"1": 3}, "time": 3.0, "hertz": 100},
        {"services": {"1": [1, 2, 3]}, "time": 3.0, "hertz": 100},
        {"services": {"2": ["", None]}, "time": "soon", "hertz": {}},
        {"services": {"1": ["", None]}, "time": float("nan"), "hertz": 0},
        {"services": {"1": [10**400, -(10**400)]}, "time": 3, "hertz": 10**400},
    ],
)
def test_nonsense_is_nothing(answer: Any) -> None:
    async def work() -> None:
        host, meter = Host(), Meter()
        host.answers.put_nowait(answer)
        found = await meter.look(_looks(Worker("a", host, 1)), 5)
        assert found == {} or found == {"a": ProcessUsage(None, 0)}

    event_loop.run(work(), 30)


def test_children_are_found_with_and_without_the_help_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            both = [parent.pid, child]
            assert processes.family(parent.pid) == both
            monkeypatch.setattr(processes.os.path, "exists", lambda _: False)
            assert processes.family(parent.pid) == both
            started = start_time(parent.pid)
            assert started is not None
            assert agent_usage.measured(parent.pid, started)[1] > 1 << 20
            assert agent_usage.measured(parent.pid, started + 1) == [0, 0]
        finally:
            subprocess.run(["kill", str(child)], check=True)


def test_an_answer_is_kept_for_a_hundred_times_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Channel:
        def result(self, **fields: Any) -> None:
            told.append(fields["services"])

    now, spent = 1000.0, 0.0

    def measured(pid: int, started: int | None) -> list[int]:
        nonlocal spent
        spent += 0.03
        return [int(now), pid]

    monkeypatch.setattr(agent_usage, "measured", measured)
    monkeypatch.setattr(agent_usage, "_good_until", 0.0)
    monkeypatch.setattr(agent_usage.services, "running", {5: 1, 6: 1})
    monkeypatch.setattr(agent_usage.time, "monotonic", lambda: now)
    monkeypatch.setattr(agent_usage.time, "process_time", lambda: spent)
    for passed in (0.0, 5.9, 0.2):
        now += passed
        agent_usage.usage(cast(Any, Channel()))
    first, second, third = told
    assert first is second and third == {"5": [1006, 5], "6": [1006, 6]}
