"""What is begun together ends together, with all that it does at its end, also when it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from lazycluster.core import event_loop
from lazycluster.ssh import workspace

_ROUNDS = 20  # of the event loop


async def _rounds() -> None:
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)


async def _undone(done: list[str]) -> None:
    """Do something until it is cancelled, and take longer than others to undo it."""
    try:
        await asyncio.sleep(600)
    finally:
        await _rounds()
        done.append("undone")


async def _fails() -> None:
    await _rounds()
    raise ValueError("it fails")


async def _cancelled(whole: asyncio.Task[list[None]]) -> None:
    await _rounds()
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole


async def _failed(whole: asyncio.Task[list[None]]) -> None:
    with pytest.raises(ValueError, match="it fails"):
        await whole


@pytest.mark.parametrize("how", [_cancelled, _failed])
def test_all_of_them_have_ended(how: Callable[[asyncio.Task[list[None]]], object]) -> None:
    async def work() -> list[str]:
        done: list[str] = []
        parts = [_undone(done), asyncio.sleep(600), _undone(done), *([_fails()] if how is _failed else [])]
        whole = asyncio.ensure_future(event_loop.together([asyncio.ensure_future(part) for part in parts]))
        await how(whole)  # type: ignore[misc]
        return done

    assert asyncio.run(work()) == ["undone", "undone"]


def test_results_come_in_order() -> None:
    async def work() -> None:
        assert await event_loop.together([]) == []
        tasks = [asyncio.ensure_future(asyncio.sleep(delay, delay)) for delay in (0.01, 0)]
        assert await event_loop.together(tasks) == [0.01, 0]
        assert [event_loop.outcome(task, None) for task in tasks] == [0.01, 0]

    asyncio.run(work())


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_whoever_is_cancelled_twice_keeps_no_workspace(rounds: int) -> None:
    """It goes on ending by itself; else the keeper would stay as long as this process."""

    async def work() -> None:
        acquiring = asyncio.ensure_future(workspace.acquire())
        while not workspace._spaces.get(asyncio.get_running_loop()):
            await asyncio.sleep(0)
        for _ in range(2):
            for _ in range(rounds):
                await asyncio.sleep(0)
            acquiring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await acquiring
        for _ in range(3000):
            if asyncio.all_tasks() == {asyncio.current_task()}:
                break
            await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert asyncio.get_running_loop() not in workspace._spaces

    asyncio.run(work())
