"""GPUs as the agent sees them, with a stand-in for nvidia-smi."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fakegpus
from changedagents import changed
from lazycluster.agent import gpus, processes
from lazycluster.agent.loop import Loop
from lazycluster.core import event_loop
from lazycluster.exceptions import AgentError
from lazycluster.ssh.local_connection import LocalConnection

_SHOW = "env | grep ^CUDA; echo up; exec sleep 1000"


def with_agent(body: Callable[[LocalConnection], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        connection = LocalConnection()
        await connection.open()
        try:
            return await body(connection)
        finally:
            await connection.close()

    return event_loop.run(whole(), timeout=60)


def _env(directory: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{directory}:{os.environ['PATH']}", **more}


def _ask(directory: Path, *, idle: bool = False, **more: str) -> dict[str, Any]:
    return dict(with_agent(lambda connection: connection.request("gpus", env=_env(directory, **more), idle=idle)))


def _ids(answer: dict[str, Any]) -> list[str]:
    return [gpu["id"] for gpu in answer["gpus"]]


# --- what there is -------------------------------------------------------------------------------
def test_gpus_are_told_with_what_is_known_of_them(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, [fakegpus.row(0, 17), fakegpus.row(1, "[N/A]")])

    async def body(connection: LocalConnection) -> Any:
        return await connection.request("info", env=_env(tmp_path))

    info = with_agent(body)
    assert info["gpu_problem"] == ""
    first, second = info["gpus"]
    assert (first["index"], first["name"], first["uuid"]) == (0, fakegpus.NAME, fakegpus.uuid(0))
    assert (first["memory"], first["memory_used"], first["utilization"]) == (40960, 17, 0)
    assert (second["memory"], second["memory_used"]) == (40960, None)


def test_an_old_driver_is_asked_again_in_words_that_it_knows(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, 1)
    (tmp_path / "old").touch()
    assert _ids(_ask(tmp_path)) == ["0"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("#!/bin/sh\necho 'No devices were found'; exit 6", r"No devices were found \(exit status 6\)"),
        ("#!/bin/sh\necho 'Failed to initialize NVML: Insufficient Permissions' >&2; exit 4", "Insufficient Permis"),
        ("#!/bin/sh\nhead -c 3000000 /dev/zero", "not understood"),
        ("#!/bin/sh\nyes 1, 2", "did not answer within"),
        ("#!/bin/sh\necho ²,²,²,²,²,²,²; echo $(printf %5000s | tr ' ' 9),a,b,c,d,e,f", "not understood"),
        ("#!/bin/sh\nkill -9 $$", "signal 9"),
        ("#!/bin/sh\ntrue", "no GPU"),
        ("no program at all", "cannot be started: Exec format error"),
        ("#!/bin/sh\nsleep 1000 & sleep 1000", "did not answer within"),
    ],
)
def test_a_program_that_tells_of_no_gpu(text: str, problem: str, tmp_path: Path) -> None:
    fakegpus.program(tmp_path, text + "\n")
    limit = "_LIMIT = 1.0" if "within" in problem else "_LIMIT = 20.0"
    with changed(tmp_path, ("gpus", "_LIMIT = 20.0", limit)):
        answer = _ask(tmp_path)
    assert answer["gpus"] == []
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(answer["problem"])


def test_without_the_program_there_is_no_gpu(tmp_path: Path) -> None:
    answer = dict(with_agent(lambda connection: connection.request("gpus", env={"PATH": str(tmp_path)})))
    assert answer == {"gpus": [], "problem": "nvidia-smi is not on the PATH"}


def test_one_question_serves_all_who_ask_meanwhile(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, 1)

    async def body(connection: LocalConnection) -> Any:
        return await asyncio.gather(*(connection.request("gpus", env=_env(tmp_path)) for _ in range(20)))

    assert {gpu["id"] for answer in with_agent(body) for gpu in answer["gpus"]} == {"0"}
    assert len((tmp_path / "calls").read_text().splitlines()) < 5


@pytest.mark.parametrize(
    ("limits", "ids"),
    [
        ("2,0", ["2", "0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,7,0", ["1"]),  # as for CUDA, what does not exist ends the list
        ("1,1,0", ["1"]),
        (f"{fakegpus.uuid(2)}, 0", [fakegpus.uuid(2), "0"]),
        ("GPU-00000001", ["GPU-00000001"]),
    ],
)
def test_an_inherited_choice_narrows_it_down(limits: str, ids: list[str]) -> None:
    found, problem = gpus.visible(gpus.parse("\n".join(map(fakegpus.row, range(3)))), limits)
    assert [gpu["id"] for gpu in found] == ids
    assert bool(problem) is (not ids)


_PARTS = f"""GPU 0: NVIDIA A100-SXM4-40GB (UUID: {fakegpus.uuid(0)})
  MIG 3g.20gb     Device  0: (UUID: MIG-11111111-2222-3333-4444-555555555555)
  MIG 1g.5gb      Device  1: (UUID: MIG-GPU-4404041a-04cf-1ccf-9e70-f139a9b1e23c/1/0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {fakegpus.uuid(1)})
GPU 2: NVIDIA A100-SXM4-40GB (UUID: {fakegpus.uuid(2)})
"""


def test_a_divided_gpu_is_told_in_parts(tmp_path: Path) -> None:
    # The third is to be divided, but is not: nothing can run there.
    fakegpus.stand_in(
        tmp_path, [fakegpus.row(0, divided=True), fakegpus.row(1), fakegpus.row(2, divided=True)], parts=_PARTS
    )
    answer = _ask(tmp_path)
    first, second = "MIG-11111111-2222-3333-4444-555555555555", "MIG-GPU-4404041a-04cf-1ccf-9e70-f139a9b1e23c/1/0"
    assert _ids(answer) == [first, second, "1"]
    assert [gpu["memory"] for gpu in answer["gpus"]] == [20480, 5120, 40960]
    assert answer["gpus"][0]["name"] == f"{fakegpus.NAME} MIG 3g.20gb"
    assert _ids(_ask(tmp_path, CUDA_VISIBLE_DEVICES="MIG-1111,1")) == [first, "1"]


def test_gpus_that_others_use_are_known(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, [fakegpus.row(0), fakegpus.row(1, 30000), fakegpus.row(2)], apps=[fakegpus.uuid(2)])
    assert [gpu["busy"] for gpu in _ask(tmp_path)["gpus"]] == ["", "", ""]
    busy = [gpu["busy"] for gpu in _ask(tmp_path, idle=True)["gpus"]]
    assert busy == ["", "30000 MB of its memory are used", "a program computes on it"]


# --- who gets which ------------------------------------------------------------------------------
class _Running:
    """A service that runs."""

    def __init__(self, channel: Any, ended: asyncio.Future[Any]) -> None:
        self._channel, self._ended = channel, ended

    async def end(self, signal: str) -> None:
        """End it by a signal, or by "END"."""
        self._channel.control(signal=signal)
        await self._ended


class _Services:
    """Services that want GPUs, on one agent."""

    def __init__(self, connection: LocalConnection, directory: Path) -> None:
        self._connection, self._directory = connection, directory

    async def start(self, name: str, count: Any = 1, idle: bool = False, **env: str) -> tuple[_Running, list[str]]:
        """Start one; returns it, and what it has of CUDA in its environment."""
        said = bytearray()
        up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def event(message: dict[str, Any]) -> None:
            if message["state"] == "ready" and not up.done():
                up.set_result(None)

        params = {
            "argv": ["/bin/sh", "-c", _SHOW],
            "ready": "up",
            "task": name,
            "env": _env(self._directory, **env),
            "gpus": {"count": count, "idle": idle},
        }
        channel = self._connection.channel("service", params, stdout=said.extend, event=event)
        ended = asyncio.ensure_future(channel.result())
        await asyncio.wait([up, ended], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        return _Running(channel, ended), [line for line in said.decode().split("\n") if line.startswith("CUDA")]


def _visible(told: list[str]) -> str:
    return next(line.partition("=")[2] for line in told if line.startswith(gpus.VISIBLE))


def test_no_gpu_is_given_twice_and_ended_work_gives_it_back(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, 4)

    async def body(connection: LocalConnection) -> None:
        services = _Services(connection, tmp_path)
        (first, told), *rest = await asyncio.gather(services.start("a", 2), services.start("b"), services.start("c"))
        given = [_visible(told).split(","), *(_visible(other).split(",") for _, other in rest)]
        assert sorted(number for numbers in given for number in numbers) == ["0", "1", "2", "3"]
        assert sorted(map(len, given)) == [1, 1, 2]
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in told
        with pytest.raises(AgentError, match="too few are free") as caught:
            await services.start("d")
        assert caught.value.kind == "gpu"
        assert "used by a" in str(caught.value)
        await first.end("END")
        _, again = await services.start("d", 2)
        assert sorted(_visible(again).split(",")) == sorted(given[0])

    with_agent(body)


def test_work_that_dies_keeps_its_gpu_until_it_is_given_up(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, 1)

    async def body(connection: LocalConnection) -> None:
        services = _Services(connection, tmp_path)
        running, _ = await services.start("a")
        with pytest.raises(AgentError, match="it ended"):
            await running.end("KILL")
        await services.start("b")

    with_agent(body)


def test_idle_ones_only(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, [fakegpus.row(0, 9000), fakegpus.row(1)])

    async def body(connection: LocalConnection) -> None:
        services = _Services(connection, tmp_path)
        _, told = await services.start("a", idle=True)
        assert _visible(told) == "1"
        with pytest.raises(AgentError, match=r"0: 9000 MB of its memory are used; 1: used by a"):
            await services.start("b", idle=True)
        _, told = await services.start("c")
        assert _visible(told) == "0"

    with_agent(body)


def test_a_choice_that_was_made_for_the_host_is_kept(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, 3)

    async def body(connection: LocalConnection) -> None:
        services = _Services(connection, tmp_path)
        _, told = await services.start("a", CUDA_VISIBLE_DEVICES="2")
        assert told == ["CUDA_VISIBLE_DEVICES=2"]  # and no order, by which the number would mean another one
        with pytest.raises(AgentError, match="2: used by a"):
            await services.start("b", CUDA_VISIBLE_DEVICES="2")

    with_agent(body)


@pytest.mark.parametrize("count", [0, -1, True, "1", 1.5])
def test_a_number_of_gpus_that_makes_no_sense(count: Any, tmp_path: Path) -> None:
    async def body(connection: LocalConnection) -> None:
        with pytest.raises(AgentError, match="integer of at least 1"):
            await _Services(connection, tmp_path).start("a", count)

    with_agent(body)


def test_work_that_is_ended_while_it_waits_for_its_gpu(tmp_path: Path) -> None:
    fakegpus.stand_in(tmp_path, 1)

    async def body(connection: LocalConnection) -> None:
        params = {"argv": ["/bin/sleep", "1000"], "task": "a", "env": _env(tmp_path), "gpus": {"count": 1}}
        channel = connection.channel("service", params)
        channel.control(signal="END")
        await channel.result()
        await _Services(connection, tmp_path).start("b")

    with_agent(body)


# --- a driver that hangs -------------------------------------------------------------------------
def test_nothing_more_is_asked_while_a_call_that_was_killed_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told = Loop(), []
    host = gpus.HostGpus(SimpleNamespace(loop=loop))  # type: ignore[arg-type]
    monkeypatch.setattr(gpus, "_LIMIT", 0.2)
    monkeypatch.setattr(gpus, "ask", lambda env, users: time.sleep(1000))
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: None)  # as where the driver does not let it end
    children = processes.children_of(os.getpid())

    def ask() -> str:
        before = len(told)
        host.answers.clear()
        host.survey({"PATH": "/none"}, False, lambda found, problem: told.append(problem))
        loop.call_later(10, lambda: told.append("no answer"))
        while len(told) == before:
            loop._round()
        return told[-1]

    assert ask() == "nvidia-smi did not answer within 0.2 s"
    assert "an earlier call of it was killed and has not ended yet" in ask()
    monkeypatch.setattr(os, "kill", kill)
    (child,) = set(processes.children_of(os.getpid())) - set(children)
    kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while host._hanging and time.monotonic() < deadline:
        loop._round()
    monkeypatch.setattr(gpus, "ask", lambda env, users: {"gpus": [], "problem": "none"})
    assert ask() == "none"
    os.waitpid(-1, 0)
