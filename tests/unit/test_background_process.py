"""The messages and the settings of a cluster's own process, without a cluster."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster import EnvironmentSpec
from lazycluster.agent import directories
from lazycluster.background import protocol, state
from lazycluster.background.client import BackgroundProcess, end, running
from lazycluster.background.launch import Launch, cluster_document, kept_variables
from lazycluster.background_process import program
from lazycluster.background_process.program import ClusterProcess, Relay
from lazycluster.background_process.server import RequestServer
from lazycluster.cli.cluster_logs import show_cluster_logs
from lazycluster.core import event_loop, unix
from lazycluster.exceptions import BackgroundError, LazyclusterError
from lazycluster.runtime.session import HostSpec
from patience import until
from terminals import Terminal


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


def test_scale_shows_that_it_waits_and_ctrl_c_says_that_the_cluster_goes_on(
    served: BackgroundProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def do(self: _Requests, command: object, arguments: dict[str, Any], stream: protocol.MessageStream) -> Any:
        if command == "scale":
            asked.set()
            go_on.wait(60)
        return {"ready": 3}

    monkeypatch.setattr(_Requests, "do", do)
    with Terminal([sys.executable, "-m", "lazycluster", "scale", "night", "3"]) as terminal:
        terminal.until("waiting for night to have 3 workers")
        assert asked.wait(60)
        terminal.type("\x03")
        terminal.until("Interrupted; 'night' goes on to scale: lazycluster info night")
        assert terminal.end() == 130
    go_on.set()


def test_a_cluster_that_is_ended_during_a_request_is_named(
    served: BackgroundProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(self: _Requests, command: object, arguments: dict[str, Any], stream: protocol.MessageStream) -> Any:
        shutil.rmtree(served.found.path)
        stream.end()

    monkeypatch.setattr(_Requests, "do", do)
    with pytest.raises(BackgroundError, match="has ended: somebody has ended the cluster"):
        served.request("info")


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


class _Cleaned:
    done = False

    def cleanup(self) -> None:
        self.done = True


@pytest.mark.parametrize("reason", ["", "its time was over"])
def test_hosts_are_cleaned_up_though_the_disk_is_full(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    process = object.__new__(ClusterProcess)
    process.claim = state.claim(state.NamedRecord.new("cluster", "night"))
    process.cluster, process.group = _Cleaned(), _Cleaned()  # type: ignore[assignment]
    process.outcome, process._reason, process._server = "", reason, None
    process.ended = threading.Event()
    monkeypatch.setattr(state, "_write", full)
    monkeypatch.setattr(state, "_empty", full)
    process._finish()
    assert process.cluster.done and process.group.done and process.ended.is_set()  # type: ignore[attr-defined, union-attr]
    assert not state.find("night").is_held  # type: ignore[union-attr]


def test_only_a_claim_that_is_surely_lost_ends_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    process = object.__new__(ClusterProcess)
    process.claim = state.claim(state.NamedRecord.new("cluster", "night"))
    process.document, process._reason = {"idle": None}, None
    process.cluster = SimpleNamespace(_check_alive=lambda: None, master=None)  # type: ignore[assignment]
    lock, away = process.claim.path / "lock", process.claim.path / "away"
    lstat = Path.lstat
    left: list[int | str] = [errno.EIO, errno.ESTALE, errno.EACCES, "away", "back", "away", "still away"]

    def look(path: Path) -> os.stat_result:
        if path == lock and left and isinstance(left[0], int):
            raise OSError(left[0], "the file system is away")
        return lstat(path)

    def next_look(seconds: float) -> None:
        if left[0] == "away":
            lock.rename(away)
        elif left[0] == "back":
            away.rename(lock)

    monkeypatch.setattr(Path, "lstat", look)
    monkeypatch.setattr(process, "_check_cluster", lambda: left.pop(0))
    monkeypatch.setattr(program, "time", SimpleNamespace(sleep=next_look, monotonic=time.monotonic, time=time.time))
    process._stay()
    assert left == ["still away"]
    assert "was removed, or another has the name now" in str(process._reason)
    lock.touch()  # another's
    with pytest.raises(FileNotFoundError, match="another has the name"):
        process.claim.write(state="ending")
    process.claim.remove()
    assert lock.exists()


class _Listener:
    """A socket at which nobody can be taken at first: there are too many open files."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self.failures = listener, 1

    def accept(self) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


def test_a_process_with_too_many_open_files_is_asked_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    claim.write(state="running")
    listener: Any = _Listener(protocol.listening(claim.path / state.SOCKET))
    server = RequestServer(listener, _Requests(), None)  # type: ignore[arg-type]
    server.start()
    assert running("night").request("status") == ["status", {}]
    assert not listener.failures
    server.close(5.0)
    claim.remove()


def test_a_person_whose_terminal_is_stopped_keeps_nobody_waiting() -> None:
    ours, theirs = socket.socketpair()
    relay = Relay()
    relay.attend(protocol.MessageStream(ours))
    with ours, protocol.MessageStream(theirs) as person:
        for _ in range(20_000):  # more than a socket holds
            relay.show("connecting")
        asked = event_loop.submit(relay.ask("password?", True))
        assert event_loop.run(_soon()) == "the loop goes on"
        while "question" not in (message := person.receive(30.0) or {}):
            assert message == {"progress": "connecting"}
        person.send(answer=message["question"], text="secret")
        assert asked.result(30.0) == "secret"
        person.end()


async def _soon() -> str:
    return "the loop goes on"


def test_only_one_person_is_asked_at_a_time_and_the_next_one_after_that() -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    first, second, third = (protocol.MessageStream(ours) for ours, _ in pairs)
    relay = Relay()
    relay.attend(first)
    with pytest.raises(LazyclusterError, match="asked already"):
        relay.attend(second)
    relay.gone(second)  # who was refused takes nobody's place
    assert relay.stream is first
    relay.gone(first)
    relay.attend(third)
    for ours, theirs in pairs:
        theirs.close()
        ours.close()


@pytest.mark.parametrize("before", [0, 65535])
def test_a_log_is_shown_as_it_is_but_cannot_steer_the_terminal(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    (claim.path / state.LOG).write_bytes(b"a" * before + "é\x1b[2J\n".encode() + b"\xc3")
    found = state.find("night")
    assert found is not None
    show_cluster_logs(found, None, follow=False)
    assert capsys.readouterr().out == "a" * before + "é\\x1b[2J\n\ufffd"
    claim.remove()


@pytest.mark.parametrize("end_of_claim", [state.Claim.close, state.Claim.remove], ids=["killed", "ended by down"])
def test_a_log_that_is_followed_is_shown_to_the_end_of_its_cluster(
    end_of_claim: Callable[[state.Claim], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    log, shown = claim.path / state.LOG, []
    log.write_text("first\n")
    found = state.find("night")
    assert found is not None
    following = threading.Thread(target=show_cluster_logs, args=[found, None, True], daemon=True)
    following.start()

    def has_shown(text: str) -> bool:
        shown.append(capsys.readouterr().out)
        return "".join(shown) == text

    until(lambda: has_shown("first\n"), "the log so far")
    log.rename(log.with_name("log.1"))  # it was full
    log.write_text("second\n")
    until(lambda: has_shown("first\nsecond\n"), "the new log")
    with log.open("a") as file:
        file.write("last\n")
    if end_of_claim is state.Claim.remove:
        until(lambda: has_shown("first\nsecond\nlast\n"), "the last line")
    end_of_claim(claim)
    following.join(60)
    assert not following.is_alive()
    assert has_shown("first\nsecond\nlast\n")


def test_a_log_of_a_cluster_that_is_gone_already_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    (claim.path / state.LOG).write_text("all\n")
    claim.close()
    found = state.find("night")
    assert found is not None
    following = threading.Thread(target=show_cluster_logs, args=[found, None, True], daemon=True)
    following.start()
    following.join(60)
    assert not following.is_alive()
    assert capsys.readouterr().out == "all\n"


def test_a_log_of_a_cluster_on_another_machine_is_followed_until_it_says_that_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what is written in the home that both share is seen: whether it was killed is not."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    claim.write(machine="another", host="login2", state="running")
    (claim.path / state.LOG).write_text("all\n")
    claim.close()  # as where locks of other machines are not seen
    found = state.find("night")
    assert found is not None
    following = threading.Thread(target=show_cluster_logs, args=[found, None, True], daemon=True)
    following.start()
    said: list[str] = []

    def has_been_told() -> bool:
        said.append(capsys.readouterr().err)
        return "login2: if its process is killed there, that is not seen here" in "".join(said)

    until(has_been_told, "what cannot be seen")
    found.write(state="ended", reason="lazycluster down")
    following.join(60)
    assert not following.is_alive()


def test_a_starter_that_changes_its_mind_at_the_last_moment_ends_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    claim = state.claim(state.NamedRecord.new("cluster", "night"))
    ours, theirs = socket.socketpair()
    process = object.__new__(ClusterProcess)
    process.claim, process.relay, process._starter = claim, Relay(), protocol.MessageStream(theirs)
    claim.write(state="running")  # just now; the starter does not know it yet
    ended: list[str] = []
    monkeypatch.setattr(process, "end", ended.append)
    with subprocess.Popen(["true"]) as child:
        Launch(claim, protocol.MessageStream(ours), child).end()
    process._listen_to_starter()
    assert ended == [""]
    process._starter.close()
    claim.remove()
