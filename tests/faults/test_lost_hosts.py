"""Hosts that are lost while calls and tasks run on them."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup, RuntimeTask
from lazycluster.agent import restart_policy
from lazycluster.agent.guardian import AT_MANAGER_END_FILE
from lazycluster.core import event_loop
from lazycluster.exceptions import HostsLostError, LazyclusterError, TaskExecutionError, WorkerLostError
from lazycluster.pool import remote_pool
from lazycluster.ssh import workspace
from patience import until


@pytest.fixture
def group() -> Iterator[RuntimeGroup]:
    """Three runtimes on this machine."""
    with RuntimeGroup([LocalRuntime(host=name) for name in ("one", "two", "three")]) as group:
        yield group


def lose(group: RuntimeGroup, host: str) -> None:
    os.kill(group.get_runtime(host)._connection.agent_info.pid, signal.SIGKILL)


def end_own_agent(agents: list[int]) -> None:
    """Kill the one of some agents that this process descends from, and wait for the same end."""
    pid = os.getpid()
    while pid not in agents:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)
    time.sleep(600)


def square(x: int) -> int:
    return x * x


# --- the manager's own machine -------------------------------------------------------------------------------
def test_the_keeper_is_replaced(hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody notices; and the next one knows what is to be ended if the manager is killed."""
    with RuntimeGroup(hosts=hosts.names[:1], connection_kwargs={"config_file": hosts.config_file}) as group:
        [runtime] = group.runtimes
        process = runtime._connection._process
        assert process is not None
        space = next(iter(workspace._spaces.values()))
        before = space.keeper.agent_info.pid
        os.kill(before, signal.SIGKILL)

        def kept() -> list[int]:
            if space.keeper.agent_info.pid == before or space.keeper.state != "open":
                return []
            file = Path(space.keeper.agent_info.directory, AT_MANAGER_END_FILE)
            return [pid for pid, _ in json.loads(file.read_text())["pids"]] if file.exists() else []

        until(lambda: kept() == [process.pid], "another keeper")
        assert "is replaced" in caplog.text
        assert runtime.call(square, 3) == 9
        assert runtime._connection.state == "open"
        assert runtime._connection.interruptions == 0


def test_what_the_keeper_was_to_remove_at_the_managers_end_is_there_after_its_own() -> None:
    space = event_loop.run(workspace.acquire())
    try:
        os.kill(space.keeper.agent_info.pid, signal.SIGKILL)
        until(lambda: (space.keeper.state, space.keeper.generation) == ("open", 2), "another keeper")
        assert Path(space.directory).is_dir()
    finally:
        event_loop.run(space.release())
    assert not Path(space.directory).exists()


def test_a_keeper_that_is_killed_again_and_again_is_given_up_in_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(restart_policy, "_BACKOFF", 0.001)
    space = event_loop.run(workspace.acquire())
    try:
        for generation in range(1, 7):
            until(lambda g=generation: (space.keeper.state, space.keeper.generation) == ("open", g), "another keeper")
            os.kill(space.keeper.agent_info.pid, signal.SIGKILL)
        until(lambda: space.keeper.state == "lost", "the end")
        assert "if this process is killed, something may be left" in caplog.text
    finally:
        event_loop.run(space.release())


# --- calls -----------------------------------------------------------------------------------------------
@pytest.mark.soak
@pytest.mark.keeps("hosts")
def test_a_host_that_is_powered_off_in_the_middle_loses_nothing(make_hosts: Any, caplog: Any) -> None:
    hosts = make_hosts(3)
    kwargs = {"config_file": hosts.config_file}

    def slow(x: int) -> int:
        time.sleep(0.05)
        return x * x

    with RuntimeGroup(hosts=hosts.names, connection_kwargs=kwargs, python="auto") as group:
        results = group.map(slow, range(120))
        got = [next(results) for _ in range(10)]
        hosts[1].power_off()
        got += results
        assert got == [x * x for x in range(120)]
        assert "run elsewhere" in caplog.text


def test_each_result_comes_once_whatever_dies(group: RuntimeGroup, tmp_path: Path) -> None:
    marker = str(tmp_path / "died")

    def sometimes_dies(x: int) -> int:
        if x in (50, 150) and not os.path.exists(f"{marker}{x}"):
            Path(f"{marker}{x}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)
        return x

    results = group.map(sometimes_dies, range(300), chunksize=3)
    got = list(itertools.islice(results, 30))
    lose(group, "two")
    got += itertools.islice(results, 150)
    lose(group, "three")
    got += results
    assert got == list(range(300))


def test_a_host_that_comes_back_takes_part_again(hosts: Any) -> None:
    """In the same map; each result comes once."""

    def slow(x: int) -> tuple[int, str]:
        time.sleep(0.01)
        return x, os.environ["WORKING_DIR"]

    kwargs = {"config_file": hosts.config_file, "link_timeout": 2}
    with RuntimeGroup(hosts=hosts.names[:2], connection_kwargs=kwargs, python="auto") as group:
        runtime = group.runtimes[0]
        before = runtime.working_dir
        results = group.map(slow, itertools.count(), buffersize=20)
        got = list(itertools.takewhile(lambda result: result[1] != before, results))
        lose_agent(hosts, runtime)
        until(lambda: runtime._connection.generation == 2 and runtime._connection.state == "open", "another agent")
        assert runtime.working_dir != before
        after: list[tuple[int, str]] = []

        def is_back() -> bool:
            after.append(next(results))
            return after[-1][1] == runtime.working_dir

        until(is_back, "results of the host that is back")
        numbers = [number for number, _ in after]
        assert numbers == list(range(len(got) + 1, len(got) + 1 + len(numbers)))


@pytest.mark.parametrize("chunksize", [1, 10])
def test_of_calls_beside_each_other_the_one_that_ends_hosts_is_named(chunksize: int) -> None:
    agents: list[int] = []

    def ends_the_host(x: int) -> int:
        if x == 5:
            end_own_agent(agents)
        time.sleep(0.2)  # so that those beside it are under way
        return x

    # One is left for the others: which calls are first to be tried again is a matter of luck.
    with RuntimeGroup([LocalRuntime(host=f"host{number}") for number in range(4)]) as group:
        agents += [runtime._connection.agent_info.pid for runtime in group.runtimes]
        executor = group.executor(workers_per_host=3)
        results = executor.map(ends_the_host, range(20), chunksize=chunksize)
        assert [next(results) for _ in range(5)] == list(range(5))
        with pytest.raises(WorkerLostError, match=r"ends_the_host\(5\) \(item 5\)") as caught:
            next(results)
    assert len(caught.value.hosts) == 3


@pytest.mark.soak
def test_the_only_host_is_waited_for_and_a_call_that_ends_it_is_given_up(hosts: Any) -> None:
    def ends_the_host(x: int) -> int:
        if x == 5:
            agent = os.environ["LAZYCLUSTER_AGENT"].split("-")[-2]
            os.kill(int(agent), signal.SIGKILL)
            time.sleep(60)
        return x

    kwargs = {"config_file": hosts.config_file, "link_timeout": 2}
    with RuntimeGroup(hosts=hosts.names[:1], connection_kwargs=kwargs, python="auto") as group:
        results = group.map(ends_the_host, range(10))
        assert [next(results) for _ in range(5)] == list(range(5))
        with pytest.raises(WorkerLostError, match="had been tried 2 times before with the same end") as caught:
            next(results)
        assert caught.value.hosts == [hosts.names[0]] * 3
        assert "(item 5)" in str(caught.value)  # and not one of those that were beside it
        assert list(group.map(square, range(10))) == [x * x for x in range(10)]


def test_a_call_that_ends_every_host_is_given_up_and_named(group: RuntimeGroup) -> None:
    agents = [runtime._connection.agent_info.pid for runtime in group.runtimes]

    def ends_the_host(x: int) -> int:
        if x == 5:
            end_own_agent(agents)
        return x

    with group.executor(workers_per_host=1) as executor:
        future = executor.submit(ends_the_host, 5)
        with pytest.raises(WorkerLostError, match=r"the host was lost while it ran .*ends_the_host\(5\)") as caught:
            future.result()
    assert sorted(caught.value.hosts) == ["one", "three", "two"]


def test_a_host_that_cannot_be_reached_does_not_hold_up_the_rest(
    group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote_pool, "AWAY_LIMIT", 0.1)
    connection = group.get_runtime("two")._connection
    agent = connection.agent_info.pid

    def counted(x: int) -> int:
        time.sleep(0.02)
        return x

    def become(state: Any) -> None:
        event_loop.get_loop().call_soon_threadsafe(connection._become, state)

    results = group.map(counted, range(200))
    got = [next(results) for _ in range(20)]
    os.kill(agent, signal.SIGSTOP)
    try:
        become("interrupted")
        got += itertools.islice(results, 150)
    finally:
        os.kill(agent, signal.SIGCONT)
    become("open")
    got += results
    assert got == list(range(200))
    assert list(group.map(square, range(100))) == [x * x for x in range(100)]


def test_when_no_host_is_left_what_was_lost_is_named(group: RuntimeGroup) -> None:
    results = group.map(lambda x: time.sleep(0.05), itertools.count())
    next(results)
    for host in group.hosts:
        lose(group, host)
    with pytest.raises(HostsLostError, match="no host is left") as caught:
        for _ in range(10_000):
            next(results)
    assert sorted(caught.value.hosts) == ["one", "three", "two"]
    with pytest.raises(LazyclusterError, match="lost"):
        group.map(square, [1])


# --- tasks -----------------------------------------------------------------------------------------------
def waiting(path: str) -> str:
    Path(path, str(os.getpid())).touch()
    while not Path(path, "go").exists():
        time.sleep(0.01)
    return os.environ["NAME_OF_HOST"]


def named(group: RuntimeGroup) -> RuntimeGroup:
    for runtime in group.runtimes:
        runtime.add_env_variables({"NAME_OF_HOST": runtime.host})
    return group


def until_it_runs(tmp_path: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(os.listdir(tmp_path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_task_goes_on_elsewhere_if_so_asked(group: RuntimeGroup, tmp_path: Path, caplog: Any) -> None:
    named(group)
    task = group.execute_task(RuntimeTask("wait").call(waiting, str(tmp_path)), retries=1)
    first = task.host
    until_it_runs(tmp_path, 1)
    lose(group, first)
    until_it_runs(tmp_path, 2)
    (tmp_path / "go").touch()
    second = task.result(timeout=30)
    assert second == task.host != first
    assert task.status == "done"
    assert f"task 'wait' has failed and is tried again on {second}" in caplog.text
    assert task in group.get_runtime(second).tasks
    assert task not in group.get_runtime(first).tasks
    group.join()


def test_without_retries_or_on_one_host_it_fails(group: RuntimeGroup, tmp_path: Path) -> None:
    task = RuntimeTask("wait").call(waiting, str(tmp_path))
    plain = group.execute_task(task, host="one")
    pinned = group.execute_task(task, host="one", retries=3)
    until_it_runs(tmp_path, 2)
    lose(group, "one")
    for execution in (plain, pinned):
        with pytest.raises(TaskExecutionError, match="connection was lost"):
            execution.join()


def test_tries_are_counted_and_told(group: RuntimeGroup, tmp_path: Path) -> None:
    task = group.execute_task(RuntimeTask("wait").call(waiting, str(tmp_path)), retries=1)
    hosts = []
    for count in (1, 2):
        until_it_runs(tmp_path, count)
        hosts.append(task.host)
        lose(group, task.host)
    with pytest.raises(TaskExecutionError, match="It was tried 2 times, on {}, {}".format(*hosts)):
        task.join()


def test_other_failures_are_tried_again_if_so_asked(group: RuntimeGroup, tmp_path: Path) -> None:
    line = f"echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) -ge 3"
    with pytest.raises(TaskExecutionError, match="exit status 1"):
        group.execute_task(RuntimeTask("third").run_command(line), retries=5, execute_async=False)
    task = group.execute_task(RuntimeTask("third").run_command(line), retries=5, retry_on="any", execute_async=False)
    assert task.status == "done"
    assert (tmp_path / "tries").read_text() == "x\n" * 3
    assert len(task.execution_log) == 1
    slow = group.execute_task(RuntimeTask("slow").run_command("sleep 600"), retries=5, retry_on="any")
    slow.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        slow.result(timeout=30)


def lose_agent(hosts: Any, runtime: Any) -> None:
    inner = runtime._connection.agent_info.pid
    os.kill(next(found.pid for found in hosts[0].processes() if found.inner_pid == inner), signal.SIGKILL)


def test_a_task_is_tried_again_where_it_was_when_its_host_is_back(hosts: Any, tmp_path: Path) -> None:
    """By one runtime, by a group that names the host, and on all hosts: in the new working directory."""
    kwargs = {"config_file": hosts.config_file, "link_timeout": 2}
    line = "pwd; test -e ~/again || sleep 600"
    with RuntimeGroup(hosts=hosts.names[:1], connection_kwargs=kwargs) as group:
        [runtime] = group.runtimes
        tasks = [
            runtime.execute_task(RuntimeTask("own").run_command(line), retries=1),
            group.execute_task(RuntimeTask("pinned").run_command(line), host=runtime.host, retries=1),
            *group.execute_task(RuntimeTask("all").run_command(line), broadcast=True, retries=1),
        ]
        plain = runtime.execute_task(RuntimeTask("plain").run_command(line))
        until(lambda: [process.name for process in hosts[0].processes()].count("sleep") >= 4, "the commands")
        first = runtime.working_dir
        hosts[0].path("~/again").touch()
        lose_agent(hosts, runtime)
        for task in tasks:
            task.join(60)
            assert task.execution_log == [f"{runtime.working_dir}\n"]
        assert runtime.working_dir != first
        with pytest.raises(TaskExecutionError, match="the agent on the host has ended"):
            plain.join()
        hosts[0].path("~/again").unlink()


def test_on_one_host_other_failures_are_tried_again_too(tmp_path: Path) -> None:
    line = f"echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) -ge 3"
    with LocalRuntime() as runtime:
        task = RuntimeTask("third").run_command(line)
        assert runtime.execute_task(task, retries=5, retry_on="any", execute_async=False).status == "done"
        assert (tmp_path / "tries").read_text() == "x\n" * 3
        with pytest.raises(ValueError, match="retry_on"):
            runtime.execute_task(task, retries=1, retry_on="monday")
        with pytest.raises(ValueError, match="leave out retries, or detach"):
            runtime.execute_task(task, retries=1, detach=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"debug": True}, "prints nothing here: leave out debug"),
        ({"omit_on_join": True}, "leave out omit_on_join, or detach"),
        ({"execute_async": False}, "leave out execute_async=False"),
    ],
)
def test_options_that_do_not_apply_to_a_detached_task_are_refused(options: dict[str, Any], error: str) -> None:
    task = RuntimeTask("plain").run_command("true")
    with RuntimeGroup([LocalRuntime(host="one")]) as group:
        with pytest.raises(ValueError, match=error):
            group.runtimes[0].execute_task(task, detach=True, **options)
        if "omit_on_join" not in options:
            for broadcast in (False, True):
                with pytest.raises(ValueError, match=error):
                    group.execute_task(task, broadcast=broadcast, detach=True, **options)
        assert group.detached_tasks() == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"retries": -1}, "retries must be at least 0"),
        ({"retries": "many"}, "retries must be an integer"),
        ({"retries": 1, "retry_on": "monday"}, "retry_on"),
        ({"retries": 1, "detach": True}, "leave out retries, or detach"),
    ],
)
def test_retries_that_make_no_sense(group: RuntimeGroup, options: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        group.execute_task(RuntimeTask("x").run_command("true"), **options)
