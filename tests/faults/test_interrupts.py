"""Ctrl-C at whatever moment: what it hits ends; all can be used, or cleaned up, as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup, RuntimeTask
from lazycluster.core import event_loop
from patience import until

pytestmark = pytest.mark.timeout(100, method="thread")  # the other one needs the signal that is used here

_SPAN = 1.5  # seconds for which a test interrupts


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _alarm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a signal raise `KeyboardInterrupt`, as Ctrl-C does."""
    event_loop.get_loop()
    before = signal.signal(signal.SIGALRM, _interrupt)
    # Python drops what is raised in the callback of a weak reference; and a coroutine may not yet be anybody's.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupted(work: Callable[[], Any], most: float) -> None:
    """Do something, and interrupt it within some seconds, unless it ends before."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, most))
            work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass


def again_and_again(work: Callable[[], Any], most: float) -> None:
    end = time.monotonic() + _SPAN
    while time.monotonic() < end:
        interrupted(work, most)


@pytest.fixture
def group() -> Iterator[RuntimeGroup]:
    with RuntimeGroup([LocalRuntime(host=name) for name in ("one", "two")]) as group:
        yield group


def test_nothing_goes_on_that_nobody_waits_for() -> None:
    """When `run` has been left, its coroutine has ended, or was never begun."""
    under_way = [0]

    async def work() -> None:
        under_way[0] += 1
        try:
            for _ in range(20):
                await asyncio.sleep(0)
        finally:
            under_way[0] -= 1

    def check() -> None:
        try:
            event_loop.run(work())
        except KeyboardInterrupt:
            assert event_loop.submit(asyncio.sleep(0, 1)).result() == 1  # what was begun before has begun
            assert under_way == [0]
            raise

    again_and_again(check, 0.0004)
    assert under_way == [0]


def test_calls(group: RuntimeGroup) -> None:
    runtime = group.runtimes[0]
    again_and_again(lambda: runtime.call(abs, -1), 0.004)
    assert runtime.call(abs, -1) == 1
    until(lambda: not runtime.alive_task_process_count, "all of them to have ended")


def test_map_and_executor(group: RuntimeGroup) -> None:
    """The workers are kept from one `map` to the next; what was interrupted is no reason to wait for ever."""
    end = time.monotonic() + _SPAN
    assert list(group.map(abs, range(10))) == list(range(10))
    kept = group._kept_executor()
    while time.monotonic() < end:
        interrupted(lambda: list(group.map(abs, range(50))), 0.004)
        interrupted(lambda: [kept.submit(abs, number) for number in range(100)], 0.0004)
        assert list(group.map(abs, range(10))) == list(range(10))
    kept.shutdown()  # it waits for all that was submitted


@pytest.mark.soak
def test_an_executor_that_begins(group: RuntimeGroup) -> None:
    end = time.monotonic() + _SPAN
    while time.monotonic() < end:
        with group.executor(workers_per_host=1) as executor:
            interrupted(lambda: executor.submit(abs, 1), 0.001)
            assert executor.submit(abs, -2).result(timeout=60) == 2


@pytest.mark.soak
def test_a_clean_up_can_be_done_again() -> None:
    for _ in range(4):
        group = RuntimeGroup([LocalRuntime(host=name) for name in ("one", "two")])
        agents = [runtime._connection.agent_info.pid for runtime in group.runtimes]
        group.execute_task(
            RuntimeTask("stubborn").run_command("trap '' INT TERM; sleep 7400 & wait; wait"), broadcast=True
        )
        interrupted(group.cleanup, 0.3)
        group.cleanup()
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in agents), "the agents to have ended")  # noqa: B023
