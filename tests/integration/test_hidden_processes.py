"""Hosts on which /proc hides other users' processes, and sshd's with them: tasks outlive the link all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from lazycluster import Runtime, RuntimeTask
from lazycluster.exceptions import TaskExecutionError
from patience import until

# Such a session is a child of the host's first process, and sshd waits for it all the same.
_ALONE = 'exec 3<&0 4>&1; { setsid -f $SHELL -c "$SSH_ORIGINAL_COMMAND" <&3 9>&1 >&4 3<&- 4>&-; } | cat >/dev/null'


def connect(pool: Any, **more: Any) -> Runtime:
    return Runtime("host1", connection_kwargs={"config_file": pool.config_file, **more})


def wait_for(path: str) -> RuntimeTask:
    return RuntimeTask("wait").run_command(f"until test -e {path}; do sleep 0.05; done; echo done")


def drop_link(host: Any, runtime: Runtime) -> None:
    """End sshd's processes of the connection; return when the link is back."""
    connection = runtime._session.connection
    before = connection.interruptions
    for session in host.sessions():
        os.kill(session.pid, signal.SIGKILL)
    until(lambda: connection.interruptions > before and connection.state == "open", "the link to be back")


@pytest.mark.parametrize(("mode", "python"), [("hidepid=2", None), ("hidepid=1", "3.8")])
def test_what_runs_outlives_the_link(make_hosts: Any, mode: str, python: str | None) -> None:
    pool = make_hosts(1, python=python)
    host = pool[0]
    host.run(["mount", "-o", f"remount,{mode}", "/proc"])
    with connect(pool) as runtime:
        task = wait_for("~/go")
        runtime.execute_task(task)
        drop_link(host, runtime)
        drop_link(host, runtime)  # of the second sshd the agent has to learn by itself
        host.path("~/go").touch()
        runtime.join()
        assert task.execution_log[0].strip() == "done"
    host.path("~/go").unlink()


_MANAGER = """
import sys
from lazycluster import Runtime, RuntimeTask
runtime = Runtime("host1", connection_kwargs={"config_file": sys.argv[1]})
port = runtime.expose_port_to_runtime(22222) if hasattr(runtime, "expose_port_to_runtime") else None
runtime.execute_task(RuntimeTask("wait").run_command("touch ~/runs; exec sleep 600"))
runtime.join()
"""


def test_a_host_is_clean_after_the_manager_was_killed(make_hosts: Any) -> None:
    pool = make_hosts(1)
    host = pool[0]
    host.run(["mount", "-o", "remount,hidepid=2", "/proc"])
    with subprocess.Popen([sys.executable, "-c", _MANAGER, pool.config_file]) as manager:
        until(host.path("~/runs").exists, "the task to run")
        manager.kill()
    until(lambda: not host.leftovers(), "the host to be clean")
    host.path("~/runs").unlink()


# As ssh-agent does: nobody but root may look at it, so that it is hidden too; and it leaves the tree that it came from.
_HIDES = (
    "import ctypes, os, time; ctypes.CDLL(None).prctl(4, 0); os.fork() and os._exit(0); os.setsid(); time.sleep(600)"
)


def test_what_hides_itself_is_ended_too(make_hosts: Any) -> None:
    pool = make_hosts(1)
    host = pool[0]
    host.run(["mount", "-o", "remount,hidepid=2", "/proc"])
    with connect(pool) as runtime:
        task = RuntimeTask("hide").run_command(f"python3 -c '{_HIDES}' >/dev/null 2>&1 </dev/null")
        runtime.execute_task(task, execute_async=False)
        assert any("prctl" in str(found) for found in host.processes())
    assert [found for found in host.processes() if "prctl" in str(found)] == []


def test_where_the_manager_cannot_be_told_from_the_link_it_is_said(make_hosts: Any) -> None:
    pool = make_hosts(1, sshd={"ForceCommand": _ALONE})
    host = pool[0]
    done = subprocess.run(
        [sys.executable, "-m", "lazycluster", "doctor", "host1", "--json", "--config", pool.config_file],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "what runs there ends when the link drops: the agent finds no sshd" in done.stdout, done.stdout + done.stderr
    json.loads(done.stdout)
    with connect(pool) as runtime:
        runtime.execute_task(wait_for("~/go"))
        for session in host.sessions():
            os.kill(session.pid, signal.SIGKILL)
        with pytest.raises(TaskExecutionError, match="has ended with the link: the agent finds no sshd"):
            runtime.join()
