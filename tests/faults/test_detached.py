"""Tasks that are to go on when their manager ends, and are found again by another one."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import leaks
from lazycluster import DetachedTask, LocalRuntime, Runtime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import LazyclusterError, TaskExecutionError
from lazycluster.tasks import detached_records
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
        agent = runtime._connection.agent_info.pid
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


class Attack:
    """What makes a directory where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


def rewritten(host: Any, task: DetachedTask, outcome: object, **changes: Any) -> None:
    """Have a host say something else of a task that has ended."""
    place = host.path(f"~/.local/state/lazycluster/detached/{task.id}")
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**state, **changes}))
    (place / "outcome-0").write_bytes(pickle.dumps(outcome))


RETURNED = [{"ok": True, "status": "returned"}]
RAISED = [{"ok": True, "status": "raised"}]


@pytest.mark.parametrize("steps", [RETURNED, RAISED, [*RETURNED, *RETURNED]])
@pytest.mark.parametrize("again", [True, False])
def test_what_was_a_command_is_never_unpickled(hosts: Any, tmp_path: Path, steps: Any, again: bool) -> None:
    with connect(hosts) as runtime:
        task = runtime.execute_task(RuntimeTask("plain").run_command("true"), detach=True)
        task.join(_PATIENCE)
        rewritten(hosts[0], task, Attack(tmp_path / "harm"), steps=steps)
        if again:
            (task,) = runtime.detached_tasks()
        for trust_host in (False, True):  # what is known here counts also then
            with pytest.raises(LazyclusterError, match=r"host1: .* was a function, but it was a command") as caught:
                task.result(trust_host=trust_host)
            assert not isinstance(caught.value, TaskExecutionError)
        assert not (tmp_path / "harm").exists()
        task.remove()


@pytest.fixture
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.usefixtures("_own_state")
def test_without_a_record_nothing_is_unpickled_unless_it_is_asked_for(hosts: Any) -> None:
    with connect(hosts) as runtime:
        runtime.execute_task(RuntimeTask("far").call(abs, -3), detach=True).join(_PATIENCE)
        (record,) = detached_records.directory().iterdir()
        content = record.read_bytes()
        damages: list[Callable[[], Any]] = [
            record.unlink,
            lambda: record.write_bytes(content[:-5]),
            lambda: record.write_bytes(content.replace(b"host1", b"other")),
            lambda: (record.write_bytes(content), record.chmod(0o666)),
        ]
        for damage in damages:
            damage()
            (task,) = runtime.detached_tasks()
            with pytest.raises(
                LazyclusterError, match=r"host1: .* step 1 is a function(.|\n)*trust_host=True"
            ) as caught:
                task.result()
            assert str(record) in str(caught.value)
            assert task.result(trust_host=True) == 3
        record.chmod(0o600)
        (task,) = runtime.detached_tasks()
        assert task.result() == 3
        task.remove()
        assert not record.exists()


def test_a_host_that_says_less_than_it_was_told_is_not_believed(hosts: Any) -> None:
    with connect(hosts) as runtime:
        task = runtime.execute_task(RuntimeTask("two").call(abs, -3).call(abs, -4), detach=True)
        assert task.result(_PATIENCE) == 4
        for steps in ([], RETURNED, [{"ok": True, "exit": 0, "signal": None}, *RETURNED]):
            rewritten(hosts[0], task, [1], steps=steps)
            with pytest.raises(LazyclusterError, match="not how each of its steps has ended"):
                task.result()
        task.remove()


@pytest.mark.usefixtures("_own_state")
def test_records_are_private_and_hold_no_secrets(make: Callable[..., Runtime]) -> None:
    with make(env={"TOKEN": "hidden"}) as runtime:
        task = runtime.execute_task(RuntimeTask("quiet").run_command("echo hidden").call(len, "hidden"), detach=True)
        (record,) = detached_records.directory().iterdir()
        assert (record.parent.stat().st_mode & 0o777, record.stat().st_mode & 0o777) == (0o700, 0o600)
        assert json.loads(record.read_text()) == {"host": runtime.host, "steps": 2, "functions": [1]}
        assert task.result(_PATIENCE) == 6
        task.remove()
        assert list(detached_records.directory().iterdir()) == []


def test_a_record_that_cannot_be_written_does_not_keep_a_task_from_being_started(
    hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with connect(hosts) as runtime:
        task = runtime.execute_task(RuntimeTask("far").call(abs, -3), detach=True)
        assert task.result(_PATIENCE) == 3
        assert "trust_host=True" in caplog.text
        (found,) = runtime.detached_tasks()
        with pytest.raises(LazyclusterError, match="cannot be used: Not a directory"):
            found.result()
        found.remove()


def test_a_home_that_is_read_only(make_hosts: Any) -> None:
    hosts = make_hosts(1)
    hosts[0].run("mount -o remount,ro /home/lazy")
    task = RuntimeTask("kept").run_command("echo here")
    with connect(hosts) as runtime:
        assert runtime.detached_tasks() == []
        with pytest.raises(LazyclusterError, match=r"Read-only file system.*\n  Next step: .* XDG_STATE_HOME"):
            runtime.execute_task(task, detach=True)
    hosts[0].run("mount -o remount,rw /home/lazy && echo 'export XDG_STATE_HOME=/var/tmp/mine' >> /home/lazy/.bashrc")
    hosts[0].run("mount -o remount,ro /home/lazy")
    with connect(hosts) as runtime:
        started = runtime.execute_task(task, detach=True)
        started.result(_PATIENCE)
        assert started.log() == "here\n"
        (found,) = runtime.detached_tasks()
        found.remove()
    hosts[0].run("rm -r /var/tmp/mine")


@pytest.mark.parametrize(
    "change",
    [
        {"created": 10**400}, {"created": float("nan")}, {"created": 1e300}, {"created": "x"}, {"name": "\ud800"},
        {"labels": [["x"] * 40]}, {"id": "../../x"}, {"name": json.loads("[" * 60 + "]" * 60)},
    ],
)  # fmt: skip
def test_a_host_that_talks_nonsense_does_not_hide_the_tasks_of_others(
    hosts: Any, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    kwargs = {"config_file": hosts.config_file}
    with RuntimeGroup(hosts=hosts.names[:2], connection_kwargs=kwargs, python=sys.executable) as group:
        started = group.execute_task(RuntimeTask("plain").run_command("true"), broadcast=True, detach=True)
        about = hosts[0].path(f"~/.local/state/lazycluster/detached/{started[0].id}/task.json")
        before = about.read_text()
        about.write_text(json.dumps({**json.loads(before), **change}))
        assert [task.host for task in group.detached_tasks()] == ["host2"]
        assert "host1" in caplog.text
        with pytest.raises(LazyclusterError, match="host1"):
            group.get_runtime("host1").detached_tasks()
        about.write_text(before)
        for task in group.detached_tasks():
            task.remove()
