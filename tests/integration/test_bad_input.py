"""What users do wrong, and what happens to them, on real hosts: a clear error at once, and nothing lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from lazycluster import LocalRuntime, Runtime, RuntimeGroup, RuntimeManager, RuntimeTask
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
from lazycluster.core import event_loop
from lazycluster.exceptions import (
    InvalidRuntimeError,
    InvalidRuntimesError,
    LazyclusterError,
    PortInUseError,
    TaskExecutionError,
)


@pytest.fixture
def local():
    with LocalRuntime() as runtime:
        yield runtime


def kwargs(hosts):
    return {"connection_kwargs": {"config_file": str(hosts.config_file)}}


def failure(**arguments):
    with pytest.raises(InvalidRuntimeError) as caught:
        LocalRuntime(**arguments)
    assert "Next step" in str(caught.value)
    return caught.value


# --- tasks -----------------------------------------------------------------------------------------
def memory():
    """Return how many bytes this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_gigabyte_of_output_without_a_newline(local):
    before = most = memory()
    task = local.execute_task(RuntimeTask("much").run_command("head -c 1000000000 /dev/zero"))
    while concurrent.futures.wait([task.future], 0.05).not_done:
        most = max(most, memory())
    (entry,) = task.execution_log
    log = Path(task.execution_log_file_path)
    size = log.stat().st_size
    log.unlink()
    assert size == 1_000_000_000
    assert len(entry) < 1_100_000
    assert most - before < 60_000_000


def test_the_log_says_why_a_step_failed(local, capsys):
    task = local.execute_task(RuntimeTask("copy").run_command("echo first").get_file("/no/such/file"))
    with pytest.raises(TaskExecutionError):
        task.join()
    task.print_log()
    printed = capsys.readouterr().out
    assert "first" in printed
    assert "No such file or directory" in printed


def test_a_task_whose_directory_has_gone(local):
    local.execute_task(RuntimeTask().run_command("rmdir $PWD"), execute_async=False)
    for use in (lambda: local.call(len, ""), lambda: RuntimeTask().run_command("true").execute(local)):
        with pytest.raises(TaskExecutionError, match=r"the working directory .* cannot be used: No such file"):
            use()


def test_a_forked_child_ends_nothing(local):
    task = local.execute_task(RuntimeTask().run_command("sleep 100"))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, repr(task.cancel()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"False"
    assert task.status in ("pending", "running")
    os.close(read)
    os.close(write)


def test_tasks_as_futures_of_an_event_loop(hosts):
    async def use():
        with RuntimeGroup(hosts=["host1", "host2"], **kwargs(hosts)) as group:
            task = RuntimeTask("both").run_command("hostname").call(len, "abc")
            tasks = group.execute_task(task, broadcast=True)
            results = await asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))
            endless = group.execute_task(RuntimeTask("endless").run_command("sleep 100"))
            waiting = asyncio.wrap_future(endless.future)
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            await asyncio.sleep(0)  # the cancellation is handed on by a callback
            endless.join(20)
            return results, endless.status

    assert asyncio.run(use()) == ([3, 3], "cancelled")


def test_a_callback_of_the_library_is_not_the_place_to_wait(local):
    said, over = [], threading.Event()

    def callback(future):
        for use in (lambda: local.call(len, "a"), lambda: local.has_free_port(1025)):
            try:
                use()
            except (LazyclusterError, RuntimeError) as error:
                said.append(str(error))
        over.set()

    local.execute_task(RuntimeTask().call(len, "abc")).future.add_done_callback(callback)
    assert over.wait(10)
    assert ["callback" in text for text in said] == [True, True]
    assert local.call(len, "abcd") == 4


def test_what_cannot_be_sent_is_named(local):
    lock = threading.Lock()
    with pytest.raises(TaskExecutionError, match=r"its variable 'lock' of the enclosing function is a _thread\.lock"):
        local.call(lambda: lock)


# --- set-up ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shell", [None, "dash", "zsh"])
def test_setup_lines_that_fail_are_not_passed_over(shell):
    error = failure(setup="export A=1\nconda-that-is-not-there activate ml", shell=shell)
    assert error.reason == "setup"
    assert "conda-that-is-not-there" in str(error)
    assert "failed with exit status" in str(error)


def test_setup_lines_that_fail_in_the_middle():
    assert "exit status 127" in str(failure(setup="no-such-module load cuda\nexport A=1"))
    assert "exit status 2" in str(failure(setup="if true; then"))
    assert "leave out the exit" in str(failure(setup="export A=1\nexit 0"))
    assert "signal 9" in str(failure(setup="kill -9 $$"))


def test_setup_lines_may_source_what_is_not_so_strict(tmp_path):
    script = tmp_path / "activate"
    script.write_text("false\n[ -f /no-such-file ] && echo there\nexport A=sourced\n")
    lines = f"[ -f /no-such-file ] && echo there\nfalse || true\n. '{script}'\n[ -f /no-such-file ] && echo there"
    with LocalRuntime(setup=lines) as runtime:
        task = RuntimeTask().run_command('printf "%s" "$A"')
        assert runtime.execute_task(task, execute_async=False).execution_log == ["sourced"]


# --- hosts -----------------------------------------------------------------------------------------
def test_a_program_that_is_no_python(hosts):
    with pytest.raises(InvalidRuntimeError, match="is /bin/sh a Python interpreter") as caught:
        Runtime("host1", python="/bin/sh", **kwargs(hosts))
    assert caught.value.host == "host1"


def test_a_working_directory_that_is_a_file(hosts):
    with pytest.raises(InvalidRuntimeError, match="not a directory: /etc/passwd") as caught:
        Runtime("host1", "/etc/passwd", **kwargs(hosts))
    assert caught.value.reason == "working_dir"


def test_a_working_directory_that_no_host_can_make(hosts):
    with RuntimeManager(config_file=hosts.config_file) as manager:
        with pytest.raises(InvalidRuntimesError) as caught:
            manager.create_group(include_hosts=["host1", "host2"], working_dir="/proc/no/where")
        assert [error.host for error in caught.value.errors] == ["host1", "host2"]
        assert caught.value.reason == "working_dir"


def test_settings_with_patterns_only():
    with pytest.raises(ValueError, match=r"only patterns \(gpu-\*\): give hosts, too"):
        RuntimeGroup(settings={"gpu-*": {"user": "me"}})


def test_environment_variables_that_are_none(hosts):
    with RuntimeGroup(hosts=["host1"], **kwargs(hosts)) as group:
        for use in (group.set_env_variables, group.add_env_variables):
            with pytest.raises(TypeError, match="must be a dictionary, not str"):
                use("A=1")


def test_a_lost_host_is_given_no_more_tasks(make_hosts):
    hosts = make_hosts(2)
    settings = {"connection_kwargs": {"config_file": hosts.config_file, "grace": 0}}
    with RuntimeGroup(hosts=["host1", "host2"], **settings) as group:
        lost = group.execute_task(RuntimeTask("lost").run_command("sleep 100"), host="host1")
        hosts[0].run("pkill -9 -u lazy sshd")
        with pytest.raises(TaskExecutionError, match=r"(?s)host1: the connection was lost.*Next step"):
            lost.join()
        for _ in range(3):
            assert group.execute_task(RuntimeTask().call(os.getpid), execute_async=False).host == "host2"
        with pytest.raises(LazyclusterError, match="host1: the connection was lost"):
            group.execute_task(RuntimeTask().call(os.getpid), host="host1")


def test_a_closed_group_takes_no_more_hosts(hosts):
    group = RuntimeGroup(hosts=["host1"], **kwargs(hosts))
    group.cleanup()
    with pytest.raises(LazyclusterError, match="the group was closed"):
        group.add_runtime("host2")
    assert group.hosts == ["host1"]


def test_a_closed_manager_says_so(hosts):
    manager = RuntimeManager(config_file=hosts.config_file)
    manager.cleanup()
    for use in (manager.create_group, manager.print_runtime_info):
        with pytest.raises(LazyclusterError, match="the RuntimeManager was closed"):
            use()


# --- ports -----------------------------------------------------------------------------------------
def test_a_port_in_use_tells_where_and_what_to_do():
    assert "in use on host1" in str(PortInUseError(8786, "host1"))
    text = str(PortInUseError(8786))
    assert "the manager" in text
    assert "Next step: name another port, or a list" in text


# --- what would end a process, on threads that everything depends on ----------------------------------
class Ending:
    """What unpickling this does, a script does that is imported for a result and finds its arguments wrong."""

    def __reduce__(self):
        return sys.exit, ("wrong usage",)


class EndingError(Exception):
    def __reduce__(self):
        return sys.exit, ("wrong usage",)


def ending(raises=False, size=0):
    if raises:
        raise EndingError("the real one")
    return Ending(), bytes(size)


def test_what_ends_the_process_that_unpickles_it_ends_no_thread_of_ours(local):
    for size in (0, 2_000_000):  # small results are unpickled by the thread of the event loop, large ones by another
        with pytest.raises(TaskExecutionError, match=r"cannot be unpickled here: .*SystemExit: wrong usage"):
            local.call(ending, size=size)
    with pytest.raises(TaskExecutionError, match="EndingError: the real one"):
        local.call(ending, raises=True)
    group = RuntimeGroup([local])
    with group.executor(1) as executor:
        failed = [executor.submit(ending), executor.submit(ending, raises=True)]
        for future in failed:
            assert isinstance(future.exception(30), TaskExecutionError)
        assert executor.submit(pow, 2, 3).result(30) == 8
    results = group.map(ending, [False, True])
    with pytest.raises(TaskExecutionError, match="SystemExit: wrong usage"):
        next(results)
    assert local.call(pow, 2, 4) == 16


def test_callbacks_that_want_to_end_the_process_end_no_thread_of_ours(caplog):
    called = []

    def callback(*arguments):
        called.append(arguments)
        sys.exit("enough")

    with LocalRuntime() as local, RuntimeGroup([local]) as group:
        task = local.execute_task(RuntimeTask().run_command("sleep 0.2"))
        task.future.add_done_callback(callback)
        task.join()
        with group.executor(1) as executor:
            future = executor.submit(time.sleep, 0.2)
            future.add_done_callback(callback)
            assert executor.submit(pow, 2, 3).result(30) == 8
        event_loop.get_loop().call_soon_threadsafe(callback)
        assert local.call(pow, 2, 3) == 8
        group.on_state(callback)
    assert len(called) >= 4
    assert len([record for record in caplog.records if record.exc_info]) == len(called)


def test_whoever_waits_for_a_thread_is_told_that_it_raised_stop_iteration():
    with pytest.raises(RuntimeError, match="next raised StopIteration"):
        event_loop.run(event_loop.in_thread(next, iter([])), 30)


# --- files that are missing ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda local, path: local.send_file(path / "no"), "No such file"),
        (lambda local, _: local.get_file("no"), "No such file"),
        (lambda local, path: local.execute_task(RuntimeTask().send_file(path / "no"), execute_async=False), "No such"),
        (lambda local, _: local.execute_task(RuntimeTask().get_file("no")).join(), "No such file"),
        (lambda local, path: local.send_file(path / "file", f"{path}/file/sub"), "is a file, not a directory"),
        (lambda local, path: local.get_file("/etc/passwd", f"{path}/file/sub"), "is a file, not a directory"),
        (lambda local, path: local.create_dir(f"{path}/file/sub"), "Not a directory"),
        (lambda _, path: LocalRuntime(working_dir=f"{path}/file/sub"), "the working directory"),
        (lambda _, path: LocalRuntime(python=str(path / "python")), "No such file"),
        (lambda _, path: LocalRuntime(environment=str(path / "requirements.txt")), "no such file"),
        (lambda _, path: Runtime("h", connection_kwargs={"config_file": str(path / "no")}), "no readable file"),
        (lambda _, path: RuntimeGroup(hosts=["h"], settings=path / "no.toml"), "No such file"),
        (lambda _, path: DaskCluster.connect(path / "no"), "no such connection file"),
        (lambda _, path: DaskCluster.connect(path / "file" / "sub"), "Not a directory"),
        (lambda _, path: HyperoptCluster.connect(path / "file" / "sub"), "Not a directory"),
    ],
)
def test_a_file_that_is_missing_or_in_the_way_is_one_error(local, tmp_path, action, said):
    (tmp_path / "file").touch()
    with pytest.raises((LazyclusterError, ValueError)) as caught:
        action(local, tmp_path)
    shown = "".join(traceback.format_exception(caught.value))
    assert said in str(caught.value)
    assert shown.count("Traceback (most recent call last)") == 1, shown


def test_the_one_error_of_a_copy_has_the_next_step(local, tmp_path):
    for copy in (lambda: local.send_file(tmp_path / "no"), lambda: local.get_file("no")):
        with pytest.raises(TaskExecutionError, match=r"No such file or directory\n  Next step: check the path"):
            copy()


def test_a_function_that_cannot_be_sent_is_one_error(local):
    lock = threading.Lock()
    with pytest.raises(TaskExecutionError, match="cannot be sent to a host") as caught:
        local.call(lambda: lock)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback (most recent call last)") == 1, shown


def test_what_a_function_has_raised_stays_the_cause(local, tmp_path):
    with pytest.raises(TaskExecutionError) as caught:
        local.call(open, str(tmp_path / "no"))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
