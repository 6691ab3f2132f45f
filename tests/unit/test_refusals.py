"""What the system refuses an agent (descriptors, processes, room on the disk) costs one request, not all of them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster.agent import commands, descriptors, detached, oom, processes, server, wire
from lazycluster.agent.loop import Loop
from lazycluster.core import event_loop
from lazycluster.exceptions import AgentError
from lazycluster.runtime.session import HostSession, HostSpec
from lazycluster.ssh import transfer
from lazycluster.ssh.local_connection import LocalConnection


def _rounds_until(loop: Loop, condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    loop.call_later(seconds, lambda: None)
    while not condition():
        assert time.monotonic() < deadline
        loop._round()


# --- the reactor ----------------------------------------------------------------------------------
@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    fds = os.pipe()
    os.write(fds[1], b"x")
    yield fds
    for fd in fds:
        os.close(fd)


def _failing(_: int = 0) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_callback_that_fails_ends_nothing_and_is_not_called_at_once_again(pipe: tuple[int, int]) -> None:
    loop, calls, reports = Loop(), [], []
    loop.report = reports.append

    def readable() -> None:
        calls.append(time.monotonic())
        if len(calls) < 3:
            _failing()

    loop.add_reader(pipe[0], readable)
    loop.call_soon(_failing)
    loop.call_later(0.0, _failing)
    _rounds_until(loop, lambda: len(calls) >= 5)
    assert len(reports) == 4
    assert all("No space left on device" in report for report in reports)
    # Twice it was left alone, for longer the second time; then it went well, and is called whenever it can be.
    assert calls[1] - calls[0] >= 0.1
    assert calls[2] - calls[1] >= 0.2


def test_whoever_removes_a_callback_that_fails_gets_rid_of_it(pipe: tuple[int, int]) -> None:
    loop, calls, over = Loop(), [], []
    loop.report = lambda _: None

    def readable() -> None:
        calls.append(1)
        _failing()

    loop.add_reader(pipe[0], readable)
    _rounds_until(loop, lambda: calls)
    loop.remove_reader(pipe[0])
    loop.call_later(0.3, lambda: over.append(1))
    _rounds_until(loop, lambda: over)
    assert len(calls) == 1


def test_without_anybody_to_tell_it_is_an_error(pipe: tuple[int, int]) -> None:
    loop = Loop()
    loop.add_reader(pipe[0], _failing)
    with pytest.raises(OSError, match="No space"):
        loop._round()


# --- the agent ------------------------------------------------------------------------------------
class _Told:
    """Stands for the session with the manager."""

    def __init__(self) -> None:
        self.data = b""

    def send(self, data: bytes) -> None:
        self.data += data


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Any]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent.sock"))
    listener.listen()
    alive, held = os.pipe()
    agent = server.Agent(str(tmp_path), listener, os.getpid(), alive, True)
    agent._manager_link.session = _Told()
    agent._manager_link.session.agent = agent
    yield agent
    listener.close()
    for fd in (alive, held):
        os.close(fd)


def test_a_copy_that_gets_no_process_is_told_why(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    ours, theirs = socket.socketpair()
    client = descriptors.send_to(agent._listener.getsockname(), [theirs.fileno()], b"bulk")
    theirs.close()
    agent._accept(agent._listener)
    assert b"ulimit -u" in agent._manager_link.session.data
    assert b"ulimit -u" in ours.recv(4096)  # as an error of the copy
    assert ours.recv(1) == b""
    assert client.recv(1) == b""  # so the session on the host ends
    ours.close()
    client.close()


def test_connections_wait_while_there_are_no_descriptors(agent: Any) -> None:
    listener, refused = agent._listener, []

    class Listener:
        fileno = listener.fileno
        setblocking = listener.setblocking

        def _accept(self) -> Any:
            if refused:
                return listener._accept()
            refused.append(1)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    agent.loop.remove_reader(listener.fileno())
    agent._listen(Listener())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())
        _rounds_until(agent.loop, lambda: refused)
        assert listener.fileno() not in agent.loop._callbacks  # else it would be called without end
        client.sendall(b"nonsense")
        _rounds_until(agent.loop, lambda: listener.fileno() in agent.loop._callbacks)
        client.setblocking(False)
        agent.loop._round()
        assert client.recv(1) == b""


def _leave_descriptors(pid: int, count: int) -> None:
    """Let a process have so many more descriptors."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = [fd for fd in range(max(used) + count + 2) if fd not in used]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[count], 4096))


def test_requests_without_descriptors_fail_and_harm_no_others(tmp_path: Path) -> None:
    async def body() -> None:
        connection = LocalConnection()
        await connection.open()
        try:
            pid = connection.agent_info.pid
            await connection.request("interpreters", env={})  # the interpreter has been started
            out, began = bytearray(), asyncio.Event()
            params = {"command": "read x; echo $x", "input": True}
            other = connection.channel("run", params, stdout=out.extend, event=lambda _: began.set())
            await began.wait()
            _leave_descriptors(pid, 3)
            with pytest.raises(AgentError, match=r"Too many open files.*ulimit -n"):
                await connection.request("interpreters", env={})
            used = len(os.listdir(f"/proc/{pid}/fd"))
            for _ in range(3):
                with pytest.raises(AgentError, match="Too many open files"):
                    await connection.channel("run", {"command": "true", "input": True}).result()
            assert len(os.listdir(f"/proc/{pid}/fd")) == used
            _leave_descriptors(pid, 4)  # the connection, two streams, and one where two are needed
            source = tmp_path / "file"
            source.write_text("text")
            with pytest.raises(transfer.TransferError, match="Too many open files"):
                await transfer.send(connection, str(source), str(tmp_path / "copy"), cwd="/", env={})
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (1024, 4096))
            await connection.request("interpreters", env={})
            await transfer.send(connection, str(source), str(tmp_path / "copy"), cwd="/", env={})
            await other.send(b"still there\n")
            await other.result()
            assert out == b"still there\n"
        finally:
            await connection.close()

    event_loop.run(body(), timeout=60)


# --- detached tasks, and a disk that is full ------------------------------------------------------
class _Agent:
    identity = "1"

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.directory = str(directory)

    def end(self, then: Callable[[], Any]) -> None:
        then()


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(detached, "_AGAIN", 0.05)
    steps = [{"op": "run", "label": name, "params": {"env": {}}} for name in ("one", "two")]
    task = detached._Task(_Agent(tmp_path), {"id": "0" * 16, "steps": steps, "cwd": str(tmp_path)})
    monkeypatch.setattr(task, "_next", lambda: None)
    return task


def _state(task: Any) -> dict[str, Any]:
    return json.loads((Path(task.directory) / "state.json").read_text())


def test_the_state_of_a_detached_task_is_written_when_it_can_be(task: Any) -> None:
    away = task.directory + ".away"
    os.rename(task.directory, away)  # nothing can be written
    task.step_over({"ok": True, "exit": 0})
    task.agent.loop._round()
    os.rename(away, task.directory)
    assert _state(task)["steps"] == []
    _rounds_until(task.agent.loop, lambda: _state(task)["steps"] == [{"ok": True, "exit": 0}])


def test_the_end_of_a_detached_task_waits_until_it_can_be_written(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    away = task.directory + ".away"
    os.rename(task.directory, away)
    monkeypatch.setattr(time, "sleep", lambda _: os.rename(away, task.directory))
    task.step_over({"ok": False, "error": "os", "message": "x"})
    assert _state(task)["state"] == "failed"


def test_the_result_of_a_detached_step_waits_until_it_can_be_written(task: Any, tmp_path: Path) -> None:
    outcome = tmp_path / "not there yet" / "outcome"
    record = detached.Record(task, {}, str(outcome))
    drained: list[int] = []
    record.on_drain = lambda: drained.append(1)
    record.output(b"one")
    assert not record.writable
    record.output(b"two")
    record.result(exit=0)
    assert task._over == []
    outcome.parent.mkdir()
    _rounds_until(task.agent.loop, lambda: task._over)
    assert outcome.read_bytes() == b"onetwo"
    assert drained
    assert record.writable


# --- what is too large ----------------------------------------------------------------------------
def test_a_request_that_no_agent_takes_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        connection = LocalConnection()
        await connection.open()
        try:
            other = connection.channel("run", {"command": "read x", "input": True})
            with pytest.raises(ValueError, match=r"64\.1 MiB is too large[^~]*Next step"):
                connection.channel("run", {"command": "echo " + "x" * (64 * 1024 * 1024 + 100_000)})
            monkeypatch.setattr(wire, "FROM_MANAGER", 1000)
            with pytest.raises(ValueError, match="is too large"):
                other.control(message="x" * 1000)
            assert await connection.request("ping") == {}
            await other.send_end()
            await other.result()
        finally:
            await connection.close()

    event_loop.run(body(), timeout=60)


def test_of_much_output_of_a_question_the_end_is_kept() -> None:
    async def body() -> tuple[int, str]:
        session = await HostSession.open(HostSpec("localhost", local=True))
        try:
            return await session.capture(
                session.context({}, "WORKING_DIR"), command="head -c 5000000 /dev/zero; echo true"
            )
        finally:
            await session.close()

    status, output = event_loop.run(body(), timeout=60)
    assert status == 0
    assert len(output) == 1024 * 1024
    assert output.endswith("\0true\n")


# --- processes that may not be signalled ----------------------------------------------------------
_REFUSING = """
import os, sys
real = os.kill
def kill(pid, number):
    if number and pid == child.pid:
        raise PermissionError(1, "Operation not permitted")
    real(pid, number)
os.kill = kill
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that cannot be signalled, like one that `sudo` has started."""
    process = subprocess.Popen(["sleep", "60"])
    kill = os.kill

    def refuse(pid: int, number: int) -> None:
        if pid == process.pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", refuse)
        yield process
    process.kill()
    process.wait()


def test_what_may_not_be_ended_is_named_and_not_waited_for(child: subprocess.Popen[bytes]) -> None:
    loop, reports, ended = Loop(), [], []
    loop.report = reports.append
    other = subprocess.Popen(["sleep", "60"])

    def living() -> list[int]:
        return [process.pid for process in (child, other) if process.poll() is None]

    processes.Termination(loop, living, lambda: ended.append(living()), ((signal.SIGTERM, 0.1), (signal.SIGKILL, 0.1)))
    _rounds_until(loop, lambda: ended)
    assert ended == [[child.pid]]
    assert len(reports) == 1
    assert f"{child.pid} (sleep, of user {os.getuid()})" in reports[0]


def test_a_command_that_may_not_be_ended_is_not_waited_for(child: subprocess.Popen[bytes]) -> None:
    results: list[dict[str, Any]] = []
    channel = SimpleNamespace(
        params={},
        loop=Loop(),
        open=True,
        writable=True,
        event=lambda **_: None,
        result=lambda **fields: results.append(fields),
    )
    command = commands._Command(channel, ["true"], {}, "/", False, True)
    command.killed_before = oom.note()
    os.waitpid(command.pid, 0)
    command.pid, command._started = child.pid, processes.start_time(child.pid)
    command.end()
    _rounds_until(channel.loop, lambda: results)
    assert results == [{"exit": None, "signal": signal.SIGKILL}]


def test_the_guardian_does_not_wait_for_what_may_not_be_ended() -> None:
    program = f"""
import os, signal, subprocess
from lazycluster.agent import guardian
guardian._PATIENCE = 0.1
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
child = subprocess.Popen(["sleep", "60"])
{_REFUSING}
guardian.end_descendants()
assert child.poll() is None
real(child.pid, signal.SIGKILL)
child.wait()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
