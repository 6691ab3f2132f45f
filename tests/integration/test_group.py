"""Groups of runtimes, on this machine and on real hosts."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import (
    GroupTaskError,
    InvalidRuntimeError,
    InvalidRuntimesError,
    LazyclusterError,
    NoPortsLeftError,
    NoRuntimesError,
    PortInUseError,
    TaskExecutionError,
)
from lazycluster.utils import Environment


@pytest.fixture(autouse=True)
def _main_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "main"))


@pytest.fixture
def locals_() -> Iterator[RuntimeGroup]:
    """Two runtimes on this machine."""
    with RuntimeGroup([LocalRuntime(host="one"), LocalRuntime(host="two")]) as group:
        yield group


@pytest.fixture
def group(hosts: Any) -> Iterator[RuntimeGroup]:
    with RuntimeGroup(hosts=hosts.names, connection_kwargs={"config_file": hosts.config_file}) as group:
        yield group


def fetch(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        return connection.recv(100)


@pytest.fixture
def greeter() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"hello")

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# --- making one ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, ValueError),
        ({"runtimes": [], "hosts": ["a"]}, ValueError),
        ({"hosts": []}, ValueError),
        ({"runtimes": []}, ValueError),
        ({"hosts": "host-1"}, TypeError),
        ({"hosts": ["a", "b", "a"]}, ValueError),
        ({"hosts": ["a"], "on_unreachable": "ignore"}, ValueError),
        ({"hosts": ["a"], "connection_kwargs": {"prot": 22}}, ValueError),
        ({"hosts": ["a"], "settings": {"a": {"pasword": "x"}}}, ValueError),
        ({"hosts": ["a"], "settings": {"a": 3}}, TypeError),
        ({"hosts": ["a"], "settings": 3}, TypeError),
        ({"hosts": ["a"], "settings": "/no/such/file.toml"}, ValueError),
        ({"runtimes": ["a"]}, TypeError),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        RuntimeGroup(**arguments)


def test_hosts_that_cannot_be_used(hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    options = {"connection_kwargs": {"config_file": hosts.config_file}}
    good, bad, worse = hosts.names[0], "no-such-1.invalid", "no-such-2.invalid"
    with pytest.raises(InvalidRuntimeError, match=bad) as raised:
        RuntimeGroup(hosts=[good, bad], **options)
    assert (raised.value.host, raised.value.reason) == (bad, "dns")
    with pytest.raises(InvalidRuntimesError) as raised_both:
        RuntimeGroup(hosts=[good, bad, worse], **options)
    assert [error.host for error in raised_both.value.errors] == [bad, worse]
    with RuntimeGroup(hosts=[bad, good], on_unreachable="skip", **options) as group:
        assert group.hosts == [good]
        assert "dns" in group.unreachable_hosts[bad]
        assert bad in caplog.text
    with pytest.raises(NoRuntimesError, match=worse):
        RuntimeGroup(hosts=[bad, worse], on_unreachable="skip", **options)


def test_settings_of_single_hosts(hosts: Any, tmp_path: Path) -> None:
    one, two, _ = hosts.names
    file = tmp_path / "hosts.toml"
    file.write_text(
        textwrap.dedent(
            f"""
            ["host*"]
            config_file = "{hosts.config_file}"
            env = {{A = "all", B = "b"}}
            [{one}]
            setup = "export S=set"
            env = {{A = "one"}}
            [{two}]
            working_dir = "~/work here"
            """
        )
    )
    with RuntimeGroup(settings=file, env={"C": "c"}) as group:
        assert group.hosts == [one, two]
        tasks = group.execute_task(RuntimeTask().run_command('echo "$A$B$C$S"; pwd'), broadcast=True)
        first, second = (task.execution_log[0].splitlines() for task in tasks)
        assert first[0] == "onebcset"
        assert second == ["allbc", f"{hosts[1].home}/work here"]
    hosts[1].path("~/work here").rmdir()


def test_members(locals_: RuntimeGroup) -> None:
    assert locals_.hosts == ["one", "two"]
    assert locals_.runtime_count == 2
    assert locals_.contains_runtime("one")
    assert not locals_.contains_runtime("three")
    assert locals_.get_runtime("two").host == "two"
    assert list(locals_.get_runtimes(include_hosts="two")) == ["two"]
    assert list(locals_.get_runtimes(exclude_hosts=["two"])) == ["one"]
    for wrong in (
        lambda: locals_.get_runtime("three"),
        lambda: locals_.get_runtimes("one", "two"),
        lambda: locals_.get_runtimes(include_hosts=["three"]),
        lambda: locals_.get_runtimes(exclude_hosts="three"),
        lambda: locals_.add_runtime(),
        lambda: locals_.add_runtime("x", locals_.runtimes[0]),
        lambda: locals_.add_runtime("one"),
        lambda: locals_.add_runtime(runtime=locals_.runtimes[0]),
        lambda: locals_.remove_runtime("three"),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()
    locals_.add_runtime(runtime=LocalRuntime(host="three"))
    assert locals_.hosts == ["one", "two", "three"]
    removed = locals_.remove_runtime("three")
    assert locals_.hosts == ["one", "two"]
    assert removed.call(len, "ab") == 2
    removed.cleanup()


def test_a_busy_member_is_not_removed(locals_: RuntimeGroup) -> None:
    task = locals_.execute_task(RuntimeTask().run_command("sleep 100"), host="two")
    with pytest.raises(LazyclusterError, match="1 task"):
        locals_.remove_runtime("two")
    task.cancel()
    task.join()
    locals_.remove_runtime("two").cleanup()


def test_a_host_is_added_with_the_settings_of_the_group(hosts: Any) -> None:
    options = {"connection_kwargs": {"config_file": hosts.config_file}, "env": {"A": "x"}}
    with RuntimeGroup(hosts=hosts.names[:1], **options) as group:
        group.add_runtime(hosts.names[1])
        assert group.call(os.getenv, "A") == dict.fromkeys(hosts.names[:2], "x")
        with pytest.raises(InvalidRuntimeError):
            group.add_runtime("no-such-host.invalid")
        assert group.hosts == hosts.names[:2]


def test_two_names_of_one_machine_are_noticed(hosts: Any, caplog: pytest.LogCaptureFixture, greeter: int) -> None:
    one = hosts[0]
    other = f"{one.user}@{one.name}"
    with RuntimeGroup(hosts=[one.name, other], connection_kwargs={"config_file": hosts.config_file}) as group:
        assert f"{other} is the same account on the same machine as {one.name}" in caplog.text
        assert group.expose_port_to_runtimes(greeter, 6300) == 6300
        assert group.call(fetch, 6300) == {one.name: b"hello", other: b"hello"}
        assert group.expose_port_from_runtime_to_group(other, 6300, 6301) == 6301
        assert fetch(6301) == b"hello"


# --- tasks -----------------------------------------------------------------------------------------
def test_the_example_of_the_documents(group: RuntimeGroup) -> None:
    my_task = RuntimeTask("group-demo").run_command("echo Hello Group!")
    single_task = group.execute_task(my_task)
    assert single_task.execution_log[0] == "Hello Group!\n"
    task_list = group.execute_task(my_task, broadcast=True)
    task = group.execute_task(my_task)
    group.join()
    assert [one.execution_log[0] for one in [*task_list, task]] == ["Hello Group!\n"] * 4
    assert [one.host for one in task_list] == group.hosts
    assert len({id(one) for one in [single_task, *task_list, task]}) == 5


def test_the_least_busy_one_executes(locals_: RuntimeGroup) -> None:
    busy = locals_.get_runtime("one").execute_task(RuntimeTask().run_command("sleep 100"))
    for _ in range(3):
        assert locals_.execute_task(RuntimeTask().run_command("true"), execute_async=False).host == "two"
    assert locals_.get_runtime().host == "two"
    busy.cancel()
    busy.join()
    tasks = [locals_.execute_task(RuntimeTask().run_command("sleep 0.2")) for _ in range(6)]
    assert sorted(str(task.host) for task in tasks).count("one") == 3
    locals_.join()
    assert len(locals_.task_processes) == 10


def test_many_threads_share_the_work(locals_: RuntimeGroup) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        task = RuntimeTask().run_command("sleep 0.5")
        hosts = list(pool.map(lambda _: locals_.execute_task(task).host, range(16)))
    assert hosts.count("one") == 8
    locals_.join()


def test_results_in_order_of_start(locals_: RuntimeGroup) -> None:
    def slow(number: int) -> int:
        time.sleep(0.2 if number == 0 else 0)
        return number

    for number in range(4):
        locals_.execute_task(RuntimeTask().run_function(slow, number=number))
    locals_.execute_task(RuntimeTask().call(len, "abcde"), broadcast=True)
    locals_.runtimes[0].execute_task(RuntimeTask().call(len, "not through the group"))
    assert list(locals_.function_returns) == [0, 1, 2, 3, 5, 5]
    locals_.clear_tasks()
    assert list(locals_.function_returns) == []


def test_results_per_host(group: RuntimeGroup) -> None:
    assert group.call(socket.gethostname) == {host: host for host in group.hosts}


def test_failures_are_raised_together_and_once(locals_: RuntimeGroup) -> None:
    task = RuntimeTask("some").run_command('[ "$WHO" = one ] || exit 7')
    locals_.get_runtime("one").add_env_variables({"WHO": "one"})
    with pytest.raises(TaskExecutionError) as raised:
        locals_.execute_task(task, broadcast=True, execute_async=False)
    assert (raised.value.host, raised.value.exit_status) == ("two", 7)
    locals_.join()
    locals_.set_env_variables({"WHO": "none"})
    tasks = locals_.execute_task(task, broadcast=True)
    with pytest.raises(GroupTaskError) as raised_all:
        locals_.join()
    assert [error.host for error in raised_all.value.errors] == ["one", "two"]
    for part in ("one", "two", "'some'", "exit status 7"):
        assert part in str(raised_all.value)
    locals_.join()
    assert list(locals_.function_returns) == []
    assert [task.status for task in tasks] == ["failed"] * 2
    assert [task.exception.exit_status for task in tasks] == [7, 7]


def test_a_broadcast_task_shows_what_becomes_of_its_copies(
    locals_: RuntimeGroup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in locals_.hosts:
        os.mkfifo(tmp_path / host)
        locals_.get_runtime(host).add_env_variables({"WHO": host})
    task = RuntimeTask("shared").run_command('echo "$WHO"').call(os.getenv, "WHO").run_command(f"cat {tmp_path}/$WHO")
    assert repr(task) == "<RuntimeTask 'shared': 3 steps, pending>"
    copies = locals_.execute_task(task, broadcast=True)
    assert task not in copies
    with pytest.raises(TimeoutError, match="'shared' has not ended within 0 s on one, two"):
        task.join(timeout=0)
    with pytest.raises(TimeoutError, match="on one, two"):
        task.result(timeout=0)
    with pytest.raises(LazyclusterError, match="being executed"):
        task.run_command("true")
    process = task.process
    assert process is not None
    assert (process.is_alive(), process.exitcode, process.pid, task.status in ("pending", "running")) == (
        *(True, None, None, True),
    )
    for host in locals_.hosts:
        (tmp_path / host).write_text("go on")
    task.join()
    assert repr(task) == "<RuntimeTask 'shared': 3 steps, done on one, two>"
    assert (task.status, task.host, task.exception, task.execution_log_file_path) == ("done", None, None, None)
    assert (process.is_alive(), process.exitcode) == (False, 0)
    assert task.execution_log == ["one\n", "", "go on", "two\n", "", "go on"]
    assert task.execution_log == [text for one in copies for text in one.execution_log]
    assert list(task.function_returns) == task.result() == task.future.result() == ["one", "two"]
    task.print_log()
    printed = capsys.readouterr().out
    locals_.print_log()
    assert capsys.readouterr().out == printed
    shown = task._repr_html_()
    assert all(part in shown for part in ("RuntimeTask shared", "one", "two", "3 of 3", "done"))
    assert "pending" not in shown


def test_a_broadcast_task_that_fails_or_is_cancelled_says_so(locals_: RuntimeGroup, tmp_path: Path) -> None:
    locals_.get_runtime("one").add_env_variables({"WHO": "one"})
    task = RuntimeTask("some").call(os.getenv, "WHO").run_command('[ "$WHO" = one ] || exit 7')
    locals_.execute_task(task, broadcast=True)
    with pytest.raises(TaskExecutionError, match="two: task 'some', step 2 of 2 failed") as raised:
        task.join()
    task.join()
    locals_.join()  # it was raised
    assert task.exception is raised.value
    assert (task.status, task.process and task.process.exitcode) == ("failed", 7)
    assert list(task.function_returns) == ["one", None]
    with pytest.raises(TaskExecutionError):
        task.result()
    assert "exit status 7" in task._repr_html_()
    assert "1 of 2" in task._repr_html_()

    # As always, a task that is executed again is a copy, and the results of the first stay.
    locals_.set_env_variables({"WHO": "none"})
    copies = locals_.execute_task(task, broadcast=True)
    with pytest.raises(GroupTaskError):
        locals_.join()
    assert [one.status for one in copies] == ["failed", "failed"]
    assert task.exception is raised.value
    own = locals_.get_runtime("two").execute_task(task)
    own.process.join()
    assert own is not task
    assert own.exception is not None
    several = RuntimeTask("several").run_command("exit 3")
    locals_.execute_task(several, broadcast=True)
    with pytest.raises(GroupTaskError, match="2 tasks failed, on one, two"):
        several.result()
    assert isinstance(several.exception, GroupTaskError)

    lasting = RuntimeTask("lasting").run_command("sleep 300")
    copies = locals_.execute_task(lasting, broadcast=True)
    assert lasting.cancel()
    lasting.join()
    assert lasting.status == "cancelled"
    assert [one.status for one in copies] == ["cancelled"] * 2
    with pytest.raises(concurrent.futures.CancelledError):
        lasting.result()
    assert not lasting.cancel()


def test_what_cannot_be_executed(locals_: RuntimeGroup) -> None:
    task = RuntimeTask().run_command("true")
    with pytest.raises(ValueError, match="three"):
        locals_.execute_task(task, host="three")
    with pytest.raises(ValueError, match="both"):
        locals_.execute_task(task, host="one", broadcast=True)
    with pytest.raises(ValueError, match="no steps"):
        locals_.execute_task(RuntimeTask(), broadcast=True)
    with pytest.raises(TypeError):
        locals_.execute_task("ls")  # type: ignore[arg-type]
    locals_.runtimes[1].cleanup()
    with pytest.raises(LazyclusterError, match="two"):
        locals_.execute_task(task, broadcast=True)
    assert locals_.runtimes[0].tasks == []


def test_a_function_that_cannot_be_pickled_fails_everywhere(locals_: RuntimeGroup) -> None:
    lock = threading.Lock()
    with pytest.raises(GroupTaskError, match="pickle"):
        locals_.call(lambda: lock)


def test_debug_names_the_host(locals_: RuntimeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    locals_.execute_task(RuntimeTask().run_command("echo hi"), broadcast=True, execute_async=False, debug=True)
    assert sorted(capsys.readouterr().out.splitlines()) == ["[one] hi", "[two] hi"]


def test_what_is_printed(locals_: RuntimeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    locals_.execute_task(RuntimeTask("named").run_command("echo hi"), broadcast=True)
    locals_.print_log()
    locals_.print_hosts()
    locals_.fill_runtime_info_buffers_async()
    locals_.print_runtime_info()
    printed = capsys.readouterr().out
    log = [line.split() for line in printed.splitlines()[:3]]
    assert log == [
        ["host", "task", "step", "status", "output"],
        *(["one", "named", "echo", "hi", "done", "hi"], ["two", "named", "echo", "hi", "done", "hi"]),
    ]
    assert "cores" in printed


# --- files -----------------------------------------------------------------------------------------
def test_files_to_all_and_from_all(group: RuntimeGroup, hosts: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    tasks = group.send_file(tmp_path / "data")
    assert [task.host for task in tasks] == group.hosts
    group.join()
    group.execute_task(RuntimeTask().run_command("hostname > data"), broadcast=True, execute_async=False)
    task = RuntimeTask().get_file("data", tmp_path / "new" / "result.txt").get_file("data", tmp_path)
    group.execute_task(task, broadcast=True, execute_async=False)
    for host in group.hosts:
        assert (tmp_path / "new" / host / "result.txt").read_text() == f"{host}\n"
        assert (tmp_path / host / "data").read_text() == f"{host}\n"
    assert (tmp_path / "data").read_text() == "x"
    for wrong in ("", None):
        with pytest.raises((ValueError, TypeError)):
            group.send_file(wrong)  # type: ignore[arg-type]


def test_hostile_names_of_hosts_stay_in_the_directory(tmp_path: Path) -> None:
    with RuntimeGroup([LocalRuntime(host=name) for name in ("../../a", "..", "a/b")]) as group:
        group.execute_task(RuntimeTask().run_command("echo x > data"), broadcast=True, execute_async=False)
        target = tmp_path / "one" / "two" / "data"
        group.execute_task(RuntimeTask().get_file("data", target), broadcast=True, execute_async=False)
    found = [path for path in tmp_path.rglob("data") if "main" not in path.parts]
    assert len(found) == 3
    assert all(path.is_relative_to(tmp_path / "one" / "two") for path in found)


def test_a_shared_file_system_is_written_once(make_hosts: Any, tmp_path: Path) -> None:
    hosts = make_hosts(3, shared_home=True)
    (tmp_path / "data").write_text("x" * 1000)
    options = {"connection_kwargs": {"config_file": hosts.config_file}}
    with RuntimeGroup(hosts=hosts.names, working_dir="~/shared", **options) as group:
        tasks = group.send_file(tmp_path / "data", "data", execute_async=False)
        logs = [task.execution_log[0] for task in tasks]
        assert sum("unchanged" in log for log in logs) == 2
        assert group.call(os.listdir) == {name: ["data"] for name in hosts.names}
        group.execute_task(RuntimeTask().send_file(tmp_path / "data", "/tmp/private"), broadcast=True)
        group.join()
        logs = [task.execution_log[0] for task in group.get_runtime(hosts.names[0]).tasks[-1:]]
        assert not any("unchanged" in log for log in logs)
        group.execute_task(RuntimeTask().run_command("rm /tmp/private"), broadcast=True)
        group.join()


# --- ports -----------------------------------------------------------------------------------------
def test_free_ports(group: RuntimeGroup, hosts: Any) -> None:
    _, two, _ = group.hosts
    task = group.execute_task(RuntimeTask().call(_listen, 6400), host=two)
    while not group.get_runtime(two).call(_connects, 6400):
        time.sleep(0.05)
    assert not group.has_free_port(6400)
    assert group.has_free_port(6400, exclude_hosts=two)
    assert group.get_free_port([22, 6400, 6401]) == 6401
    with pytest.raises(NoPortsLeftError, match="6400"):
        group.get_free_port([22, 6400])
    with pytest.raises(NoPortsLeftError):
        group.get_free_port([])
    with pytest.raises(ValueError, match="four"):
        group.has_free_port(6401, exclude_hosts=["four"])
    with pytest.raises(ValueError, match="70000"):
        group.get_free_port([70000])
    with socket.create_server(("127.0.0.1", 6402)):
        assert group.get_free_port([6402, 6403]) == 6402
        assert group.get_free_port([6402, 6403], enforce_check_on_localhost=True) == 6403
    task.cancel()
    task.join()


def _listen(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        time.sleep(300)


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_port_on_all_hosts_or_none(group: RuntimeGroup, greeter: int) -> None:
    one, two, three = group.hosts
    assert group.expose_port_to_runtimes(greeter, 6500, exclude_hosts=[one, three]) == 6500
    with pytest.raises(PortInUseError, match=two):
        group.expose_port_to_runtimes(greeter, 6500)
    assert group.has_free_port(6500, exclude_hosts=two)
    assert group.expose_port_to_runtimes(greeter, [22, 6500, 6501]) == 6501
    assert group.call(fetch, 6501) == dict.fromkeys(group.hosts, b"hello")
    with pytest.raises(NoPortsLeftError):
        group.expose_port_to_runtimes(greeter, [22, 6500])
    with pytest.raises(ValueError, match="no host"):
        group.expose_port_to_runtimes(greeter, 6502, exclude_hosts=group.hosts)
    assert [runtime.alive_process_count for runtime in group.runtimes] == [1, 2, 1]


def test_a_port_of_one_host_on_all(group: RuntimeGroup, greeter: int) -> None:
    one, two, three = group.hosts
    group.expose_port_to_runtimes(greeter, 6600, exclude_hosts=[two, three])
    assert group.expose_port_from_runtime_to_group(one, 6600) == 6600
    assert fetch(6600) == b"hello"
    assert group.call(fetch, 6600) == dict.fromkeys(group.hosts, b"hello")
    with socket.create_server(("127.0.0.1", 6601)):
        with pytest.raises(PortInUseError):
            group.expose_port_from_runtime_to_group(one, 6600, 6601)
        assert group.has_free_port(6601)
        assert group.expose_port_from_runtime_to_group(one, 6600, [6601, 6602]) == 6602
    with pytest.raises(NoPortsLeftError):
        group.expose_port_from_runtime_to_group(one, 6600, [22, 6600])
    with pytest.raises(ValueError, match="four"):
        group.expose_port_from_runtime_to_group("four", 6600)


# --- the end ---------------------------------------------------------------------------------------
def test_use_after_cleanup() -> None:
    group = RuntimeGroup([LocalRuntime(host="one"), LocalRuntime(host="two")])
    task = group.execute_task(RuntimeTask().run_command("sleep 100"))
    group.cleanup()
    group.cleanup()
    assert task.status == "cancelled"
    group.join()
    for use in (
        lambda: group.execute_task(RuntimeTask().run_command("true")),
        lambda: group.call(len, ""),
        lambda: group.has_free_port(6700),
        lambda: group.expose_port_to_runtimes(6700),
    ):
        with pytest.raises(LazyclusterError, match="cleanup"):
            use()


def test_two_managers_use_the_same_hosts(hosts: Any) -> None:
    program = """
        import socket, sys
        from lazycluster import RuntimeGroup
        with RuntimeGroup(hosts=sys.argv[2:], connection_kwargs={"config_file": sys.argv[1]}) as group:
            print(group.call(socket.gethostname))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), hosts.config_file, *hosts.names]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=60)[0] == f"{ {name: name for name in hosts.names} }\n"


def test_ctrl_c_while_connecting_and_while_waiting(hosts: Any) -> None:
    program = """
        import sys
        from lazycluster import RuntimeGroup, RuntimeTask
        print("start", flush=True)
        try:
            with RuntimeGroup(hosts=sys.argv[2:], connection_kwargs={"config_file": sys.argv[1]}) as group:
                print("connected", flush=True)
                group.execute_task(RuntimeTask().run_command("sleep 300"), broadcast=True, execute_async=False)
        except KeyboardInterrupt:
            print("interrupted")
    """
    for word in ("start", "connected"):
        command = [sys.executable, "-c", textwrap.dedent(program), hosts.config_file, *hosts.names]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while process.stdout.readline() != f"{word}\n":
            pass
        time.sleep(0.1)  # into the middle of it
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (out.splitlines()[-1], err) == ("interrupted", "")
