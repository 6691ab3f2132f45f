"""First program of an ssh session on a host: starts guardian and agent, and gives them the session's streams.

The manager sends the text of this module and a call of `main` with the sources of the others; nothing of it is
written to the host's disk.
"""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import gc
import os
import stat
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any, Dict, Optional, Tuple, Union

PACKAGE = "lazycluster_agent"
NO_DIRECTORY = "lazycluster: no private directory can be made: "  # how the line begins that tells the manager so
TOLD_FD = 8  # by which the login shell tells what it has read; zsh takes no number of two digits


class _AgentFinder:
    """Imports the agent's modules from memory, each compiled when it is first needed.

    It has the methods of finder and loader without their base classes, which would take longer to import than Python
    takes to start.
    """

    def __init__(self, modules: Dict[str, Union[str, CodeType]]) -> None:
        self._modules: Dict[str, Union[str, CodeType]] = {}
        self._texts: Dict[str, str] = {}
        self.add(modules)

    def add(self, modules: Dict[str, Union[str, CodeType]]) -> None:
        """Take more modules, as text or code; those that are read as text, too, may come as both."""
        for name, module in modules.items():
            if isinstance(module, str):
                self._texts[name] = module
            self._modules.setdefault(name, module)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Optional[ModuleSpec]:
        package, _, module = name.rpartition(".")
        if name == PACKAGE or (package == PACKAGE and module in self._modules):
            return ModuleSpec(name, self, is_package=name == PACKAGE)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        if module.__name__ != PACKAGE:
            name = module.__name__.rpartition(".")[2]
            code = self._modules[name]
            if isinstance(code, str):
                code = compile(code, file_name(name), "exec", dont_inherit=True)
            exec(code, module.__dict__)

    def get_source(self, name: str) -> Optional[str]:
        """Return a module's text if it came as such, for tracebacks and for what is started from it."""
        return self._texts.get(name.rpartition(".")[2])


def file_name(module: str) -> str:
    """Return what stands for a module's file in tracebacks."""
    return "<lazycluster agent: {}.py>".format(module)


def main(modules: Dict[str, Union[str, CodeType]], local: bool) -> None:
    """Start guardian and agent and hand the agent this session's streams.

    Of the modules, those are here that each agent needs, as text or code; the others come when they are needed.

    Over ssh they become daemons, and this process stays as long as the agent does: sshd watches it. As a plain
    subprocess of the manager (`local`), this process is the guardian itself.
    """
    gc.disable()  # what is loaded stays
    told = -1 if local else _told()
    sys.meta_path.insert(0, _AgentFinder(modules))
    descriptors = import_module(PACKAGE + ".descriptors")
    guardian = import_module(PACKAGE + ".guardian")
    import_module(PACKAGE + ".processes").forbid_cores()
    # With an umask that takes away what the user himself needs, nothing that is made can be used.
    os.umask(os.umask(0o077) & 0o077)
    directory, listener = _listening()
    path = listener.getsockname()
    sshd = None if local else import_module(PACKAGE + ".ssh_session").sshd_above(os.getpid())
    if not local:
        if _fork(directory):
            listener.close()
            _close(told)
            _stay(descriptors.send_to(path, [0, 1], b"session"))
        os.setsid()
        _forget_streams()
    guardian.become_subreaper()
    watched, held = os.pipe()  # `held` stays open in the guardian only: its end tells the agent
    me = os.getpid()
    agent = _fork(directory)
    if agent == 0:
        os.close(held)
        if local:
            _forget_streams()
        _serve(directory, listener, me, watched, local, told)
    _close(told)
    os.close(watched)
    listener.close()
    if local:
        descriptors.send_to(path, [0, 1], b"session").close()
        _forget_streams()
    guardian.guard(agent, directory, sshd)
    os._exit(0)


def _listening() -> Tuple[str, socket.socket]:
    """Make the agent's directory and the socket in it."""
    directories = import_module(PACKAGE + ".directories")
    try:
        found: Tuple[str, socket.socket] = directories.listening(directories.parent_directories(), directories.LONGEST)
        return found
    except OSError as error:
        raise SystemExit(NO_DIRECTORY + str(error)) from None


def _fork(directory: str) -> int:
    """Fork; if that is not possible, nothing of us is left."""
    try:
        return os.fork()
    except OSError:
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)
        raise


def _serve(directory: str, listener: socket.socket, guardian: int, alive: int, local: bool, told: int) -> None:
    status = 1
    try:
        server = import_module(PACKAGE + ".server")
        agent = server.Agent(directory, listener, guardian, alive, local)
        agent.listen_to_shell(told)
        gc.enable()
        status = 0 if agent.run() else 3
    finally:
        os._exit(status)


def _told() -> int:
    """Return the descriptor by which the login shell tells what its start-up files have set, -1 if it does not."""
    try:
        if not stat.S_ISFIFO(os.fstat(TOLD_FD).st_mode):
            return -1
        os.set_inheritable(TOLD_FD, False)
    except OSError:
        return -1
    return TOLD_FD


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _stay(connection: socket.socket) -> None:
    for fd in (0, 1):
        os.close(fd)
    import _signal as signal  # type: ignore[import-not-found]

    # The part of the login shell that tells of it is a child of this process.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    while connection.recv(4096):
        pass
    os._exit(0)


def _forget_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")
