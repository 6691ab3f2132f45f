"""Hosts whose link works and that do not do what they are asked: every wait for them ends, and says for what it was."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from changedagents import changed
from lazycluster import Runtime, RuntimeGroup, RuntimeTask
from lazycluster.exceptions import ConnectionLostError, LazyclusterError, NoAnswerError, TaskExecutionError
from lazycluster.ssh import connection, ssh_connection, transfer
from patience import until

# A host that keeps its link alive and leaves those requests unanswered that a file in its home names.
_REQUEST = '        operation = str(channel.params.get("op"))\n'
_MUTE = _REQUEST + (
    '        mute = os.path.expanduser("~/mute")\n'
    "        if os.path.exists(mute) and operation in open(mute).read().split():\n"
    "            return\n"
)


# One whose copying process says that it is busy, and does nothing else as long as there is a file in its home.
_SOURCE = "            source = os.stat(path)\n"
_BUSY = '            while os.path.exists(os.path.expanduser("~/busy")):\n                time.sleep(0.01)\n' + _SOURCE
_SIGNS, _MORE_SIGNS = "_BUSY_EVERY = 5.0", "_BUSY_EVERY = 0.2"


@pytest.fixture
def mutable(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Agents that can be told what not to answer; returns who tells them."""
    files: list[Path] = []

    def mute(host: Any, *operations: str) -> None:
        files.append(host.path("~/mute"))
        files[-1].write_text(" ".join(operations))

    changes = ("server", _REQUEST, _MUTE), ("sender", _SOURCE, _BUSY), ("stream", _SIGNS, _MORE_SIGNS)
    with changed(tmp_path, *changes):
        yield mute
    for file in files:
        file.unlink(missing_ok=True)


def runtime(hosts: Any, **settings: Any) -> Runtime:
    settings = {"config_file": hosts.config_file, **settings}
    return Runtime("host1", connection_kwargs=settings, python=sys.executable)


_QUESTIONS: dict[str, tuple[str, Callable[[Runtime], Any]]] = {
    "a port from the host": ("nonce", lambda host: host.expose_port_from_runtime(24511)),
    "a port to the host": ("ports", lambda host: host.expose_port_to_runtime(24510)),
    "a port that is its own": ("exposed", lambda host: host.expose_port_to_runtime(24510)),
    "a free port of several": ("ports", lambda host: host.expose_port_to_runtime(24512, range(24512, 24520))),
    "its ports": ("ports", lambda host: host.get_free_port([24513])),
    "a directory": ("mkdtemp", lambda host: host.create_tempdir()),
    "the machine": ("info", lambda host: host.info),
    "detached tasks": ("detached", lambda host: host.detached_tasks()),
    "another directory": ("mkdir", lambda host: host.create_dir("x")),
}


def test_what_a_host_does_not_answer_is_an_error(
    hosts: Any, mutable: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lazycluster.tasks import detached

    with runtime(hosts) as host:
        for module, name in ((connection, "ANSWER_LIMIT"), (detached, "_ANSWER_LIMIT")):
            monkeypatch.setattr(module, name, 0.5)
        for what, (operation, ask) in _QUESTIONS.items():
            mutable(hosts[0], operation)
            with pytest.raises(LazyclusterError) as caught:
                ask(host)
            said = f"{what}: {caught.value}"
            assert "host1" in said
            assert f"an answer to {operation!r}" in said or "detached tasks" in said, said
            mutable(hosts[0])
        monkeypatch.setattr(connection, "ANSWER_LIMIT", 30.0)
        assert host.call(sum, [1, 2]) == 3
        host.stop_process(host.expose_port_to_runtime(24510))


def test_what_only_an_agent_is_told_ends_too(
    hosts: Any, mutable: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that does not even say that it has no room for a working directory."""
    monkeypatch.setattr(connection, "ANSWER_LIMIT", 1.0)
    mutable(hosts[0], "mkdtemp")
    with pytest.raises(LazyclusterError, match=r"host1.*no answer to 'mkdtemp'"):
        Runtime("host1", connection_kwargs={"config_file": hosts.config_file})


def _copying(host: Any) -> list[Any]:
    """Return the processes on a host that serve copies: leaders of sessions of their own below the agent."""
    found = []
    for process in host.processes():
        with contextlib.suppress(OSError):
            descendant = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            if int(descendant[3]) == process.pid and process.name.startswith("python"):
                found.append(process)
    return found


@pytest.mark.parametrize("way", ["get", "send"])
def test_a_copying_process_that_stands_still(
    way: str, hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told from one that is busy, and the host goes on."""
    monkeypatch.setattr(transfer, "_SILENCE_LIMIT", 1.0)
    monkeypatch.setattr(transfer, "_LOOK_EVERY", 0.1)
    (tmp_path / "small").write_bytes(b"x")
    with runtime(hosts) as host:
        before = {process.pid for process in _copying(hosts[0])}
        host.send_file(str(tmp_path / "small"))
        stopped = [process for process in _copying(hosts[0]) if process.pid not in before]
        for process in stopped:
            os.kill(process.pid, signal.SIGSTOP)
        assert stopped
        copy = (
            (lambda: host.get_file("small", str(tmp_path / "back")))
            if way == "get"
            else (lambda: host.send_file(str(tmp_path / "small"), "again"))
        )
        with pytest.raises((NoAnswerError, TaskExecutionError), match="the process there to go on with"):
            copy()
        copy()  # by another process
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)


@pytest.mark.usefixtures("mutable")
def test_a_copying_process_that_is_busy_is_waited_for(
    hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E.g. with a disk that hangs, or a digest; but not for ever, whatever it says."""
    looks: list[int] = []
    unread = transfer._unread
    monkeypatch.setattr(transfer, "_unread", lambda sock: looks.append(unread(sock)) or looks[-1])
    monkeypatch.setattr(transfer, "_SILENCE_LIMIT", 1.0)
    monkeypatch.setattr(transfer, "_LOOK_EVERY", 0.1)
    hosts[0].path("~/wanted").write_bytes(b"wanted")
    busy = hosts[0].path("~/busy")
    busy.touch()
    with runtime(hosts) as host:
        try:
            task = host.get_file("~/wanted", str(tmp_path / "got"), execute_async=True)
            until(lambda: len(looks) > 30, "the copy to be looked at for three times as long as silence may last")
            assert not (tmp_path / "got").exists()
            busy.unlink()
            task.join()
            assert (tmp_path / "got").read_bytes() == b"wanted"
            busy.touch()
            monkeypatch.setattr(transfer, "_BUSY_LIMIT", 1.0)
            with pytest.raises((NoAnswerError, TaskExecutionError), match="the process there to go on with"):
                host.get_file("~/wanted", str(tmp_path / "again"))
        finally:
            busy.unlink(missing_ok=True)
            hosts[0].path("~/wanted").unlink()


def test_a_further_session_that_does_not_start(hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_connection, "_SESSION_LIMIT", 1.0)
    monkeypatch.setattr(connection, "_START_LIMIT", 1.0)
    (tmp_path / "small").write_bytes(b"x")
    start = hosts[0].path("~/.bashrc")
    before = start.read_text() if start.exists() else None
    with runtime(hosts) as host:
        hold = hosts[0].path("~/hold")
        hold.touch()
        start.write_text("while [ -e ~/hold ]; do sleep 0.1; done\n")
        try:
            with pytest.raises(LazyclusterError, match=r"host1: .* a further session"):
                host.send_file(str(tmp_path / "small"))
            with pytest.raises(LazyclusterError, match=r"host1: .* a further agent"):
                host.execute_task(RuntimeTask("t").run_command("true"), detach=True)
        finally:
            hold.unlink()
            if before is None:
                start.unlink()
            else:
                start.write_text(before)
        host.send_file(str(tmp_path / "small"))


def test_a_session_that_stands_still_is_replaced(hosts: Any) -> None:
    with runtime(hosts, link_timeout=1) as host:
        stopped = hosts[0].sessions()
        for process in stopped:
            os.kill(process.pid, signal.SIGSTOP)
        try:
            until(lambda: host._connection.state == "interrupted", "the silence to be noticed")
            host.stop_process(host.expose_port_to_runtime(24530))
            assert host.call(sum, [1, 2]) == 3
        finally:
            for process in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)


@pytest.mark.parametrize("grace", [0, 2])
def test_an_agent_that_stands_still_is_lost_whatever_the_grace(grace: int, hosts: Any) -> None:
    with runtime(hosts, link_timeout=1, grace=grace) as host:
        agent = host._connection.agent_info.pid
        agents = [process.pid for process in hosts[0].processes() if process.inner_pid == agent]
        task = RuntimeTask("endless").run_command("sleep 3600")
        host.execute_task(task)
        until(lambda: "sleep 3600" in str(hosts[0].processes()), "the task")
        for pid in agents:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TaskExecutionError) as caught:
            task.join()
        assert isinstance(caught.value.__cause__, ConnectionLostError)
        for pid in agents:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    until(lambda: not hosts[0].processes(), "the host to have ended everything")


def test_a_cluster_leaves_out_who_does_not_answer(
    hosts: Any, mutable: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    monkeypatch.setattr(connection, "ANSWER_LIMIT", 2.0)
    settings = {"config_file": hosts.config_file}
    names = ["host1", "host2"]
    with RuntimeGroup(hosts=names, connection_kwargs=settings, python=sys.executable) as group:
        for operation in ("ports", "exposed"):
            mutable(hosts[0], operation)
            caplog.clear()
            with DaskCluster(group, min_workers=1) as cluster:
                cluster.start()
                assert [worker.host for worker in cluster.workers] == ["host2"]
            assert f"an answer to {operation!r}" in caplog.text
            mutable(hosts[0])
