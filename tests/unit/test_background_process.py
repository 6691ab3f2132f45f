"""The messages and the settings of a cluster's own process, without a cluster."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster import EnvironmentSpec
from lazycluster.agent import directories
from lazycluster.background import protocol, state
from lazycluster.background.client import BackgroundProcess, end, running
from lazycluster.background.launch import cluster_document, kept_variables
from lazycluster.background_process import program
from lazycluster.background_process.program import ClusterProcess
from lazycluster.background_process.server import RequestServer
from lazycluster.core import unix
from lazycluster.exceptions import BackgroundError, LazyclusterError
from lazycluster.runtime.session import HostSpec


class _Requests:
    name = "night"

    def do(self, command: object, arguments: dict[str, Any], stream: protocol.MessageStream) -> Any:
        if command == "fail":
            raise RuntimeError("broken")
        return [command, arguments]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackgroundProcess]:
    """A process that answers; it is this one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("x" * 120)))  # longer than the path of a socket may be
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    claim.write(state="running")
    server = RequestServer(protocol.listening(claim.path / state.SOCKET), _Requests(), None)  # type: ignore[arg-type]
    server.start()
    yield running("night")
    server.close(5.0)
    claim.remove()


def test_requests_are_answered_and_errors_are_told(served: BackgroundProcess) -> None:
    assert served.request("scale", n=3) == ["scale", {"n": 3}]
    with pytest.raises(BackgroundError, match="RuntimeError: broken") as told:
        served.request("fail")
    assert told.value.type == "RuntimeError"


def test_socket_and_directory_are_the_users_alone(served: BackgroundProcess) -> None:
    path = served.found.path / state.SOCKET
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.lstat().st_mode) == 0o700


def test_another_user_gets_no_answer_and_is_not_trusted(
    served: BackgroundProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix, "is_own_peer", lambda connection: False)
    with pytest.raises(LazyclusterError, match="another user's"):
        served.request("status")
    trusting = SimpleNamespace(**{name: getattr(unix, name) for name in unix.__all__})
    trusting.is_own_peer = lambda connection: True
    monkeypatch.setattr(protocol, "unix", trusting)
    with pytest.raises(BackgroundError, match="has ended"):  # the server hangs up, too
        served.request("status")


_NONSENSE = [b"\n", b"[]\n", b"nonsense\n", b"[" * 100_000 + b"\n", b'{"command": "scale"', b"\xff\n"]


@pytest.mark.parametrize("data", _NONSENSE, ids=range(len(_NONSENSE)))
def test_nonsense_harms_nobody(served: BackgroundProcess, data: bytes) -> None:
    stream = protocol.connected(served.found.path / state.SOCKET)
    with stream:
        stream._socket.sendall(data)
        stream._socket.shutdown(socket.SHUT_WR)
        assert stream.receive(30.0) is None
    assert served.request("status") == ["status", {}]


def test_of_another_version_only_the_state_and_the_end_are_asked(
    served: BackgroundProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "VERSION", 1)
    for command in ("status", "down"):
        with protocol.connected(served.found.path / state.SOCKET) as stream:
            stream.send(protocol=99, command=command)
            assert stream.receive(30.0) == {"result": [command, {}]}
    with protocol.connected(served.found.path / state.SOCKET) as stream:
        stream.send(protocol=99, command="scale", n=1)
        message = stream.receive(30.0)
    assert message is not None
    assert "was started by lazycluster" in message["error"] and "lazycluster down night" in message["error"]


def test_many_at_once_are_answered(served: BackgroundProcess) -> None:
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(served.request("status"))) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [["status", {}]] * 32


def test_a_process_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(BackgroundError, match="there is no cluster 'night'"):
        running("night")
    state.claim(state.NamedRecord.new("cluster", "night")).close()
    with pytest.raises(BackgroundError, match="is gone: its process was killed"):
        running("night")
    found = state.find("night")
    assert found is not None and end(found) == "forgotten"
    claim = state.claim(state.NamedRecord.new("work", "sweep"))
    claim.close()
    with pytest.raises(BackgroundError, match="detached work"):
        running("sweep")


# --- settings ------------------------------------------------------------------------------------
def test_hosts_are_described_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").write_text("")
    (tmp_path / "key").write_text("")
    (tmp_path / "requirements.txt").write_text("")
    kwargs = {"config_file": "config", "key_filename": Path("key"), "password": "secret"}
    spec = HostSpec("host", connection_kwargs=kwargs, environment="requirements.txt", env={"A": "1"})
    document = json.loads(json.dumps(spec.document()))
    monkeypatch.chdir("/")
    again = HostSpec.of(document, ask=True)
    assert again.connection_kwargs == {
        "config_file": str(tmp_path / "config"), "key_filename": [str(tmp_path / "key")], "password": "secret"
    }  # fmt: skip
    assert again.environment == EnvironmentSpec(str(tmp_path / "requirements.txt"))
    assert (again.env, again.ask) == ({"A": "1"}, True)
    assert HostSpec.of(HostSpec("host", environment=["numpy==2.0"]).document(), False).environment is not None


def test_what_is_no_plain_data_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="worker_options cannot be used for a cluster in the background"):
        cluster_document("dask", [], options={"worker_options": {"f": print}})


def test_only_listed_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "LD_PRELOAD", "PYTHONSTARTUP", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, "x")
    for name in ("SSH_AUTH_SOCK", "KRB5CCNAME", "LAZYCLUSTER_SSH_CONFIG", "LC_ALL", "DASK_CONFIG"):
        monkeypatch.setenv(name, "x")
    kept = kept_variables()
    assert {"SSH_AUTH_SOCK", "KRB5CCNAME", "LAZYCLUSTER_SSH_CONFIG", "LC_ALL", "DASK_CONFIG"} <= kept.keys()
    assert not {"AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "LD_PRELOAD", "PYTHONSTARTUP", "XDG_RUNTIME_DIR"} & kept.keys()


def test_directories_are_kept_from_ageing_while_they_are_used(tmp_path: Path) -> None:
    import fcntl

    def may_age() -> bool:
        """What systemd-tmpfiles asks before it removes what is old in a directory."""
        fd = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(fd)

    assert may_age()
    held = directories.hold(str(tmp_path))
    assert not may_age()
    os.close(held)
    assert may_age()
    assert directories.hold(str(tmp_path / "missing")) == -1


_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[2:]:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path).read()
        print("read", path)
    except OSError:
        pass
with socket.socket(socket.AF_UNIX) as connection:
    try:
        connection.connect(sys.argv[1])
        connection.sendall(b'{"command": "down"}\\n')
        print("answer", connection.recv(100))
    except OSError as error:
        print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_user_cannot_use_socket_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        Path(home).chmod(0o755)
        monkeypatch.setenv("XDG_STATE_HOME", home)
        claim = state.claim(state.NamedRecord.new("cluster", "night"))
        server = RequestServer(protocol.listening(claim.path / state.SOCKET), _Requests(), None)  # type: ignore[arg-type]
        server.start()
        socket_path = str(claim.path / state.SOCKET)
        paths = [str(path) for path in (claim.path.parent, claim.path, *claim.path.iterdir()) if not path.is_socket()]
        argv = [sys.executable, "-ISc", _STRANGER, socket_path, *paths]
        assert subprocess.run(argv, capture_output=True, text=True).stdout == "PermissionError\n"
        # Where the modes are no hindrance, it is told by its number, and gets no answer.
        for path in (Path(home) / "lazycluster", claim.path.parent, claim.path, Path(socket_path)):
            path.chmod(0o777)
        done = subprocess.run([sys.executable, "-ISc", _STRANGER, socket_path], capture_output=True, text=True)
        assert done.stdout in ("answer b''\n", "ConnectionResetError\n", "BrokenPipeError\n"), done
        server.close(5.0)
        claim.remove()


def test_the_idle_time_begins_anew_with_work_and_with_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy = [0.0], [False]

    def is_busy(master: object) -> bool:
        if busy[0] is None:
            raise LazyclusterError("the scheduler does not answer")
        return busy[0]

    process = object.__new__(ClusterProcess)
    process.document = {"idle": 100}
    engine = SimpleNamespace(is_busy=is_busy)
    process.cluster = SimpleNamespace(engine=engine, _master_endpoint=lambda: None)  # type: ignore[assignment]
    monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    looks = process._idle_looks()

    def after(seconds: float, state: bool | None = False) -> bool:
        clock[0] += seconds
        busy[0] = state  # type: ignore[call-overload]
        return next(looks)

    assert not next(looks)
    assert not after(90)
    assert not after(30, True)
    assert not after(90)
    assert not after(30, None)
    assert not after(90)
    assert after(30)
