"""Tasks that are to go on when their manager ends, and are found again by another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import leaks
from lazycluster import LocalRuntime, Runtime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import LazyclusterError, TaskExecutionError
from patience import until

_PATIENCE = 40.0


def connect(hosts: Any, number: int = 0, **options: Any) -> Runtime:
    return Runtime(
        hosts.names[number], connection_kwargs={"config_file": hosts.config_file}, python=sys.executable, **options
    )


@pytest.fixture(params=["host", "local"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Runtime]]:
    """What makes a runtime: on a host, or on this machine."""
    if request.param == "local":
        yield LocalRuntime
    else:
        hosts = request.getfixturevalue("hosts")
        yield lambda **options: connect(hosts, **options)


def wait_and_double(number: int) -> int:
    print("begins", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.02)
    return 2 * number


def test_it_outlives_its_runtime_and_is_found_again(make: Callable[..., Runtime]) -> None:
    task = RuntimeTask("lasting").run_command("echo $WHO; pwd").call(wait_and_double, 21)
    with make(env={"WHO": "me"}) as runtime:
        started = runtime.execute_task(task, detach=True)
        until(lambda: "begins" in started.log(), "the function")
        assert started.state == "running"
        directory = started.log().splitlines()[1]
        with pytest.raises(TimeoutError):
            started.result(timeout=0.1)
    with make() as runtime:
        (found,) = runtime.detached_tasks()
        assert (found.id, found.name, found.state) == (started.id, "lasting", "running")
        runtime.execute_task(RuntimeTask("go").run_command(f"touch {directory}/go"), execute_async=False)
        assert found.result(timeout=_PATIENCE) == 42
        assert found.state == "done"
        assert found.log() == f"me\n{directory}\nbegins\n"
        found.remove()
        assert runtime.detached_tasks() == []
        with pytest.raises(LazyclusterError, match="there is no detached task"):
            found.log()
        assert runtime.call(os.path.exists, directory) is False


def test_a_log_of_any_length_takes_a_limited_memory(make: Callable[..., Runtime], monkeypatch: Any) -> None:
    monkeypatch.setattr("lazycluster.tasks.detached._LOG_SHOWN", 10_000)
    with make() as runtime:
        task = runtime.execute_task(RuntimeTask("long").run_command("seq 100000"), detach=True)
        task.join(_PATIENCE)
        note, first, *_, last = task.log().splitlines()
        assert note == "[the log is longer; this is the end of it]"
        assert (int(first) > 90_000, last) == (True, "100000")
        task.remove()


_MANAGER = """
    import sys, threading
    from lazycluster import Runtime, RuntimeTask
    runtime = Runtime("host1", connection_kwargs={{"config_file": {config!r}}})
    runtime.execute_task(RuntimeTask("lasting").run_command("sleep 3300 & setsid sleep 3301 & wait"), detach=True)
    runtime.execute_task(RuntimeTask("other").run_command("sleep 3302"))
    print("working", flush=True)
    threading.Event().wait()
"""


def test_it_outlives_a_manager_that_is_killed_and_can_be_ended(hosts: Any) -> None:
    program = textwrap.dedent(_MANAGER).format(config=hosts.config_file)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "working\n"
        until(lambda: str(hosts[0].processes()).count("sleep 330") >= 5, "all of them")
        manager.kill()
    assert not leaks.settle(lambda: [str(p) for p in hosts[0].processes() if "sleep 3302" in p.command])
    assert not leaks.settle(lambda: [str(p) for p in hosts[0].sessions()])
    with connect(hosts) as runtime:
        (task,) = runtime.detached_tasks()
        assert task.state == "running"
        task.cancel()
        assert task.state == "cancelled"
        assert not leaks.settle(lambda: [str(p) for p in hosts[0].processes() if "sleep 330" in p.command])
        with pytest.raises(TaskExecutionError, match="it was cancelled"):
            task.result()
        task.remove()
        assert list(hosts[0].path("~/.local/state/lazycluster/detached").iterdir()) == []


def test_on_all_hosts_of_a_group(hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"config_file": hosts.config_file}
    with RuntimeGroup(hosts=hosts.names, connection_kwargs=kwargs, python=sys.executable) as group:
        task = RuntimeTask("lasting").call(os.uname)
        started = group.execute_task(task, broadcast=True, detach=True)
        one = group.execute_task(task, host="host2", detach=True)
        assert [node.result(_PATIENCE).nodename for node in [*started, one]] == [*hosts.names, "host2"]
    with RuntimeGroup(hosts=hosts.names, connection_kwargs=kwargs, python=sys.executable) as group:
        found = group.detached_tasks()
        assert {task.id for task in found} == {task.id for task in [*started, one]}
        assert found[-1].id == one.id
        # If it cannot be begun on one of them, it is on none.
        group.get_runtime("host3").cleanup()
        with pytest.raises(LazyclusterError, match="host3"):
            group.execute_task(task, broadcast=True, detach=True)
        assert len(group.detached_tasks()) == len([task for task in found if task.host != "host3"])
        assert "host3" in caplog.text
        for task in found:
            if task.host != "host3":
                task.remove()
    with connect(hosts, 2) as runtime:
        for task in runtime.detached_tasks():
            task.remove()


def test_failures_are_told(make: Callable[..., Runtime], tmp_path: Any) -> None:
    with make() as runtime:
        command = runtime.execute_task(
            RuntimeTask("bad").run_command("echo no; exit 3").run_command("true"), detach=True
        )
        function = runtime.execute_task(RuntimeTask("worse").call(int, "x"), detach=True)
        with pytest.raises(TaskExecutionError, match="exit status 3") as caught:
            command.result(_PATIENCE)
        assert caught.value.exit_status == 3
        assert (command.state, command.log()) == ("failed", "no\n")
        with pytest.raises(TaskExecutionError, match="invalid literal") as caught:
            function.result(_PATIENCE)
        assert isinstance(caught.value.__cause__, ValueError)
        for task in runtime.detached_tasks():
            task.remove()
        with pytest.raises(ValueError, match="cannot copy files"):
            runtime.execute_task(RuntimeTask("copy").send_file(str(tmp_path)), detach=True)
        with pytest.raises(ValueError, match="no steps"):
            runtime.execute_task(RuntimeTask("empty"), detach=True)


def test_one_whose_agent_was_killed_is_lost(hosts: Any) -> None:
    with connect(hosts) as runtime:
        task = runtime.execute_task(RuntimeTask("lasting").run_command("sleep 3303"), detach=True)
        until(lambda: "sleep 3303" in str(hosts[0].processes()), "the command")
        agent = runtime.connection.hello.pid
        own = {found.parent for found in hosts[0].processes() if "sleep 3303" in found.command}
        for found in hosts[0].processes():
            if found.pid in own and found.inner_pid != agent:
                os.kill(found.pid, signal.SIGKILL)
        until(lambda: task.state == "lost", "the end of it")
        assert not leaks.settle(lambda: [str(p) for p in hosts[0].processes() if "sleep 3303" in p.command])
        with pytest.raises(TaskExecutionError, match="it was killed, or its host was restarted"):
            task.result()
        task.remove()


def test_nobody_else_can_read_it(hosts: Any) -> None:
    with connect(hosts) as runtime:
        task = runtime.execute_task(RuntimeTask("lasting").run_command("echo secret"), detach=True)
        task.join(_PATIENCE)
        place = f"{hosts[0].home}/.local/state/lazycluster/detached"
        assert hosts[0].run(f"stat -c %a {place} {place}/{task.id}").stdout.split() == ["700", "700"]
        modes = hosts[0].run(f"stat -c %a {place}/{task.id}/log {place}/{task.id}/*.json").stdout.split()
        assert set(modes) == {"600"}
        task.remove()
