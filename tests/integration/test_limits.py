"""Limits of a task: memory, processor time, wall time. What reaches one is ended, and told which it was."""

from __future__ import annotations

import copy
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from filetrees import make_large
from lazycluster import RuntimeGroup, RuntimeTask
from lazycluster.agent import oom
from lazycluster.exceptions import TaskExecutionError
from lazycluster.runtimes import LocalRuntime
from lazycluster.tasks.limits import Limits, memory_hint


@pytest.fixture
def runtime() -> Iterator[LocalRuntime]:
    with LocalRuntime() as runtime:
        yield runtime


def _fails(runtime: LocalRuntime, task: RuntimeTask) -> TaskExecutionError:
    with pytest.raises(TaskExecutionError) as caught:
        runtime.execute_task(task, execute_async=False)
    return caught.value


def _fill(size: int) -> int:
    return len(bytearray(size))


def _spin() -> None:
    while True:
        pass


def test_memory_of_a_function(runtime: LocalRuntime) -> None:
    """What counts is what the call takes, whatever its interpreter has mapped before."""
    assert runtime.execute_task(
        RuntimeTask("fits").run_function(_fill, size=50_000_000).limit(memory="100 MB"), execute_async=False
    ).result() == 50_000_000  # fmt: skip
    error = _fails(runtime, RuntimeTask("more").run_function(_fill, size=200_000_000).limit(memory="100 MB"))
    assert "memory limit of 100000000 bytes" in str(error) and "limit()" in str(error)
    assert isinstance(error.__cause__, MemoryError)
    assert runtime.call(_fill, 200_000_000) == 200_000_000  # the limit was the task's


def test_memory_of_a_command(runtime: LocalRuntime) -> None:
    command = "python3 -c 'print(len(bytearray(10**9)))'"
    error = _fails(runtime, RuntimeTask("more").run_command(command).limit(memory="500 MB"))
    assert "its memory is limited to 500000000 bytes" in str(error)
    assert "MemoryError" in error.output
    task = RuntimeTask("fits").run_command("ulimit -v; ulimit -Hv; echo $0; echo 'it'\"'\"'s'").limit(memory="1 GiB")
    runtime.execute_task(task, execute_async=False)
    assert task.execution_log[0].split("\n")[:2] == ["1048576", "1048576"]
    assert task.execution_log[0].endswith("it's\n")


@pytest.mark.parametrize("kind", ["function", "command"])
def test_processor_time(runtime: LocalRuntime, kind: str) -> None:
    task = RuntimeTask("spin").limit(cpu_time=1)
    task = task.run_function(_spin) if kind == "function" else task.run_command("while :; do :; done")
    error = _fails(runtime, task)
    assert "used up its cpu_time of 1 s" in str(error)
    assert error.exit_status == -signal.SIGXCPU


@pytest.mark.parametrize("kind", ["function", "command", "second step"])
def test_wall_time(runtime: LocalRuntime, kind: str) -> None:
    task = RuntimeTask("sleep").limit(wall_time=0.5)
    if kind == "function":
        task.call(time.sleep, 60)
    else:
        if kind == "second step":
            task.run_command("true")
        task.run_command("(setsid sleep 7777 &) ; sleep 7776")
    error = _fails(runtime, task)
    assert "wall_time of 0.5 s" in str(error)
    left = runtime.call(_commands)
    assert not [line for line in left if "7776" in line or "7777" in line]


def _commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return [line for line in found if line.startswith("sleep")]


def test_wall_time_of_a_copy(runtime: LocalRuntime, tmp_path: Path) -> None:
    large = make_large(tmp_path / "huge")
    task = RuntimeTask("send").send_file(large, str(tmp_path / "there")).limit(wall_time=0.5)
    assert "wall_time of 0.5 s" in str(_fails(runtime, task))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge"]


def test_a_task_within_its_limits_is_as_ever(runtime: LocalRuntime) -> None:
    task = RuntimeTask("all").limit(memory="1 GB", cpu_time=20, wall_time=60)
    task.run_command("echo one").call(sum, [1, 2])
    runtime.execute_task(task, execute_async=False)
    assert task.execution_log[0] == "one\n"
    assert task.result() == 3
    missing = _fails(runtime, RuntimeTask("no").run_command("no-such-command").limit(cpu_time=5))
    assert missing.exit_status == 127


def test_limits_go_with_the_task() -> None:
    task = RuntimeTask("x").run_command("true").limit(memory=1 << 30, cpu_time=1.5, wall_time=3)
    assert task.limits == Limits(1 << 30, 2, 3.0)
    for other in (copy.copy(task), copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert other.limits == task.limits
    with RuntimeGroup([LocalRuntime(host="one"), LocalRuntime(host="two")]) as group:
        broadcast = group.execute_task(RuntimeTask("y").call(time.sleep, 60).limit(wall_time=0.3), broadcast=True)
        for one in broadcast:
            with pytest.raises(TaskExecutionError, match="wall_time"):
                one.join()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"memory": "much"}, ValueError), ({"memory": 0}, ValueError), ({"memory": "1 KB"}, ValueError),
        ({"memory": True}, TypeError), ({"memory": []}, TypeError), ({"memory": "-5 GB"}, ValueError),
        ({"cpu_time": 0}, ValueError), ({"cpu_time": "1"}, TypeError), ({"wall_time": -1}, ValueError),
        ({"wall_time": float("nan")}, ValueError), ({"wall_time": float("inf")}, ValueError),
    ],
)  # fmt: skip
def test_limits_that_make_no_sense(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(given))):
        RuntimeTask("x").limit(**given)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2 GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("500m", 5 * 10**8), (2**21, 2**21), ("2097152", 2**21)],
)
def test_sizes(text: Any, size: int) -> None:
    assert RuntimeTask("x").limit(memory=text).limits.memory == size


def test_what_the_system_tells_of_processes_that_it_ended(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    group = tmp_path / "sys/fs/cgroup/user/mine"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/mine\n")
    (tmp_path / "proc/vmstat").write_text("nr_free 1\noom_kill 4\n")
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    before = oom.killed(str(tmp_path))
    assert before == (2, 4)
    (tmp_path / "proc/vmstat").write_text("nr_free 1\noom_kill 5\n")
    assert oom.verdict(before, oom.killed(str(tmp_path))) == "host"
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 3\n")
    assert oom.verdict(before, oom.killed(str(tmp_path))) == "limit"
    assert oom.verdict(before, before) == ""
    assert oom.killed(str(tmp_path / "nothing")) == (None, None)
    assert oom.verdict((None, None), (1, 1)) == ""
    old = tmp_path / "sys/fs/cgroup/memory/job"
    old.mkdir(parents=True)
    (old / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    (tmp_path / "proc/self/cgroup").write_text("11:memory:/job\n1:name=systemd:/x\n")
    assert oom.killed(str(tmp_path)) == (7, 5)


def test_a_killed_process_is_told_of(runtime: LocalRuntime) -> None:
    error = _fails(runtime, RuntimeTask("x").run_command("kill -9 $$"))
    assert "SIGKILL" in str(error) and "memory" in str(error)
    assert {memory_hint(verdict) for verdict in ("limit", "host", "")} and "control group" in memory_hint("limit")
