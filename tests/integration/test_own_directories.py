"""Hosts on which every session has a /tmp of its own, as sessions in containers have."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazycluster import Runtime, RuntimeTask
from lazycluster.exceptions import TaskExecutionError
from lazycluster.ssh.agent_program import NO_AGENT, bulk_command
from patience import until

pytestmark = pytest.mark.skipif(
    any(
        Path(path).is_relative_to(place)
        for path in (sys.prefix, __file__)
        for place in ("/tmp", "/var/tmp", "/dev/shm")
    ),
    reason="these tests hide the directories for temporary files, and with them this checkout or its Python",
)

_ALL = ("/tmp", "/var/tmp", "/dev/shm")


def connect(pool: Any, **more: Any) -> Runtime:
    return Runtime("host1", connection_kwargs={"config_file": pool.config_file, **more})


def entries(host: Any) -> list[str]:
    return sorted(host.run(["find", *_ALL, host.home, "-name", "*lazycluster*"]).stdout.splitlines())


@pytest.mark.parametrize(
    ("user", "own"),
    [
        ("root", _ALL),  # the further session goes through /proc
        ("lazy", ("/tmp",)),  # and this one, which may not, through /var/tmp
        ("lazy", _ALL),  # or through the home directory
    ],
)
def test_files_are_copied_to_where_commands_see_them(
    make_hosts: Any, tmp_path: Path, user: str, own: tuple[str, ...]
) -> None:
    pool = make_hosts(1, user=user, own=own)
    (tmp_path / "file").write_text("contents")
    with connect(pool) as runtime:
        runtime.send_file(tmp_path / "file", "/tmp/there")
        task = RuntimeTask("look").run_command("cat /tmp/there && echo more >>/tmp/there")
        runtime.execute_task(task, execute_async=False)
        assert task.execution_log[0].strip() == "contents"
        runtime.get_file("/tmp/there", tmp_path / "back")
        assert (tmp_path / "back").read_text() == "contentsmore\n"
    until(lambda: entries(pool[0]) == [], "the agent's directories to be removed")


def test_what_the_agent_made_elsewhere_is_removed_after_a_crash(make_hosts: Any, tmp_path: Path) -> None:
    pool = make_hosts(1, own=("/tmp",))
    host = pool[0]
    (tmp_path / "file").write_text("contents")
    with connect(pool) as runtime:
        runtime.send_file(tmp_path / "file", "/tmp/there")
        assert len(entries(host)) == 3
        pid = runtime._session.connection.agent_info.pid
        agent = next(found for found in host.processes() if found.inner_pid == pid)
        os.kill(agent.pid, signal.SIGKILL)
        until(lambda: entries(host) == [], "the guardian to remove the directories")


def test_a_session_that_does_not_find_the_agent_says_so(make_hosts: Any, tmp_path: Path) -> None:
    pool = make_hosts(1, own=(*_ALL, "/home/lazy"))
    (tmp_path / "file").write_text("contents")
    with connect(pool) as runtime:
        assert runtime.call(os.getuid) == 1000
        with pytest.raises(TaskExecutionError) as caught:
            runtime.send_file(tmp_path / "file", "/tmp/there")
        text = str(caught.value)
        assert "sessions on this host have a /tmp, or processes, of their own" in text
        assert "Next step: have all sessions of the user on the host see the same /tmp" in text


def test_what_a_further_session_prints_is_part_of_the_error(make_hosts: Any, tmp_path: Path) -> None:
    pool = make_hosts(1)
    (tmp_path / "file").write_text("contents")
    script = pool[0].path("~/.bashrc")
    with connect(pool) as runtime:
        script.write_text("echo no further session today >&2; exit 7\n")
        with pytest.raises(TaskExecutionError, match="no further session today"):
            runtime.send_file(tmp_path / "file", "/tmp/there")
        with pytest.raises(Exception, match="no further session today"):
            runtime.execute_task(RuntimeTask("detached").run_command("true"), detach=True)
        script.unlink()


def test_what_a_session_prints_after_its_exit_status_is_part_of_the_error(make_hosts: Any, tmp_path: Path) -> None:
    pool = make_hosts(1)
    (tmp_path / "file").write_text("contents")
    script = pool[0].path("~/.bashrc")
    with connect(pool) as runtime:
        script.write_text("(sleep 0.3; echo said late >&2) >&- & exit 7\n")
        with pytest.raises(TaskExecutionError, match="said late"):
            runtime.send_file(tmp_path / "file", "/tmp/there")
        script.unlink()


@pytest.mark.parametrize(("user", "own"), [("root", _ALL), ("lazy", ("/tmp",))])
def test_a_link_that_is_back_finds_what_ran(make_hosts: Any, tmp_path: Path, user: str, own: tuple[str, ...]) -> None:
    pool = make_hosts(1, user=user, own=own)
    host = pool[0]
    (tmp_path / "file").touch()
    with connect(pool) as runtime:
        if user != "root":  # its sessions find the agent only after one has looked for it
            runtime.send_file(tmp_path / "file", "/tmp/there")
        task = RuntimeTask("wait").run_command("until test -e ~/go; do sleep 0.05; done; echo done")
        runtime.execute_task(task)
        connection = runtime._session.connection
        for session in host.sessions():
            os.kill(session.pid, signal.SIGKILL)
        until(lambda: connection.interruptions and connection.state == "open", "the link to be back")
        host.path("~/go").touch()
        runtime.join()
        assert task.execution_log[0].strip() == "done"
    host.path("~/go").unlink()


def test_the_agent_carries_ports(make_hosts: Any) -> None:
    pool = make_hosts(1, user="root", own=_ALL, forwarding=False)
    with socket.create_server(("127.0.0.1", 0)) as server, connect(pool, relay="agent") as runtime:
        port = server.getsockname()[1]
        runtime.expose_port_to_runtime(port)
        assert port in pool[0].listening_ports()


_LISTENER = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("/mnt/agent.sock")
    listener.listen()
    print(flush=True)
    connection = listener.accept()[0]
    print(connection.recv(64), flush=True)
"""


@pytest.mark.parametrize(("uid", "found"), [(0, True), (65534, False)])
def test_through_proc_a_session_takes_no_socket_of_another_user(uid: int, found: bool) -> None:
    """The number of an agent that has ended may be somebody else's by now."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    inside = f"mount -t tmpfs -o mode=1777 none /mnt && exec {sys.executable} -c '{_LISTENER}' {uid}"
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", inside], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        command = bulk_command(sys.executable, "0123", ["/mnt/agent.sock"], other.pid)
        said = subprocess.run(["sh", "-c", command], capture_output=True, input=b"", check=False, timeout=60)
        assert (b"lazy0123" in said.stdout, NO_AGENT.encode() in said.stderr) == (found, not found)
        assert other.stdout.readline() == (b"b'bulk'\n" if found else b"b''\n")
