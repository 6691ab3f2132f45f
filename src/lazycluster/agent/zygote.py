"""A small process that functions are forked from, run by the interpreter that the functions want.

The agent sends the text of this module and of some others to an interpreter and talks to it over its standard
input, a unix socket. For each call it hands over descriptors, and a child does the rest: so a call begins with a fork
(about a millisecond) and not with a new interpreter, and whatever it does to its process harms nothing else.

A zygote has one thread and has imported next to nothing. On request it makes a *warmed* one of itself: a child that
imports modules which calls need, and then serves calls in the same way.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import types
from typing import Any, Dict, List, Tuple

HEAD = struct.Struct("!I")  # before each message: its length
_PACKAGE = "lazycluster.agent"  # they have the same names as on the manager, since pickles refer to them
_READ_SIZE = 64 * 1024
_MOST_FDS = 64
_REMADE = ("jemalloc_bg_thd",)  # threads that their library makes anew after a fork (pyarrow's allocator)


class UnsafeError(Exception):
    """An import has made what does not survive a fork."""


def main(sources: Dict[str, str], pool_sources: Dict[str, str]) -> None:
    """Serve the agent until it closes the connection.

    Args:
        sources: The text of each module that children need, in the order in which they need each other.
        pool_sources: The text of those that only workers of pools need: loaded when the first is wanted.
    """
    control = socket.socket(fileno=os.dup(0))
    for fd in (0, 1):
        _point_to_null(fd)
    if sys.path[:1] == [""]:
        del sys.path[0]  # the directory that the process happens to be in
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _load_modules(sources, ())
    _module("bytecode").use()
    zygote = Zygote(control, tuple(sources), pool_sources)
    _point_to_null(2)  # until here it is the agent's, who shows it if the start fails
    zygote.tell(ready=True, version=list(sys.version_info[:3]), executable=sys.executable)
    zygote.serve()


def _load_modules(sources: Dict[str, str], loaded: Tuple[str, ...]) -> None:
    """Load modules, for which those that were loaded before are there, too."""
    installed = sys.modules.get(_PACKAGE)
    package = types.ModuleType(_PACKAGE)
    sys.modules[_PACKAGE] = package
    for name in loaded:
        setattr(package, name, _module(name))
    for name, text in sources.items():
        module = types.ModuleType("{}.{}".format(_PACKAGE, name))
        module.__package__ = _PACKAGE
        sys.modules[module.__name__] = module
        setattr(package, name, module)
        exec(compile(text, "<lazycluster {}>".format(name), "exec"), module.__dict__)
    del sys.modules[_PACKAGE]  # there may be an installed one
    if installed is not None:
        sys.modules[_PACKAGE] = installed


class Zygote:
    """Forks a process for each call and tells the agent how each has ended.

    Args:
        control: The connection to the agent.
        loaded: The names of the modules for children.
        pool_sources: See `main`.
    """

    def __init__(self, control: socket.socket, loaded: Tuple[str, ...], pool_sources: Dict[str, str]) -> None:
        self._control = control
        self._loaded = loaded
        self._pool_sources = pool_sources
        self._received = bytearray()
        self._fds: List[int] = []
        self._children: Dict[int, int] = {}  # pid -> number of the call
        self._woken, self._wake = _wake_pipe()
        self._stamps: Dict[str, int] = {}  # of the directories that modules come from, from before they were imported
        gc.disable()
        gc.freeze()

    def tell(self, **message: Any) -> None:
        """Send a message to the agent."""
        data = json.dumps(message).encode("ascii")
        try:
            self._control.sendall(HEAD.pack(len(data)) + data)
        except OSError:
            os._exit(0)  # the agent has ended

    def serve(self) -> None:
        """Fork for the agent until it closes the connection."""
        self._watch_children()
        while True:
            poll = select.poll()  # anew in each round: in a warmed zygote the connection is another one
            poll.register(self._control, select.POLLIN)
            poll.register(self._woken, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self._woken in ready:
                os.read(self._woken, _READ_SIZE)
                self._reap()
            if self._control.fileno() in ready:
                self._receive()

    def _watch_children(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the signal reaches the descriptor
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self._children.pop(pid, None)
            if number is not None:
                self.tell(id=number, status=status)

    def _receive(self) -> None:
        try:
            data, fds = _module("descriptors").receive(self._control, _MOST_FDS, _READ_SIZE)
        except OSError:
            data, fds = b"", []
        if not data:
            os._exit(0)
        self._fds += fds
        self._received += data
        while len(self._received) >= HEAD.size:
            end = HEAD.size + HEAD.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            message = json.loads(bytes(self._received[HEAD.size : end]))
            del self._received[:end]
            self._handle(message)

    def _handle(self, message: Dict[str, Any]) -> None:
        if "library" in message:
            self._add_library(message["library"])
            return
        count = message["fds"]
        fds, self._fds = self._fds[:count], self._fds[count:]
        if message.get("kind") == "pool" and self._pool_sources:
            _load_modules(self._pool_sources, self._loaded)
            self._pool_sources = {}
            gc.freeze()
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, or no memory
            for fd in fds:
                os.close(fd)
            self.tell(id=message["id"], status=None, failed=error.strerror)
            return
        if pid == 0:
            self._forked()
            if "warm" in message:
                self._become_warmed(socket.socket(fileno=fds[0]), message["warm"])
            else:
                self._call(message, fds)
            return
        self._children[pid] = message["id"]
        for fd in fds:
            os.close(fd)
        self.tell(id=message["id"], pid=pid)

    def _add_library(self, sources: Dict[str, Tuple[str, bool, str, str]]) -> None:
        """Take the pickling library from the manager, which both sides must have in the same version."""
        try:
            _module("localmodules").install_library(sources)
        except Exception as error:  # noqa: BLE001  (whatever it is, the agent has to know)
            self.tell(library=False, error="{}: {}".format(type(error).__name__, error))
            return
        gc.collect()
        gc.freeze()
        self.tell(library=True)

    def _forked(self) -> None:
        """Undo in a child what belongs to the parent only."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in (self._woken, self._wake):
            os.close(fd)
        self._control.close()
        self._received.clear()
        self._children.clear()

    def _call(self, message: Dict[str, Any], fds: List[int]) -> None:
        status = 70
        try:
            for fd, target in ((fds[0], 1), (fds[1], 2)):
                os.dup2(fd, target)
                os.close(fd)
            if message.get("kind") == "pool":
                status = _module("pool_worker").main(fds[2:], message)
            else:
                status = _module("call_process").main(fds[2], message)
        finally:
            os._exit(status)

    def _become_warmed(self, control: socket.socket, modules: List[str]) -> None:
        self._control = control
        self._stamp()
        try:
            before = set(_descriptors())
            have = [name for name in modules if _import(name, before)]
        except UnsafeError as error:
            self.tell(unsafe=str(error))
            os._exit(0)
        _drop_output()
        self._woken, self._wake = _wake_pipe()
        self._watch_children()
        gc.collect()
        gc.freeze()
        gc.disable()
        self._stamp()  # what an import has added to the path
        self.tell(ready=True, modules=have, stamps=list(self._stamps.items()))

    def _stamp(self) -> None:
        """Note when the directories that modules come from changed last: an installation changes them.

        The first time counts, also that of the zygote which this one was forked from: what was imported then is here.
        """
        for path in sys.path:
            try:
                self._stamps.setdefault(path, os.stat(path).st_mtime_ns)
            except OSError:
                continue


def _module(name: str) -> Any:
    return sys.modules["{}.{}".format(_PACKAGE, name)]


def _import(name: str, descriptors: Any) -> bool:
    """Import a module; returns whether it could be.

    Raises:
        UnsafeError: A process that has imported it must not be forked.
    """
    if name in sys.modules:
        return True
    try:
        importlib.import_module(name)
    except BaseException:  # noqa: BLE001  (a module may even exit; the calls that want it will see for themselves)
        return False
    _check_threads(name)
    for fd, target in _descriptors():
        if (fd, target) not in descriptors and target.startswith(("socket:", "pipe:", "anon_inode:", "/dev/nvidia")):
            raise UnsafeError(name)
    return True


def _drop_output() -> None:
    """Write what imports have printed to where it is read by nobody: whatever is forked would print it again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S112  (an import may have put anything there)
            continue


def _check_threads(name: str) -> None:
    """Make sure that a fork takes all of this process with it.

    Threads of native libraries do no harm if the library ends them before a fork by itself, as OpenBLAS does; after
    a fork there is one thread then.
    """
    if len(sys._current_frames()) > 1:
        raise UnsafeError(name)
    if threads() > 1:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        if threads() > 1:
            raise UnsafeError(name)


def threads() -> int:
    """Return how many threads there are that a fork would miss."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open("/proc/self/task/{}/comm".format(task)) as file:
                count += file.read().strip() not in _REMADE
        except OSError:
            continue  # it has just ended
    return count


def _descriptors() -> List[Tuple[int, str]]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append((int(fd), os.readlink("/proc/self/fd/" + fd)))
        except OSError:
            continue
    return found


def _wake_pipe() -> Tuple[int, int]:
    pair = os.pipe()
    for fd in pair:
        os.set_blocking(fd, False)
    return pair


def _point_to_null(target: int) -> None:
    fd = os.open(os.devnull, os.O_RDWR)
    os.dup2(fd, target)
    os.close(fd)
