"""A manager whose system lacks what only Linux has: each in turn, and all of it, as on a Mac."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import otherunix
from lazycluster import RuntimeTask
from lazycluster.agent import processes
from lazycluster.core import event_loop, unix
from lazycluster.runtimes import LocalRuntime
from lazycluster.ssh import workspace
from lazycluster.ssh.config import MAX_CONTROL_PATH
from lazycluster.ssh.local_connection import LocalConnection
from lazycluster.ssh.process import WatchedProcess
from patience import until

SSH_APPENDS = 17  # characters, to the path of its control socket


@pytest.fixture(params=[*otherunix.KINDS, "all"])
def denied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    otherunix.deny(monkeypatch, *(() if request.param == "all" else (request.param,)))
    return request.param


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_local_runtime_works(denied: str, tmp_path: Path) -> None:
    (tmp_path / "sent").write_text("content")
    with LocalRuntime(working_dir=str(tmp_path / "host")) as runtime:
        task = RuntimeTask("commands").run_command("cat copy; exit 0").run_function(os.getpid)
        runtime.send_file(str(tmp_path / "sent"), "copy")
        runtime.execute_task(task, execute_async=False)
        assert "content" in task.execution_log[0]
        assert task.function_returns
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            other = runtime.get_free_port(range(21000, 21999))
            runtime.expose_port_to_runtime(port, other)
            with socket.create_connection(("127.0.0.1", other)) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"through")
                    assert accepted.recv(7) == b"through"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", other))


def test_the_keeper_starts_and_its_directory_goes(denied: str) -> None:
    async def use() -> tuple[str, str]:
        space = await workspace.acquire()
        try:
            await space.keeper.request("ping")
            space.watch(os.getpid())
            assert Path(space.directory, "askpass.sock").is_socket()
            space.unwatch(os.getpid())  # or its end would be waited for
        finally:
            await space.release()
        return space.directory, space.keeper.agent_info.directory

    for directory in event_loop.run(use(), 60):
        assert not Path(directory).exists()


@pytest.mark.parametrize("told", [True, False])
def test_an_agent_ends_what_it_started(tmp_path: Path, told: bool) -> None:
    """As the keeper on a Mac has to: without /proc, subreapers and signals that can be waited for."""

    async def use() -> tuple[int, str]:
        connection = LocalConnection(python=otherunix.interpreter(tmp_path / "python"))
        await connection.open()
        said = bytearray()
        command = {"command": "sleep 1000 & echo $!; wait"}
        running = connection.channel("run", command, stdout=said.extend)
        while b"\n" not in said:
            await asyncio.sleep(0.02)
        if not told:  # as when the manager is killed
            assert connection._link is not None
            connection._link.detach()
        await connection.close()
        running.close()
        return int(said), connection.agent_info.directory

    pid, directory = event_loop.run(use(), 60)
    until(lambda: not processes.exists(pid), "the command to be ended")
    until(lambda: not Path(directory).exists(), "the directory to be removed")


def test_processes_are_told_apart_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    known = processes.parents()
    otherunix.deny(monkeypatch, "/proc")
    assert processes.parents().get(os.getpid()) == known[os.getpid()] == processes.parent_of(os.getpid())
    started = unix.process_start_time(os.getpid())
    assert started is not None
    assert abs(started - time.time()) < 7 * 86400
    assert unix.process_start_time(os.getpid()) == started
    with subprocess.Popen(["sleep", "0"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert unix.process_start_time(child.pid) is None  # a zombie
        assert child.pid not in processes.parents()


def test_the_end_of_a_process_is_noticed(denied: str) -> None:
    async def watch() -> int:
        process = WatchedProcess([sys.executable, "-c", "import time; time.sleep(60)"])
        process.signal(signal.SIGKILL)
        return await asyncio.wait_for(process.exited, 20)

    assert event_loop.run(watch(), 30) == -signal.SIGKILL


def test_the_log_of_an_ssh_is_read_though_it_was_closed_before_anything_was_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = f"exec 3>{log}; exec 3>&-; sleep 0.3; exec 3>{log}; echo Authenticated to there >&3; sleep 60"

    async def watch() -> None:
        process = WatchedProcess(["/bin/sh", "-c", program], log=str(log))
        while not process.is_logged_in:
            await asyncio.sleep(0.02)
        process.signal(signal.SIGKILL)
        await process.end()

    event_loop.run(watch(), 30)


def test_paths_of_control_sockets_are_short_enough_everywhere() -> None:
    assert MAX_CONTROL_PATH + SSH_APPENDS + 1 <= unix.SOCKET_PATH_SIZE
    # "/NUMBER" of a connection, or "/askpass.sock"
    assert workspace._LONGEST + len("/askpass.sock") <= MAX_CONTROL_PATH


def test_a_peer_of_the_same_user_is_taken(denied: str, pair: tuple[socket.socket, socket.socket]) -> None:
    assert unix.is_own_peer(pair[0])


@pytest.mark.parametrize(
    ("uid", "failed", "taken"), [(os.getuid(), 0, True), (os.getuid() + 1, 0, False), (os.getuid(), -1, False)]
)
def test_a_mac_is_asked_who_the_peer_is(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket], uid: int, failed: int, taken: bool
) -> None:
    class Library:
        def __init__(self, name: str | None) -> None:
            assert name is None

        @staticmethod
        def getpeereid(fd: int, user: Any, group: Any) -> int:
            assert fd == pair[0].fileno()
            user._obj.value = uid
            return failed

    otherunix.deny(monkeypatch, "peer credentials")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert unix.is_own_peer(pair[0]) is taken


def test_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert not unix.is_own_peer(pair[0])


def test_what_is_not_told_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fd = unix.process_descriptor(os.getpid())
    assert isinstance(fd, int)
    os.close(fd)
    otherunix.deny(monkeypatch)
    assert unix.process_descriptor(os.getpid()) is None
    assert unix.extended_attributes(tmp_path) == {}
    assert unix.forbids_programs("/proc") is False
    assert unix.forbids_programs("/not/there") is False


def test_no_other_module_calls_what_only_linux_has() -> None:
    """Modules of `agent` run on hosts, and have their own fallbacks; programs of engines do, too."""
    source = Path(unix.__file__).parents[1]
    words = ("pidfd_open", "SO_PEERCRED", "F_SETPIPE_SZ", "ST_NOEXEC", "xattr(", "/proc", "prctl", "sched_getaffinity")
    others = {
        f"{path.relative_to(source)}: {word}"
        for path in source.rglob("*.py")
        if path != Path(unix.__file__) and path.relative_to(source).parts[0] not in ("agent", "engines")
        for word in words
        if word in path.read_text(encoding="utf-8")
    }
    # What hosts and programs of engines are sent as text.
    sent = {"ssh/agent_program.py: SO_PEERCRED", "ssh/agent_program.py: /proc"}
    assert others == {*sent, "cluster/sent/memory_file.py: /proc"}
