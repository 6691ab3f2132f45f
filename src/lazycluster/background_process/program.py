"""The life of a cluster's own process: it makes the cluster, serves requests, and ends it when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import logging
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lazycluster
from lazycluster import engines, utils
from lazycluster.agent import processes
from lazycluster.background import state
from lazycluster.background.protocol import MessageStream, listening
from lazycluster.background.state import Claim
from lazycluster.cluster import service_spec
from lazycluster.cluster.engine_cluster import EngineCluster
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.health import ClusterEvent
from lazycluster.core import event_loop, forks, unix
from lazycluster.exceptions import LazyclusterError
from lazycluster.group.members import connect_specs
from lazycluster.output import progress
from lazycluster.runtime.session import HostSpec
from lazycluster.runtime_mgmt import RuntimeGroup
from lazycluster.ssh import agent_program, logins, terminal, workspace

from .requests import Requests
from .server import RequestServer

__all__ = ["ClusterProcess", "main"]

logger = logging.getLogger("lazycluster")

_LOG_SIZE = 2 * 1024 * 1024  # bytes; as much again is kept of what was before
_LOOK = 1.0  # seconds between two looks at the cluster, the log and the clock
_LOST_LOOKS = 2  # looks in a row that do not find the claim, until it is taken for lost
_IDLE_LOOK = 30.0  # seconds between two questions whether the cluster is idle, at most
_NOT_NEEDED = ("lazycluster.cli", "lazycluster.engines.", "lazycluster.mongo", "lazycluster.pool.joblib_backend")
_PROGRAMS = ("__main__", ".demo", ".plot")
_ANSWERS = 5.0  # seconds for the last answers to be read


class _EndError(BaseException):
    """The process is told to end; on the main thread, as Ctrl-C would be."""


class Relay:
    """Relay of questions and progress to the person who is there, over the connection of a starter or a login.

    Attributes:
        stream: The connection; None: nobody is there.
    """

    def __init__(self) -> None:
        self.stream: MessageStream | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._questions: dict[int, asyncio.Future[str | None]] = {}

    async def ask(self, question: str, secret: bool) -> str | None:
        """Ask a person; None if nobody is there, or nobody answers."""
        number, stream = next(self._numbers), self.stream
        if stream is None:
            return None

        def put() -> bool:
            return stream.send(question=number, text=question, secret=secret)

        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        try:
            # On a thread: whoever is there may be stopped (Ctrl-Z), and take nothing.
            if not await event_loop.in_thread(put):
                return None
            return await future
        finally:
            if self._questions.pop(number, None) is not None:
                stream.offer(withdrawn=number)

    def show(self, text: str) -> None:
        """Show how far things are."""
        stream = self.stream
        if stream is not None:
            stream.offer(progress=text)

    def attend(self, stream: MessageStream) -> None:
        """Ask whoever is at the other end of a connection from now on; the answers are read on a thread.

        Raises:
            ClusterError: If somebody is asked already.
        """
        with self._lock:
            if self.stream is not None:
                raise ClusterError(
                    "somebody is asked already, by another lazycluster login or as it is being started\n"
                    "  Next step: wait until that is over, or end it with Ctrl-C"
                )
            self.stream = stream
        threading.Thread(target=self.listen, args=[stream], name="lazycluster login", daemon=True).start()

    def listen(self, stream: MessageStream, otherwise: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Take answers, until the connection ends; then nobody is there any more.

        Args:
            stream: The connection.
            otherwise: Takes what is no answer.
        """
        with contextlib.suppress(ValueError, OSError):
            while (message := stream.receive()) is not None:
                if "answer" in message:
                    self.answered(message)
                elif otherwise is not None:
                    otherwise(message)
        self.gone(stream)

    def answered(self, message: Mapping[str, Any]) -> None:
        """Take an answer to a question. May be called from any thread."""
        event_loop.get_loop().call_soon_threadsafe(self._settle, message)

    def gone(self, stream: MessageStream) -> None:
        """Take note that nobody is at the end of a connection any more. May be called from any thread."""
        with self._lock:
            if self.stream is not stream:
                return
            self.stream = None
        event_loop.get_loop().call_soon_threadsafe(self._settle_all)

    def _settle(self, message: Mapping[str, Any]) -> None:
        number, text = message.get("answer"), message.get("text")
        future = self._questions.pop(number, None) if isinstance(number, int) else None
        if future is not None and not future.done():
            future.set_result(text if isinstance(text, str) else None)

    def _settle_all(self) -> None:
        for future in self._questions.values():
            if not future.done():
                future.set_result(None)
        self._questions.clear()


class ClusterProcess:
    """A cluster in a process of its own.

    Args:
        document: What the starter has said.
        starter: The connection to the starter.

    Attributes:
        name: The name of the cluster.
        document: See above.
        claim: The name, and the record.
        relay: See `Relay`.
        cluster: The cluster; None before it is made.
        group: Its hosts.
        unreachable: The hosts that were left out, each with the reason.
        idle_since: When it was last busy, in the clock's time; None if it is not asked.
        ended: Set when all is ended, before the process is.
        outcome: Why the end has failed, "" if it has not.
    """

    def __init__(self, document: Mapping[str, Any], starter: MessageStream) -> None:
        self.name = str(document["name"])
        self.document = document
        self.claim = Claim.inherited(self.name, int(document["lock"]))
        forks.close_in_children(self.claim.fd)
        self.relay = Relay()
        self.relay.stream = starter
        self.cluster: EngineCluster | None = None
        self.group: RuntimeGroup | None = None
        self.unreachable: dict[str, str] = {}
        self.idle_since: float | None = None
        self.ended = threading.Event()
        self.outcome = ""
        self._starter: MessageStream | None = starter
        self._told: dict[str, Any] = {}
        self._go_on = threading.Event()
        self._reason: str | None = None  # why it ends; "" if it was told to by its user
        self._ending = False
        self._lock = threading.Lock()
        self._server: RequestServer | None = None

    # --- the end -------------------------------------------------------------------------------
    def end(self, reason: str = "") -> None:
        """End the cluster and the process. May be called from any thread.

        Args:
            reason: Why; "" if its user wants it, and nothing is to be kept of it.
        """
        with self._lock:
            if self._reason is None:
                self._reason = reason
                os.kill(os.getpid(), signal.SIGTERM)  # the main thread may be waiting for anything

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._ending:
            self._ending = True
            if self._reason is None:
                self._reason = "somebody has ended its process, or the machine was shut down (SIGTERM)"
            raise _EndError

    # --- the life ------------------------------------------------------------------------------
    def run(self) -> int:
        """Live; returns the exit status."""
        signal.signal(signal.SIGTERM, self._on_signal)
        status = 0
        try:
            self._prepare()
            self._start()
            self._stay()
        except _EndError:
            self._tell_of_end()
        except BaseException as error:  # noqa: BLE001  (the starter, or the record, tells of it)
            self._ending, status = True, 1
            self._failed(error)
        self._ending = True
        self._finish()
        return status

    def _prepare(self) -> None:
        """Have this process independent of where it was started."""
        pid = os.getpid()
        self.claim.write(pid=pid, process_started=unix.process_start_time(pid))
        utils.Environment.main_directory = str(self.document["settings"]["main_directory"])
        utils.Environment.trust_group = bool(self.document["settings"]["trust_group"])
        utils.use_log_directory(self.claim.path / state.LOGS)
        workspace.use_directory(self.claim.path)
        terminal.ask_through(self.relay.ask)
        progress.relay_to(self.relay.show)
        logins.outlive()
        threading.Thread(target=self._listen_to_starter, name="lazycluster starter", daemon=True).start()
        self._server = RequestServer(self._listener(), Requests(self), self.relay)
        self._server.start()
        _import_everything(engines.known()[str(self.document["engine"])].target.partition(":")[0])

    def _listener(self) -> socket.socket:
        try:
            return listening(self.claim.path / state.SOCKET)
        except OSError as error:
            raise ClusterError(
                f"the file system of {self.claim.path} has no sockets: {error.strerror or error}\n"
                "  Next step: have XDG_STATE_HOME name a directory on a local disk"
            ) from None

    def _listen_to_starter(self) -> None:
        assert self._starter is not None
        self.relay.listen(self._starter, self._take)
        if self.claim.record.state == "starting":
            self.end("")

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("end"):
            self.end("")
            return
        self._told = message
        self._go_on.set()

    def _start(self) -> None:
        document, starter = self.document, self._starter
        assert starter is not None
        cluster_class = engines.load(str(document["engine"]))
        wanted = document.get("class")
        if wanted not in (None, f"{cluster_class.__module__}:{cluster_class.__qualname__}"):
            raise ClusterError(
                f"a cluster in the background is of a class that an engine is registered with, not of {wanted}\n"
                "  Next step: register it under the entry-point group lazycluster.engines"
            )
        for package in cluster_class.engine_class.packages:
            with contextlib.suppress(ImportError):  # the cluster says what is missing, and how it is installed
                importlib.import_module(package)
        specs = [HostSpec.of(spec, ask=True) for spec in document["hosts"]]
        runtimes, self.unreachable = connect_specs(specs, "skip" if document["skip"] else "raise")
        self.group = RuntimeGroup(runtimes)
        self.cluster = cluster_class(self.group, **document["options"])
        self.cluster.on_event(_log_event)
        if document.get("wait"):
            starter.send(result={"state": "connected"})
            self._go_on.wait()
            self._go_on.clear()
        told = {**document["start"], **self._told}
        self.cluster.start(told.get("workers"), told.get("port"))
        if document.get("connection_file"):
            self.cluster.write_connection_file(document["connection_file"])
        self._note_running()
        starter.send(result={"unreachable": self.unreachable, "connection": self.connection_lines(), **self.summary()})
        self.relay.gone(starter)

    def _note_running(self) -> None:
        cluster, document = self.cluster, self.document
        assert cluster is not None and self.group is not None
        limits = [cluster.engine.valid_until()]
        if document.get("for") is not None:
            limits.append(time.time() + float(document["for"]))
        until = min((limit for limit in limits if limit is not None), default=None)
        details = {**self.claim.record.details, "hosts": self.group.hosts}
        self.claim.write(state="running", until=until, details=details)

    def connection_lines(self) -> list[str]:
        """Return lines on what else can be looked at."""
        return self.cluster._further_addresses() if self.cluster is not None else []

    def summary(self) -> dict[str, Any]:
        """Return what `ls` shows of the cluster."""
        workers = self.cluster.workers if self.cluster is not None else []
        idle = self.document.get("idle")
        left = None if idle is None or self.idle_since is None else self.idle_since + float(idle) - time.monotonic()
        return {
            "state": self.claim.record.state,
            "workers": len(workers),
            "ready": sum(worker.state == "ready" for worker in workers),
            "hosts": self.group.hosts if self.group is not None else [],
            "needs_login": logins.needed(),
            "until": self.claim.record.until,
            "idle_left": left,
            "problem": self.cluster._problem() if self.cluster is not None else "",
            "links": self.cluster._link_problems if self.cluster is not None else {},
            "unreached": self.cluster._unreached() if self.cluster is not None else "",
            "version": lazycluster.__version__,
        }

    def _stay(self) -> None:
        looks = self._idle_looks()
        lost = 0  # looks in a row
        while True:
            time.sleep(_LOOK)
            lost = lost + 1 if self.claim.is_lost() else 0
            if lost >= _LOST_LOOKS:
                self._reason = f"{self.claim.path} was removed, or another has the name now: nobody could reach it"
                return
            if not lost:
                _bound_log(self.claim.path / state.LOG)
            self._check_cluster()
            until = self.claim.record.until
            if until is not None and time.time() >= until:
                self._reason = "its time was over" if self.document.get("for") else "its certificates have expired"
                return
            if next(looks):
                self._reason = f"it was idle for {float(self.document['idle']):g} s"
                return

    def _check_cluster(self) -> None:
        cluster = self.cluster
        assert cluster is not None
        cluster._check_alive()
        master = cluster.master
        if master is not None and master.state in ("failed", "ended"):
            raise ClusterError(f"{master.name} has ended: {master.problem}")

    def _idle_looks(self) -> Iterator[bool]:
        """Yield whether the cluster was idle for as long as it may be; to be asked again and again."""
        cluster = self.cluster
        assert cluster is not None
        if self.document.get("idle") is None:
            yield from itertools.repeat(False)
        limit = float(self.document["idle"])
        pause = min(_IDLE_LOOK, limit / 4)
        asked = self.idle_since = time.monotonic()
        while True:
            if time.monotonic() - asked >= pause:
                try:
                    busy = cluster.engine.is_busy(cluster._master_endpoint())
                except LazyclusterError as error:
                    logger.warning("it is not known whether the cluster is idle: %s", error)
                    busy = True
                asked = time.monotonic()
                self.idle_since = asked if busy else self.idle_since
            yield time.monotonic() - self.idle_since >= limit

    def _failed(self, error: BaseException) -> None:
        """Tell the starter of an error; without one, the record tells of it."""
        known = isinstance(error, (LazyclusterError, OSError, ValueError, TypeError))
        text = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        logger.error("%s", text, exc_info=None if known else error)
        if self.claim.record.state == "running":
            self._reason = text.partition("\n")[0]
        elif self._starter is not None:
            self._reason = "" if self._starter.send(error=text, type=type(error).__name__) else text

    def _tell_of_end(self) -> None:
        """Tell a starter that waits still that somebody else has ended the cluster."""
        if self._starter is not None:
            why = self._reason or "somebody has used lazycluster down"
            text = f"the cluster {self.name!r} was ended before it ran: {why}\n  Next step: start it again"
            self._starter.offer(error=text, type=ClusterError.__name__)  # a starter that is stopped delays no end

    def _finish(self) -> None:
        """End everything, and leave nothing but a record of why, unless its user has ended it."""
        self._note(state="ending")
        for thing in (self.cluster, self.group):
            if thing is not None:
                try:
                    thing.cleanup()
                except Exception as error:  # noqa: BLE001  (the rest is to be ended, too)
                    logger.error("cleaning up: %s", error)
                    self.outcome = self.outcome or str(error)
        if self._reason:
            logger.info("the cluster has ended: %s", self._reason)
            if not self.claim.is_lost():
                with contextlib.suppress(OSError):
                    (self.claim.path / state.SOCKET).unlink(missing_ok=True)
            self._note(state="ended", reason=self._reason)
            self.claim.close()
        else:
            try:
                self.claim.remove()
            except OSError as error:
                logger.error("removing %s: %s", self.claim.path, error)
        self.ended.set()
        if self._server is not None:
            self._server.close(_ANSWERS)

    def _note(self, **changes: Any) -> None:
        """Write the record, if that is possible: a full disk must not keep the hosts from being cleaned up."""
        try:
            self.claim.write(**changes)
        except OSError as error:
            logger.error("writing the record: %s", error)


def _log_event(event: ClusterEvent) -> None:
    detail = f": {event.detail}" if event.detail else ""
    logger.info("%s: %s: %s%s", event.host, event.name, event.kind, detail)


def _import_everything(engine: str) -> None:
    """Import and read what may be needed later: another version, or none, may be installed by then.

    Args:
        engine: The module of the engine; the others are not needed.
    """
    own = f"{engine.rpartition('.')[0]}."
    service_spec.pin_sources()
    agent_program.read_all()
    for name in _modules(lazycluster.__path__, "lazycluster."):
        if name.startswith(own) or not name.startswith(_NOT_NEEDED):
            with contextlib.suppress(ImportError):  # of a package that is not installed
                importlib.import_module(name)


def _modules(path: Iterable[str], prefix: str) -> Iterator[str]:
    """Yield the names of all modules of a package; unlike `pkgutil.walk_packages`, none is imported."""
    for module in pkgutil.iter_modules(path, prefix):
        if not module.name.endswith(_PROGRAMS):
            yield module.name
        if module.ispkg:
            yield from _modules(
                [str(Path(folder, module.name.rpartition(".")[2])) for folder in path], f"{module.name}."
            )


def _bound_log(path: Path) -> None:
    """Begin a new log when it is full; the last one is kept."""
    with contextlib.suppress(OSError):
        if path.stat().st_size <= _LOG_SIZE:
            return
        path.replace(path.with_name(state.LOG + ".1"))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        for stream in (1, 2):
            os.dup2(fd, stream)
        os.close(fd)


def _own_streams() -> socket.socket:
    """Take the connection to the starter from standard input, which is empty then."""
    connection = socket.socket(fileno=os.dup(0))
    connection.set_inheritable(False)
    forks.close_in_children(connection.fileno())
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    return connection


def main(document: Mapping[str, Any], received: bytes) -> int:
    """Run the program.

    Args:
        document: What the starter has said.
        received: What came from the starter after it.

    Returns:
        The exit status.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    connection = _own_streams()
    os.umask(0o077)
    processes.forbid_cores()  # it knows the secrets of the cluster
    return ClusterProcess(document, MessageStream(connection, received)).run()
