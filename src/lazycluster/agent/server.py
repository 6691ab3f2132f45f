"""The agent: serves one manager's requests on this host, and ends all that it started when the manager has ended."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import errno
import os
import pwd
import sys
from importlib import import_module

from . import descriptors, json_text
from .guardian import AT_MANAGER_END_FILE, clean
from .loop import Loop
from .manager_link import ManagerLink
from .operations import HANDLERS
from .processes import (
    AGENT_MARKER,
    Termination,
    become_plain,
    close_all_but,
    descendants,
    explained,
    marked_processes,
    namespace,
    read_text,
    start_time,
)
from .session import RequestChannel

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, TypeVar

    from .partial_files import PartialFiles
    from .session import FrameSession

    _T = TypeVar("_T")

_FIRST_SESSION_LIMIT = 30.0  # seconds within which the session that started the agent must have come
_WORD_LIMIT = 5.0  # seconds within which who has connected must say what for
_MOST_STREAMS = 2  # descriptors that come along: for reading, and for writing
_SWEEP_DELAY = 0.5
_LISTEN_DELAY = 0.05  # seconds: what the manager asks for first, comes first
_PAUSE = 0.1  # seconds without new connections when there are no descriptors left


class Agent:
    """Holds what the agent has started.

    Attributes:
        loop: The reactor.
        directory: The agent's private directory; everything temporary lives in it.
        identity: The agent's name, which its processes carry in their environment.
        ending: Whether it is about to end.
    """

    def __init__(self, directory: str, listener: socket.socket, guardian: int, alive: int, local: bool) -> None:
        self.loop = Loop()
        self.directory = directory
        self.identity = identity()
        self._listener = listener
        self._guardian = guardian
        self._alive_fd = alive
        self.ending = False
        self._manager_link = ManagerLink(self, local)
        self._further: Dict[str, socket.socket] = {}  # where it listens beside its directory
        self._told = -1
        self._shared: Dict[Any, Any] = {}  # class -> its one object
        self._orderly = False
        self.loop.report = self.report
        self._listen(listener)
        self.loop.add_reader(alive, self._orphaned)  # it becomes readable only when the guardian has died
        self.loop.call_later(_FIRST_SESSION_LIMIT, self._look_for_session)

    def shared(self, kind: Callable[[Agent], _T]) -> _T:
        """Return the agent's one object of a class, made of the agent when it is first asked for."""
        if kind not in self._shared:
            self._shared[kind] = kind(self)
        found: _T = self._shared[kind]
        return found

    def listen_to_shell(self, fd: int) -> None:
        """Take what the login shell has told before it became this agent.

        Args:
            fd: Where, -1 if it has told nothing.
        """
        if fd < 0:
            return
        self._told = fd
        self.loop.call_later(_LISTEN_DELAY, self.listen)

    def listen(self) -> None:
        """Do so now, if it has not been done."""
        if self._told >= 0:
            from .commands import login_shell
            from .shell_startup import Shells

            fd, self._told = self._told, -1
            self.shared(Shells).listen(login_shell(), fd)

    def run(self) -> bool:
        """Serve until the manager has ended; returns whether it said so."""
        try:
            self.loop.run()
        except Exception:
            session = self._manager_link.session
            if session is not None:
                RequestChannel(session, 0, {}).event(crash=_traceback())
                session.flush_and_close()
            raise
        return self._orderly

    def report(self, text: str) -> None:
        """Tell the manager of something that went wrong, where no request is there to be failed."""
        if self._manager_link.session is not None:
            RequestChannel(self._manager_link.session, 0, {}).event(problem=text)

    # --- who is there --------------------------------------------------------------------------
    def _listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self.loop.add_reader(listener.fileno(), lambda: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection = socket.socket(fileno=listener._accept()[0])  # type: ignore[attr-defined]
        except BlockingIOError:
            return
        except OSError:  # no descriptors left: those who wait, wait
            self.loop.remove_reader(listener.fileno())
            self.loop.call_later(_PAUSE, lambda: self._listen(listener))
            return
        connection.setblocking(True)
        try:
            connection.settimeout(_WORD_LIMIT)
            purpose, fds = descriptors.receive(connection, _MOST_STREAMS)
            connection.settimeout(None)
        except OSError:
            connection.close()
            return
        if purpose == b"bulk" and fds:
            try:
                self._serve_bulk(connection, fds)
            except OSError as error:
                # Not only there: who has begun to send may find the streams closed before reading anything.
                self.report("no process can be started for a copy: " + explained(error.strerror))
                _refuse_bulk(connection, fds, error)
        elif purpose == b"session" and self._manager_link.session is None and len(fds) == 2:
            session = self._manager_link.begin(connection, fds)
            RequestChannel(session, 0, {}).event(**self._agent_info())
            self.loop.call_later(_SWEEP_DELAY, self._sweep)
        elif purpose == b"rejoin" and len(fds) == 2:
            self._manager_link.rejoin(connection, fds)
        else:
            if purpose in (b"bulk", b"rejoin") and not fds:
                self.report("no streams can be taken: " + explained(os.strerror(errno.EMFILE)))
            for fd in fds:
                os.close(fd)
            connection.close()

    def _agent_info(self) -> Dict[str, Any]:
        user = pwd.getpwuid(os.getuid()) if _known_user() else None
        return {
            "python": list(sys.version_info[:3]),
            "executable": sys.executable,
            "pid": os.getpid(),
            "uid": os.getuid(),
            "user": user.pw_name if user else str(os.getuid()),
            "home": os.path.expanduser("~"),
            "shell": user.pw_shell if user else "/bin/sh",
            "hostname": os.uname().nodename,
            "directory": self.directory,
            "identity": self.identity,
            "platform": sys.platform,
            "boot_id": read_text("/proc/sys/kernel/random/boot_id").strip(),
            "booted": start_time(1) or 0,
            "machine_id": read_text("/etc/machine-id").strip(),
            "network": namespace("net"),
            "path": os.environ.get("PATH", ""),
        }

    def _serve_bulk(self, connection: socket.socket, fds: List[int]) -> None:
        """Have a process of its own serve copies on the streams of another ssh session."""
        from . import files

        parts = self.shared(_unfinished)
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            become_plain()
            status = 1
            try:
                os.setsid()
                close_all_but([*fds, theirs.fileno(), *parts.descriptors])
                files.serve(fds[0], fds[-1], parts, theirs)
                status = 0
            finally:
                os._exit(status)
        for fd in fds:
            os.close(fd)
        theirs.close()
        self.loop.add_reader(ours.fileno(), lambda: self._inherit(ours))
        self.loop.on_exit(pid, lambda _: connection.close())

    def _inherit(self, connection: socket.socket) -> None:
        """Keep what a process could not finish whose link has dropped, for the one that comes after it."""
        from .partial_files import received

        try:
            part = received(connection)
        except (OSError, ValueError):
            part = None
        if part is None:
            self.loop.remove_reader(connection.fileno())
            connection.close()
            return
        parts = self.shared(_unfinished)
        parts.put(part)
        self.loop.call_later(self._manager_link.grace, lambda: parts.drop(part))

    # --- requests ------------------------------------------------------------------------------
    def handle(self, channel: RequestChannel) -> None:
        """Start the work that a request asks for."""
        operation = str(channel.params.get("op"))
        try:
            if operation == "at_manager_end":
                self._note_for_manager_end(channel)
            elif operation == "stop":
                self._stop(channel)
            elif operation == "listen":
                channel.result(sockets=self._listen_elsewhere())
            elif operation == "modules":
                _take_modules(channel)
            elif operation == "session":
                self._manager_link.agree(channel)
            elif operation == "ping":
                channel.result()
            elif operation in HANDLERS:
                module, function = HANDLERS[operation]
                getattr(import_module("." + module, __package__), function)(channel)
            else:
                channel.fail("value", "unknown request {!r}".format(operation))
        except OSError as error:
            why = explained(error.strerror or str(error))
            text = "{}: {}".format(why, error.filename) if error.filename else why
            channel.fail("os", text, errno=error.errno, path=error.filename)
        except Exception as error:  # noqa: BLE001  (one broken request must not end the others)
            channel.fail("internal", "{}: {}".format(type(error).__name__, error), traceback=_traceback())

    def _note_for_manager_end(self, channel: RequestChannel) -> None:
        """Remember what is to be ended and removed if the manager dies (asked of the keeper only)."""
        path = os.path.join(self.directory, AT_MANAGER_END_FILE)
        with open(path + ".new", "wb") as file:
            file.write(
                json_text.dumps({name: channel.params.get(name) or [] for name in ("pids", "programs", "paths")})
            )
        os.rename(path + ".new", path)
        channel.result()

    def _listen_elsewhere(self) -> List[str]:
        """Listen in all directories where that is possible: sessions of this host may see some of them only."""
        from .directories import LONGEST, SOCKET, every_parent_directory, listening, note_further

        if not self._further:
            for parent in dict.fromkeys(every_parent_directory()):
                try:
                    directory, listener = listening([parent], LONGEST)
                except OSError:
                    continue
                self._further[directory] = listener
                self._listen(listener)
            try:
                note_further(self.directory, list(self._further))
            except OSError:
                pass  # after a crash of this process and its guardian, the next agent removes them
        return [os.path.join(directory, SOCKET) for directory in self._further]

    def _stop(self, channel: RequestChannel) -> None:
        self._orderly = True

        def told() -> None:
            channel.result()
            if self._manager_link.session is not None:
                self._manager_link.session.flush_and_close()

        self.end(told)

    # --- the end -------------------------------------------------------------------------------
    def heard(self) -> None:
        """Note that the manager is alive."""
        self._manager_link.heard()

    def streams_ended(self, session: FrameSession, error: Optional[Exception]) -> None:
        """Handle the end of the manager's streams."""
        self._manager_link.streams_ended(session, error)

    def go_alone(self) -> None:
        """Do not depend on a manager any more."""
        self._manager_link.go_alone()

    def _sweep(self) -> None:
        from .leftovers import sweep

        sweep(self.directory)

    def _look_for_session(self) -> None:
        if self._manager_link.session is None:
            self.end()

    def _orphaned(self) -> None:
        self.loop.remove_reader(self._alive_fd)
        self.end(lambda: clean(self.directory))

    def end(self, then: Optional[Callable[[], Any]] = None) -> None:
        """End everything that was started, call `then`, and stop."""
        if self.ending:
            return
        self.ending = True

        def ended() -> None:
            try:
                if then is not None:
                    then()
                self._manager_link.close()
            finally:
                self.loop.stop()

        Termination(self.loop, self._alive, ended)

    def _alive(self) -> List[int]:
        """Return all that descends from the agent, or was adopted by its guardian."""
        me = os.getpid()
        if os.getppid() == self._guardian:
            return [pid for pid in descendants([me, self._guardian]) if pid != me]
        # Whoever adopted us has other children, too; what was not adopted by us is found by its marker.
        left = {pid for pid, marker in marked_processes(AGENT_MARKER) if marker == self.identity}
        return sorted(left.union(descendants([me])) - {me})


def _take_modules(channel: RequestChannel) -> None:
    """Handle the request `modules`: take modules that were not needed until now, as text or code."""
    parts: List[bytes] = []

    def take() -> None:
        import marshal
        import zlib

        # It comes from the manager, whose programs run here anyway.
        modules = marshal.loads(zlib.decompress(b"".join(parts)))  # noqa: S302
        __loader__.add(modules)  # type: ignore[name-defined]
        channel.result()

    channel.on_input, channel.on_input_end = parts.append, take


def _unfinished(agent: Agent) -> PartialFiles:
    """Return what copies have left unfinished."""
    from .partial_files import PartialFiles

    return PartialFiles()


def identity() -> str:
    """Return a name for this process that no other has, as long as the machine runs."""
    return "{}-{}-{}".format(namespace("pid"), os.getpid(), start_time(os.getpid()))


def _traceback() -> str:
    import traceback

    return traceback.format_exc()


def _refuse_bulk(connection: socket.socket, fds: List[int], error: OSError) -> None:
    """Answer on the streams of a copy that there is nobody to do it."""
    from .stream import DONE, ERROR, CopyError, FrameStream, StreamClosedError

    try:
        told = CopyError(b"a process for that", explained(error.strerror), error.errno)
        stream = FrameStream(fds[0], fds[-1])
        stream.put_json(ERROR, told.message_to_send())
        stream.put_json(DONE, {})
        stream.flush()
    except StreamClosedError:
        pass
    for fd in set(fds):
        os.close(fd)
    connection.close()


def _known_user() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True
