"""The start of a cluster's own process: a new interpreter, which outlives the terminal, the notebook and the login.

Whoever starts it stays connected until the cluster runs: what ssh asks a person, and how far things are, comes over
that connection. If it breaks before, the process ends, with all that it has begun.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazycluster.core import event_loop
from lazycluster.core.words import signal_name
from lazycluster.exceptions import BackgroundError
from lazycluster.output import progress
from lazycluster.ssh.terminal import ask_on_terminal
from lazycluster.utils import Environment

from . import login_session, protocol, state
from .client import answer
from .state import Claim, NamedRecord

__all__ = ["Launch", "Person", "cluster_document", "kept_variables", "launch"]

_PACKAGE = Path(__file__).absolute().parents[1]
_PROGRAM = _PACKAGE / "background_process" / "__main__.py"
_END = 60.0  # seconds for a process that is told to end while it starts
_SHOWN, _TAIL = 25, 16384  # lines and bytes at the end of its log that are part of an error

# What a cluster's process needs, or what settings of it are in. All else stays with whoever starts it.
_KEPT = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
        *("SSH_AUTH_SOCK", "SSH_SK_PROVIDER", "SSH_SK_HELPER", "KRB5CCNAME", "KRB5_CONFIG"),
        *("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    )
)
_KEPT_PREFIXES = ("LC_", "LAZYCLUSTER_", "DASK_", "UV_")


def kept_variables() -> dict[str, str]:
    """Return the environment variables of this process that a cluster's own process keeps."""
    return {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


class Person:
    """The person at the terminal of this process, who is asked what a cluster's process has to know.

    Args:
        may_be_asked: False if nobody is there.
    """

    def __init__(self, may_be_asked: bool) -> None:
        self._is_there = may_be_asked
        self._stream: protocol.MessageStream | None = None
        self._asked: dict[int, event_loop.LoopFuture[str | None]] = {}
        self._display = progress.RelayedProgress()

    def at(self, stream: protocol.MessageStream) -> Person:
        """Answer over this stream from now on."""
        self._stream = stream
        return self

    def __call__(self, message: Mapping[str, Any]) -> None:
        """Take what a process says before its answer: progress, a question, or that a question is withdrawn."""
        if "progress" in message:
            self._display.show(str(message["progress"]))
        elif "question" in message:
            self._ask(int(message["question"]), str(message.get("text", "")), bool(message.get("secret", True)))
        elif "withdrawn" in message and (question := self._asked.pop(int(message["withdrawn"]), None)) is not None:
            question.cancel()

    def _ask(self, number: int, text: str, secret: bool) -> None:
        stream = self._stream
        assert stream is not None
        if not self._is_there:
            stream.send(answer=number, text=None)
            return
        self._display.close()

        def answered(future: concurrent.futures.Future[str | None]) -> None:
            if self._asked.pop(number, None) is not None and not future.cancelled():
                stream.send(answer=number, text=future.result())

        question = self._asked[number] = event_loop.submit(ask_on_terminal(text, secret=secret))
        question.add_done_callback(answered)

    def close(self) -> None:
        """Withdraw all questions, and remove what is shown."""
        for question in list(self._asked.values()):
            question.cancel()
        self._asked.clear()
        self._display.close()


class Launch:
    """A cluster's process that is connected to its starter still.

    Args:
        claim: The name that it gets.
        stream: The connection.
        process: The process.
    """

    def __init__(self, claim: Claim, stream: protocol.MessageStream, process: subprocess.Popen[bytes]) -> None:
        self.name = claim.name
        self._path = claim.path
        self._stream, self._process = stream, process

    def wait(self, person: Person) -> dict[str, Any]:
        """Wait for the next thing that is done there: the hosts are connected, or the cluster runs.

        Args:
            person: Who is asked.

        Raises:
            BackgroundError: If it has failed.
        """
        try:
            return dict(answer(self._stream, self.name, person.at(self._stream)))
        except EOFError:
            raise BackgroundError(self._end_of_process()) from None
        finally:
            person.close()

    def _end_of_process(self) -> str:
        """Return how the process has ended, with the end of its log, which is not kept."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END)
        status = self._process.returncode
        if status is None or status >= 0:
            how = "has ended" + (f" (exit status {status})" if status else "")
        else:
            how = f"was ended by {signal_name(-status)}"
        lines = [f"the process of {self.name!r} {how} before the cluster ran"]
        said = self._end_of_log()
        if said:
            lines += ["  The end of its log:", *(f"  | {line}" for line in said)]
        step = "fix what its log says, then start it again" if said else "start it again"
        if status == -signal.SIGKILL:
            step = "start it again; if nobody has killed it, look with dmesg whether the machine had no memory left"
        lines.append(f"  Next step: {step}")
        return "\n".join(lines)

    def _end_of_log(self) -> list[str]:
        with contextlib.suppress(OSError), (self._path / state.LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode("utf-8", "replace").strip().splitlines()[-_SHOWN:]
        return []

    def go_on(self, **message: Any) -> None:
        """Tell the process what comes next."""
        self._stream.send(**message)

    def let_go(self) -> None:
        """Leave the process alone, which goes on by itself."""
        self._stream.close()

    def end(self) -> None:
        """Have the process end, with all that it has begun, and wait for that."""
        self._stream.send(
            end=True
        )  # it may run by now, and be about to say so: then the end of the connection says nothing
        self._stream.end()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its keeper, and its hosts, end the rest
        self._stream.close()
        found = state.find(self.name)
        if found is not None:
            found.remove()


def cluster_document(
    engine: str,
    hosts: Sequence[Mapping[str, Any]],
    *,
    skip: bool = False,
    options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    port: int | None = None,
    idle: float | None = None,
    lifetime: float | None = None,
    connection_file: str | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Return what the process of a cluster is told.

    Args:
        engine: The name of the engine.
        hosts: The hosts, see `HostSpec.document`.
        skip: Whether hosts that cannot be used are left out.
        options: Arguments of the cluster's class.
        workers: How many workers; None: as the engine has it.
        port: The port of the master; None: any.
        idle: Seconds without work after which the cluster ends.
        lifetime: Seconds after which it ends.
        connection_file: Where other programs find out how to connect.
        wait: Whether the cluster is started only when `Launch.go_on` says so.

    Raises:
        TypeError: If JSON cannot hold something of it.
    """
    start = {"workers": workers, "port": port}
    options = dict(options or {})
    for name, value in options.items():
        try:
            json.dumps({name: value})
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} cannot be used for a cluster in the background, whose process gets plain data: {error}"
            ) from None
    return {
        "engine": engine, "hosts": list(hosts), "skip": skip, "options": options, "start": start, "idle": idle,
        "for": lifetime, "connection_file": connection_file, "wait": wait,
    }  # fmt: skip


def launch(record: NamedRecord, document: Mapping[str, Any]) -> Launch:
    """Start the process of a cluster.

    Args:
        record: What is written of it; its name is taken.
        document: What it is told, as JSON can hold it; may hold secrets, which nothing else gets to see.

    Raises:
        LazyclusterError: If the name is taken.
        BackgroundError: If the process would end with the login.
        OSError: If it cannot be started.
    """
    prefix = login_session.outliving()
    claim = state.claim(record)
    ours, theirs = socket.socketpair()
    try:
        process = _start(claim, theirs, prefix)
    except BaseException:
        ours.close()
        claim.remove()
        raise
    finally:
        theirs.close()
    stream = protocol.MessageStream(ours)
    stream.send(**{**document, "name": claim.name, "lock": claim.fd, "path": _search_path(), "settings": _settings()})
    claim.close()  # the process has it
    return Launch(claim, stream, process)


def _settings() -> dict[str, Any]:
    """Return the settings of this process that the cluster's process has, too."""
    return {"main_directory": Environment.main_directory, "trust_group": Environment.trust_group}


def _start(claim: Claim, channel: socket.socket, prefix: list[str]) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise BackgroundError("this program does not know its Python (sys.executable), which a cluster's process needs")
    log = os.open(claim.path / state.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    env = kept_variables() | (login_session.variables() if prefix else {})
    try:
        # Not "-I": it would not find what is installed for this user alone. The program removes its own directory.
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [*prefix, sys.executable, "-E", str(_PROGRAM), claim.name],
            stdin=channel.fileno(), stdout=log, stderr=log,
            cwd="/", env=env, start_new_session=True, pass_fds=[claim.fd],
        )  # fmt: skip
    finally:
        os.close(log)
    # A zombie would stay as long as this process does.
    threading.Thread(target=process.wait, name="lazycluster background", daemon=True).start()
    return process


def _search_path() -> list[str]:
    """Return where the process finds this package, and what PYTHONPATH says, if that is not where Python looks."""
    named = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(part).is_absolute()]
    return [part for part in [*named, str(_PACKAGE.parent)] if part in sys.path or part in named]
