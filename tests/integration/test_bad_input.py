"""What users do wrong, and what happens to them, on real hosts: a clear error at once, and nothing lost."""

from __future__ import annotations

import threading

import pytest

from lazycluster import LocalRuntime, Runtime, RuntimeGroup, RuntimeManager, RuntimeTask
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
def test_cancelled_before_it_has_begun(local):
    for _ in range(5):
        task = local.execute_task(RuntimeTask("never").run_command("sleep 100"))
        task.cancel()
        task.join(10)
        assert task.status == "cancelled"
    assert local.alive_task_process_count == 0


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
