"""Runtimes: on this machine without ssh, and on real hosts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import logging
import os
import pickle
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

import leaks
from lazycluster import LocalRuntime, Runtime, RuntimeTask
from lazycluster.exceptions import (
    GroupTaskError,
    InvalidRuntimeError,
    LazyclusterError,
    NoPortsLeftError,
    PathCreationError,
    PortInUseError,
    TaskExecutionError,
)
from lazycluster.utils import Environment
from patience import until


@pytest.fixture(autouse=True)
def _main_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "main"))


@pytest.fixture
def local() -> Iterator[LocalRuntime]:
    with LocalRuntime() as runtime:
        yield runtime


@pytest.fixture
def remote(hosts: Any) -> Iterator[Runtime]:
    with Runtime(hosts.names[0], connection_kwargs={"config_file": hosts.config_file}) as runtime:
        yield runtime


def run(runtime: Runtime, command: str, **options: Any) -> RuntimeTask:
    return runtime.execute_task(RuntimeTask("run").run_command(command), execute_async=False, **options)


def started(runtime: Runtime, command: str = "echo here; sleep 100", **options: Any) -> RuntimeTask:
    """A task whose command has begun."""
    task = runtime.execute_task(RuntimeTask("long").run_command(command), **options)
    process = task.process
    deadline = time.monotonic() + 20
    while process.pid is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.pid
    return task


# --- what a runtime is -----------------------------------------------------------------------------
def test_a_host_is_used_through_ssh(remote: Runtime, hosts: Any) -> None:
    host = hosts[0]
    assert run(remote, "hostname").execution_log == [f"{host.name}\n"]
    assert remote.host == host.name
    assert remote.class_name == "Runtime"
    assert remote.is_valid_runtime()
    assert remote.call(socket.gethostname) == host.name
    assert host.path(remote.working_dir).is_dir()
    assert remote.info["cpu_cores"] == remote.cpu_cores > 0
    assert remote.memory_in_mb == remote.memory // 2**20
    assert remote.os
    assert remote.python_version.startswith("3.")
    assert remote.gpu_count == len(remote.gpus)
    assert remote.refresh_info()["memory"]


def test_an_unusable_host_says_why(hosts: Any) -> None:
    with pytest.raises(InvalidRuntimeError) as raised:
        Runtime("no-such-host.invalid", connection_kwargs={"config_file": hosts.config_file})
    assert raised.value.reason == "dns"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"host": ""}, ValueError),
        ({"host": 3}, TypeError),
        ({"host": "h", "working_dir": ""}, ValueError),
        ({"host": "h", "connection_kwargs": {"pasword": "x"}}, ValueError),
        ({"host": "h", "env": {"A": None}}, TypeError),
        ({"host": "h", "setup": 3}, TypeError),
        ({"host": "h", "python": " "}, ValueError),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Runtime(**arguments)


def test_the_working_directory(tmp_path: Path) -> None:
    wanted = tmp_path / "with space" / "ü"
    with LocalRuntime(str(wanted)) as runtime:
        assert runtime.working_dir == str(wanted)
        assert run(runtime, "pwd; echo $WORKING_DIR").execution_log[0].splitlines() == [str(wanted)] * 2
        assert runtime.call(os.getcwd) == str(wanted)
    assert wanted.is_dir()
    with LocalRuntime() as runtime:
        temporary = runtime.working_dir
        assert Path(temporary).is_dir()
    assert not Path(temporary).exists()


def test_a_working_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRuntimeError, match="working directory") as raised:
        LocalRuntime(str(tmp_path / "file" / "below"))
    assert raised.value.reason == "working_dir"


def test_setup_lines_leave_their_environment() -> None:
    setup = 'export A="one\ntwo" PATH=/some/where:$PATH; echo noise'
    with LocalRuntime(setup=setup, env={"B": "$b'\""}, python=sys.executable) as runtime:
        task = RuntimeTask().run_command('printf "%s|%s" "$A" "$B"').call(os.getenv, "A")
        task.env_variables = {"B": "task"}
        runtime.execute_task(task, execute_async=False)
        assert task.execution_log[0] == "one\ntwo|task"
        assert task.result() == "one\ntwo"
        assert run(runtime, 'printf "%s" "$B"').execution_log == ["$b'\""]


def test_setup_lines_that_fail() -> None:
    with pytest.raises(InvalidRuntimeError, match="no-such-command") as raised:
        LocalRuntime(setup="set -e\nno-such-command --now")
    assert raised.value.reason == "setup"


def test_the_interpreter(tmp_path: Path) -> None:
    with LocalRuntime(python="auto") as runtime:
        assert runtime.call(lambda: __import__("sys").version_info[:2]) == sys.version_info[:2]
    with pytest.raises(InvalidRuntimeError) as raised:
        LocalRuntime(python=str(tmp_path / "no-python"))
    assert raised.value.reason == "python"


def test_environment_variables(local: LocalRuntime) -> None:
    value = 'it\'s "$HOME" `x`\nünï'
    local.env_variables = {"A": value, "N": 1}
    local.add_env_variables({"N": 2})
    assert local.env_variables == {"A": value, "N": "2"}
    assert run(local, 'printf "%s|%s" "$A" "$N"').execution_log == [f"{value}|2"]
    assert local.call(os.getenv, "A") == value
    local.env_variables["bad="] = "x"
    with pytest.raises(ValueError, match="bad="):
        run(local, "true")


# --- tasks -----------------------------------------------------------------------------------------
def test_one_log_entry_per_step(local: LocalRuntime, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    task = (
        RuntimeTask("steps")
        .run_command("echo out; echo err >&2; echo out")
        .call(print, "printed")
        .send_file(tmp_path / "data")
        .run_command("cat data")
        .run_command("true")
    )
    assert local.execute_task(task) is task
    log = task.execution_log
    assert [log[0], log[1], log[3], log[4]] == ["out\nerr\nout\n", "printed\n", "x", ""]
    assert "data" in log[2]
    assert task.status == "done"
    assert local.execution_log("steps") == log
    with pytest.raises(ValueError, match="steps"):
        local.execution_log("other")


def test_results_in_order_of_start(local: LocalRuntime) -> None:
    for number in range(5):
        local.execute_task(RuntimeTask().run_function(pow, base=number, exp=2).run_function(str, object=number))
    assert list(local.function_returns) == [0, "0", 1, "1", 4, "2", 9, "3", 16, "4"]
    assert local.execute_function(pow, base=2, exp=3).result() == 8
    assert local.call(dict, function=1, self=2, debug=3) == {"function": 1, "self": 2, "debug": 3}


def test_a_task_that_is_executed_again_is_a_copy(local: LocalRuntime) -> None:
    task = RuntimeTask("again").run_command("echo $RANDOM$$; sleep 0")
    first = local.execute_task(task)
    second = local.execute_task(task)
    third = task.execute(local)
    assert first is task
    assert len({id(first), id(second), id(third)}) == 3
    local.join()
    assert len({one.execution_log[0] for one in (first, second, third)}) == 3


def test_a_task_on_a_connection(local: LocalRuntime) -> None:
    assert RuntimeTask().run_command("pwd").execute(local._connection).execution_log == [f"{Path.home()}\n"]


def test_a_task_without_steps_and_one_that_runs(local: LocalRuntime) -> None:
    with pytest.raises(ValueError, match="no steps"):
        local.execute_task(RuntimeTask("empty"))
    with pytest.raises(TypeError):
        local.execute_task("ls")  # type: ignore[arg-type]
    task = started(local)
    with pytest.raises(LazyclusterError, match="being executed"):
        task.run_command("true")
    with pytest.raises(LazyclusterError, match="not been executed"):
        RuntimeTask("new").result()


def test_a_failed_command_tells_everything(local: LocalRuntime) -> None:
    task = RuntimeTask("bad").run_command("true").run_command("echo seen; echo why >&2; exit 3").run_command("true")
    with pytest.raises(TaskExecutionError) as raised:
        local.execute_task(task, execute_async=False)
    error = raised.value
    assert (error.host, error.task, error.step, error.exit_status) == ("localhost", "bad", 1, 3)
    assert error.output == "seen\nwhy\n"
    assert error.log_file == task.execution_log_file_path
    for part in ("localhost", "'bad'", "step 2 of 3", "exit status 3", "why", error.log_file):
        assert part in str(error)
    assert task.status == "failed"
    assert task.execution_log == ["", "seen\nwhy\n"]
    assert task.exception is error
    task.join()
    local.join()


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [
        ("no-such-command-here", 127, "not found"),
        ("kill -9 $$", -9, "SIGKILL"),
        ("kill -TERM $$", -15, "SIGTERM"),
    ],
)
def test_commands_that_end_otherwise(local: LocalRuntime, command: str, status: int, text: str) -> None:
    with pytest.raises(TaskExecutionError, match=text) as raised:
        run(local, command)
    assert raised.value.exit_status == status


def test_a_failed_function_shows_its_traceback(local: LocalRuntime) -> None:
    def divide(a: int, b: int) -> float:
        print("dividing")
        return a / b

    task = RuntimeTask("f").run_function(divide, a=1, b=0)
    with pytest.raises(TaskExecutionError, match="ZeroDivisionError") as raised:
        local.execute_task(task, execute_async=False)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert "divide" in str(raised.value)
    assert raised.value.output == "dividing\n"


@pytest.mark.parametrize(
    ("function", "status", "text"),
    [
        (lambda: os._exit(7), 7, "7"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, "SIGKILL"),
        (lambda: threading.Lock(), None, "pickle"),
        (lambda: __import__("no_such_module"), None, "no_such_module"),
    ],
)
def test_functions_that_end_otherwise(local: LocalRuntime, function: Any, status: int | None, text: str) -> None:
    with pytest.raises(TaskExecutionError, match=text) as raised:
        local.call(function)
    assert raised.value.exit_status == status
    assert local.call(len, "still there") == 11


def test_a_function_that_cannot_be_pickled(local: LocalRuntime) -> None:
    lock = threading.Lock()
    with pytest.raises(TaskExecutionError, match="pickle"):
        local.call(lambda: lock)


def test_a_failure_is_raised_once_and_stays_readable(local: LocalRuntime) -> None:
    task = local.execute_task(RuntimeTask("bad").run_command("exit 4"))
    other = local.execute_task(RuntimeTask("fine").call(len, "abc"))
    with pytest.raises(TaskExecutionError):
        task.join()
    task.join()
    local.join()
    for _ in range(2):
        with pytest.raises(TaskExecutionError):
            task.result()
    assert other.result() == 3
    assert list(local.function_returns) == [3]


def test_join_tells_all_failures_at_once(local: LocalRuntime) -> None:
    for number in (1, 2, 0):
        local.execute_task(RuntimeTask(f"n{number}").run_command(f"exit {number}"))
    with pytest.raises(GroupTaskError) as raised:
        local.join()
    assert [error.exit_status for error in raised.value.errors] == [1, 2]
    local.join()


def test_function_returns_raises(local: LocalRuntime) -> None:
    task = local.execute_task(RuntimeTask().call(len, "ab").run_command("false"))
    values = task.function_returns
    with pytest.raises(TaskExecutionError):
        next(values)
    assert list(task.function_returns) == [2]


def test_an_error_that_nobody_asked_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with LocalRuntime() as runtime:
        for number in range(3):
            runtime.execute_task(RuntimeTask(f"lost-{number}").run_command("exit 9"))
        asked = runtime.tasks[1]
        with pytest.raises(TaskExecutionError):
            asked.result()
        concurrent.futures.wait([task.future for task in runtime.tasks])
        runtime.clear_tasks()
        assert runtime.tasks == []
    del asked
    gc.collect()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "lost-0" in caplog.text
    assert "lost-1" not in caplog.text


def test_futures(local: LocalRuntime) -> None:
    tasks = [local.execute_task(RuntimeTask().call(pow, number, 2)) for number in range(5)]
    done = concurrent.futures.as_completed([task.future for task in tasks], timeout=30)
    assert sorted(future.result() for future in done) == [0, 1, 4, 9, 16]

    async def wrapped() -> Any:
        return await asyncio.wrap_future(tasks[3].future)

    assert asyncio.run(wrapped()) == 9


def test_waiting_with_a_limit(local: LocalRuntime) -> None:
    task = started(local)
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        task.join(0.01)
    with pytest.raises(TimeoutError):
        task.result(timeout=0.01)
    assert task.status == "running"
    assert task.future.running()


def test_cancelling_ends_the_whole_tree(local: LocalRuntime) -> None:
    task = started(local, "sleep 300 & setsid sleep 300 & echo begun; trap '' INT; wait")
    pid = task.process.pid
    assert task.cancel()
    task.join()
    assert task.status == "cancelled"
    assert task.process.exitcode == -15
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(concurrent.futures.CancelledError):
        task.result()
    assert not task.cancel()
    assert leaks.running("sleep 300") == []


def test_cancelling_at_any_moment(local: LocalRuntime) -> None:
    for number in range(40):
        task = local.execute_task(RuntimeTask().run_command("sleep 100"))
        time.sleep(number * 0.0002)
        assert task.cancel()
        task.join(20)
        assert task.status == "cancelled"
        with pytest.raises(concurrent.futures.CancelledError):
            task.result(0)


def test_handles_behave_like_processes(local: LocalRuntime) -> None:
    task = started(local)
    (handle,) = local.task_processes
    ((key, same),) = local.get_processes(only_alive=True).items()
    assert handle.is_alive()
    assert handle.exitcode is None
    assert handle.pid == same.pid == local.get_process(key).pid
    assert local.is_runtime_task_process(key)
    assert not local.is_port_exposure_process(key)
    assert (local.alive_process_count, local.alive_task_process_count) == (1, 1)
    handle.join(0.01)
    assert handle.is_alive()
    handle.kill()
    handle.join()
    assert handle.exitcode == -9
    assert (local.alive_process_count, local.alive_task_process_count) == (0, 0)
    assert task.name in repr(handle)
    with pytest.raises(ValueError, match="nope"):
        local.get_process("nope")
    with pytest.raises(ValueError, match="nope"):
        local.stop_process("nope")
    again = started(local)
    key = next(iter(local.get_processes(only_alive=True)))
    local.stop_process(key)
    assert again.status == "cancelled"


def test_a_cancelled_function_ends(local: LocalRuntime) -> None:
    def wait_for_ever() -> None:
        print("begun", flush=True)
        time.sleep(300)

    task = local.execute_task(RuntimeTask().run_function(wait_for_ever))
    process = task.process
    while process.pid is None:
        time.sleep(0.01)
    pid = process.pid
    task.cancel()
    task.join(20)
    assert not Path(f"/proc/{pid}").exists()


def test_a_service_is_not_waited_for(local: LocalRuntime) -> None:
    task = started(local, "echo up; exec sleep 100", omit_on_join=True)
    local.join()
    assert task.status == "running"
    assert task.execution_log == []
    assert list(local.function_returns) == []
    task.cancel()
    task.join()
    assert task.execution_log == ["up\n"]


def test_output_of_all_kinds(local: LocalRuntime) -> None:
    assert run(local, "printf 'no newline'").execution_log == ["no newline"]
    task = run(local, r"printf 'a\377\376b\n'")
    assert task.execution_log == ["a\ufffd\ufffdb\n"]
    assert Path(task.execution_log_file_path).read_bytes() == b"a\xff\xfeb\n"


def test_much_output_is_streamed_to_the_file(local: LocalRuntime) -> None:
    task = run(local, "head -c 50000000 /dev/zero | tr '\\0' x; echo end")
    assert Path(task.execution_log_file_path).stat().st_size == 50_000_004
    (entry,) = task.execution_log
    assert len(entry) < 1_100_000
    assert entry.endswith("xend\n")
    assert task.execution_log_file_path in entry


def test_debug_prints_live(local: LocalRuntime, capsys: pytest.CaptureFixture[str]) -> None:
    run(local, "echo one; printf two", debug=True)
    assert capsys.readouterr().out == "[localhost] one\n[localhost] two\n"


def test_output_is_logged_after_each_step(local: LocalRuntime, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "lazycluster"):
        run(local, "echo one")
    assert "one" in caplog.text


def test_logs_are_printed(local: LocalRuntime, capsys: pytest.CaptureFixture[str]) -> None:
    run(local, "echo hello")
    local.print_log()
    local.print_info()
    printed = capsys.readouterr().out
    assert "hello" in printed
    assert local.working_dir in printed


# --- files -----------------------------------------------------------------------------------------
def test_files_both_ways(remote: Runtime, hosts: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\0\xff" * 100)
    task = remote.send_file(tmp_path / "data", "some/where/")
    assert task.status == "done"
    assert hosts[0].path(remote.working_dir + "/some/where/data").read_bytes() == b"\0\xff" * 100
    remote.get_file("some/where/data", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"\0\xff" * 100
    waited = remote.send_file(tmp_path / "data", execute_async=True)
    waited.join()
    assert "200 bytes" in waited.execution_log[0]


def test_files_that_are_not_there(local: LocalRuntime, tmp_path: Path) -> None:
    for copy_it in (lambda: local.send_file(tmp_path / "none"), lambda: local.get_file("none", tmp_path / "x")):
        with pytest.raises(TaskExecutionError, match="none"):
            copy_it()
    for wrong in (lambda: local.send_file(""), lambda: local.get_file("")):
        with pytest.raises(ValueError, match="empty"):
            wrong()


# --- directories -----------------------------------------------------------------------------------
def test_directories(local: LocalRuntime, tmp_path: Path) -> None:
    local.create_dir("a/b 'c'/d")
    assert Path(local.working_dir, "a/b 'c'/d").is_dir()
    local.create_dir("a")
    assert local.delete_dir("a")
    assert not Path(local.working_dir, "a").exists()
    assert local.delete_dir("a")
    made = local.create_tempdir()
    assert Path(made).is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(PathCreationError):
        local.create_dir(str(tmp_path / "file" / "below"))
    for wrong in ("", "\0", str(tmp_path / "file")):
        with pytest.raises(ValueError, match=r"."):
            local.delete_dir(wrong)
    assert (tmp_path / "file").exists()
    assert local.echo("it's $HOME\n") == "it's $HOME\n"


def test_directories_that_are_never_deleted(hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    host = hosts[0]
    host.run(
        "mkdir -p ~/work/sub ~/other && echo years > ~/thesis && ln -s / ~/root && ln -s ~ ~/again", user=host.user
    )
    kwargs = {"config_file": hosts.config_file}
    with Runtime(host.name, working_dir="~/work", connection_kwargs=kwargs, env={"NONE": ""}) as runtime:
        home = host.home  # a file system of this host alone: if this fails, nothing else is lost
        spellings = ("~", "~/", "~/.", "~/work/..", "..", "../", f"/{home}", f"{home}//", f"{home}/./", "$HOME")
        for path in (*spellings, f"~/root{home}", f"~/again/../{host.user}", "~/again/again/../."):
            with pytest.raises(ValueError, match=r"home directory(.|\n)*Next step"):
                runtime.delete_dir(path)
        for path in (".", "./", "sub/..", "$NONE", "~/work", f"//{home}/work/", "~/again/work"):
            with pytest.raises(ValueError, match="the working directory"):
                runtime.delete_dir(path)
        assert host.path("~/thesis").read_text() == "years\n"
        assert host.path("~/work/sub").is_dir()
        assert runtime.delete_dir("$UNSET/none")
        assert runtime.delete_dir("../other/")
        assert runtime.delete_dir("~/again/.")  # the link alone
        assert not host.path("~/again").is_symlink()
        assert host.path("~/thesis").exists()
        host.run("mkdir -p ~/part/kept ~/part/gone && touch ~/part/kept/file && chmod 500 ~/part/kept", user=host.user)
        assert not runtime.delete_dir("~/part")
        assert f"{home}/part/kept/file" in caplog.text
        assert not host.path("~/part/gone").exists()
        host.run("chmod 700 ~/part/kept", user=host.user)
        assert runtime.delete_dir("~/part")
    host.run("rm -r ~/work ~/thesis ~/root", user=host.user)


def test_what_is_mounted_in_a_directory_stays(remote: Runtime, hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    host = hosts[0]
    host.run("mkdir -p ~/work/sub/mount ~/work/bound ~/precious && echo years > ~/precious/data", user=host.user)
    home, temporary = host.home, remote.create_tempdir()
    host.run(f"mkdir {temporary}/bound && chmod 777 {temporary}/bound")
    host.run(f"mount -t tmpfs -o mode=0777 tmpfs {home}/work/sub/mount && echo years > {home}/work/sub/mount/data")
    host.run(f"chmod 666 {home}/work/sub/mount/data")
    for place in (f"{home}/work/bound", f"{temporary}/bound"):  # the same file system once more
        host.run(f"mount --bind {home}/precious {place}")
    try:
        for path in ("~/work/sub/mount", "~/work/bound"):
            with pytest.raises(ValueError, match="mount point"):
                remote.delete_dir(path)
        assert not remote.delete_dir("~/work")
        assert "is a mount point; unmount it first" in caplog.text
        assert host.path("~/work/sub/mount/data").read_text() == "years\n"
        remote.cleanup()  # nor does what is removed at the end lead there
        assert host.path("~/precious/data").read_text() == "years\n"
    finally:
        host.run(f"umount {home}/work/sub/mount {home}/work/bound {temporary}/bound")
        host.run(f"rm -r {home}/work {home}/precious {os.path.dirname(temporary)}")


def test_a_home_that_is_mounted_from_elsewhere_is_the_home(hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    host = hosts[0]
    host.run("mkdir -p ~/disk/homes/me ~/disk/other ~/me && echo years > ~/disk/homes/me/thesis", user=host.user)
    host.run(f"mount --bind {host.home}/disk/homes/me {host.home}/me")
    kwargs = {"config_file": hosts.config_file}
    try:
        with Runtime(host.name, connection_kwargs=kwargs, env={"HOME": f"{host.home}/me"}) as runtime:
            for path in ("~", f"{host.home}/disk/homes/me"):
                with pytest.raises(ValueError, match="it is the home directory"):
                    runtime.delete_dir(path)
            assert not runtime.delete_dir(f"{host.home}/disk")  # no path of the home leads through it
            assert "it is the home directory" in caplog.text
        assert host.path("~/disk/homes/me/thesis").read_text() == "years\n"
        assert not host.path("~/disk/other").exists()
    finally:
        host.run(f"umount {host.home}/me")
        host.run("rm -r ~/disk ~/me", user=host.user)


def test_the_directory_that_this_process_is_in_is_not_deleted(
    local: LocalRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "here")
    for path in ("project", "project/here"):
        with pytest.raises(ValueError, match="the working directory of this process"):
            local.delete_dir(str(tmp_path / path))
    (tmp_path / "project" / "here").rmdir()
    assert local.delete_dir(str(tmp_path / "project"))


# --- filters ---------------------------------------------------------------------------------------
def test_filters(local: LocalRuntime) -> None:
    assert local.check_filter()
    assert local.check_filter(min_memory=1, min_cpu_cores=1, installed_executables=["sh", "ls"])
    assert not local.check_filter(min_memory=10**9)
    assert not local.check_filter(min_cpu_cores=10**6)
    assert not local.check_filter(installed_executables=["sh", "no-such-'program"])
    assert local.check_filter(filter_commands=["echo noise; echo true", '[ -n "$HOME" ] && echo True'])
    assert not local.check_filter(filter_commands="echo false")
    assert not local.check_filter(filter_commands="true")
    assert local.check_filter(gpu_required=True) is bool(local.gpu_count)
    for wrong in ({"min_memory": -1}, {"installed_executables": ""}, {"filter_commands": [" "]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            local.check_filter(**wrong)
    with pytest.raises(TypeError):
        local.check_filter(min_cpu_cores="2")


# --- ports -----------------------------------------------------------------------------------------
def test_ports(remote: Runtime, local: LocalRuntime) -> None:
    assert not remote.has_free_port(22)
    assert remote.has_free_port(6123)
    assert remote.get_free_port([22, 6123, 6124]) == 6123
    with pytest.raises(NoPortsLeftError, match="22"):
        remote.get_free_port([22])
    with pytest.raises(NoPortsLeftError):
        remote.get_free_port([])
    for wrong in (0, 65536, -1):
        with pytest.raises(ValueError, match="port"):
            remote.has_free_port(wrong)
    for strange in ("22", True, 1.5):
        with pytest.raises(TypeError):
            remote.has_free_port(strange)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 6125)):
        assert not local.has_free_port(6125)
        assert remote.has_free_port(6125)


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


def test_a_port_of_the_manager_on_the_host(remote: Runtime, greeter: int) -> None:
    key = remote.expose_port_to_runtime(greeter, [22, 6200])
    assert remote.is_port_exposure_process(key)
    assert not remote.is_runtime_task_process(key)
    assert remote.call(fetch, 6200) == b"hello"
    handle = remote.get_process(key)
    assert handle.is_alive()
    with pytest.raises(PortInUseError):
        remote.expose_port_to_runtime(greeter, 6200)
    remote.stop_process(key)
    assert not handle.is_alive()
    assert handle.exitcode == 0
    assert remote.has_free_port(6200)


def test_a_port_of_the_host_on_the_manager(remote: Runtime, greeter: int) -> None:
    remote.expose_port_to_runtime(greeter, 6201)
    key = remote.expose_port_from_runtime(6201, 6202)
    assert fetch(6202) == b"hello"
    with pytest.raises(PortInUseError):
        remote.expose_port_from_runtime(6201, greeter)
    remote.get_process(key).terminate()
    with pytest.raises(OSError, match="refused"):
        fetch(6202)


def _kill_ssh(runtime: Runtime) -> None:
    process: Any = runtime._connection._process
    os.kill(process.pid, signal.SIGKILL)


def test_whoever_waits_for_an_exposure_learns_of_its_end(hosts: Any, greeter: int) -> None:
    for end in (Runtime.cleanup, _kill_ssh):
        settings = {"config_file": hosts.config_file, "reconnect": 0, "grace": 1, "link_timeout": 2}
        with Runtime(hosts.names[0], connection_kwargs=settings) as runtime:
            handle = runtime.get_process(runtime.expose_port_to_runtime(greeter))
            handle.join(0.01)
            assert handle.is_alive()
            waiting = threading.Thread(target=handle.join)
            waiting.start()
            end(runtime)
            waiting.join(60)
            assert not waiting.is_alive()
            assert not handle.is_alive()
        until(lambda: not hosts[0].leftovers(), "the end of the grace")


# --- the end, and other processes and threads ------------------------------------------------------
def test_use_after_cleanup(caplog: pytest.LogCaptureFixture) -> None:
    runtime = LocalRuntime()
    task = started(runtime)
    runtime.cleanup()
    runtime.cleanup()
    assert task.status == "cancelled"
    assert task.execution_log == ["here\n"]
    task.join()
    for use in (
        lambda: runtime.execute_task(RuntimeTask().run_command("true")),
        lambda: runtime.call(len, ""),
        lambda: runtime.has_free_port(80),
        lambda: runtime.expose_port_to_runtime(80),
        lambda: runtime.info,
        lambda: runtime.create_tempdir(),
    ):
        with pytest.raises(LazyclusterError, match="cleanup"):
            use()
    assert not runtime.is_valid_runtime()
    assert not caplog.records


def test_a_runtime_that_nobody_holds_lets_go_of_its_host() -> None:
    runtime = LocalRuntime()
    directory = runtime.working_dir
    connection = runtime._connection
    del runtime
    gc.collect()
    deadline = time.monotonic() + 10
    while Path(directory).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(directory).exists()
    assert connection.state == "closed"


def test_a_running_task_keeps_its_host() -> None:
    task = LocalRuntime().execute_task(RuntimeTask().run_command("sleep 0.2; echo end"))
    gc.collect()
    assert task.execution_log == ["end\n"]
    del task
    gc.collect()


def test_a_runtime_is_not_copied(local: LocalRuntime) -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="live connection"):
            duplicate(local)
    with pytest.raises(TaskExecutionError, match="'local'"):
        local.call(lambda: local.host)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told(local: LocalRuntime) -> None:
    task = started(local)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = []
        for use in (lambda: run(local, "true"), task.join, lambda: local.has_free_port(80), lambda: local.info):
            try:
                use()
            except LazyclusterError as error:
                said.append("forked child" in str(error))
        local.cleanup()
        os.write(write, repr(said).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as answers:
        assert answers.read() == "[True, True, True, True]"
    assert task.status == "running"


def test_many_threads(local: LocalRuntime) -> None:
    def use(number: int) -> tuple[str, int]:
        return run(local, f"echo {number}").execution_log[0], local.call(pow, number, 2)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(24))) == [(f"{number}\n", number**2) for number in range(24)]


def test_inside_a_running_event_loop() -> None:
    async def use() -> list[str]:
        with LocalRuntime() as runtime:
            return run(runtime, "echo hello").execution_log

    assert asyncio.run(use()) == ["hello\n"]


def test_many_tasks_need_no_threads(local: LocalRuntime) -> None:
    local.call(len, "")
    before = threading.active_count()
    tasks = [local.execute_task(RuntimeTask().run_command("sleep 0.2")) for _ in range(100)]
    assert threading.active_count() == before
    local.join()
    assert {task.status for task in tasks} == {"done"}


def program(text: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(text), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_ctrl_c_ends_a_task_that_is_waited_for() -> None:
    process = program(
        """
        from lazycluster import LocalRuntime, RuntimeTask
        with LocalRuntime() as runtime:
            task = RuntimeTask().run_command("echo begun; sleep 300")
            try:
                runtime.execute_task(task, execute_async=False, debug=True)
            except KeyboardInterrupt:
                print("interrupted", task.status, flush=True)
        """
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "[localhost] begun\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("interrupted cancelled\n", "", 0)


def test_the_end_of_the_interpreter_cleans_up_and_tells() -> None:
    process = program(
        """
        from lazycluster import LocalRuntime, RuntimeTask
        runtime = LocalRuntime()
        print(runtime.working_dir)
        task = runtime.execute_task(RuntimeTask("lost").run_command("exit 5"))
        running = runtime.execute_task(RuntimeTask().run_command("sleep 300"))
        task.process.join()
        """
    )
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "'lost'" in err
    assert "exit status 5" in err
    assert not Path(out.strip()).exists()
