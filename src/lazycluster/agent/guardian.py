"""The guardian: starts the agent, and when the agent has ended, in whatever way, ends and removes all that it left.

It is the subreaper of everything below it (Linux), so that also what detached itself is found again as its descendant.
"""

from __future__ import annotations

import os
import stat
import time
from importlib import import_module

from . import json_text
from .directories import further
from .processes import ChildProcess, descendants, send_signal, start_time
from .ssh_session import SSHD_FILE

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import signal
    from typing import Any, Dict, Iterable, List, Optional, Tuple
else:
    import _signal as signal  # the module proper makes enumerations, for which it imports much

AT_MANAGER_END_FILE = "at-manager-end.json"
_PR_SET_CHILD_SUBREAPER = 36
_DYING = 3.0  # seconds from the end of a manager's streams to its own
_MOMENT = 0.02  # seconds
_PATIENCE = 1.0
_SLOWEST = 60.0  # seconds for what an ssh process has not sent yet: some megabytes, over a megabit per second


def become_subreaper() -> bool:
    """Have orphaned descendants become children of this process. Returns whether the system can do that."""
    arguments = (_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        fast: Any = import_module("_ctypes")  # the package `ctypes` takes several milliseconds to import
        return bool(fast.call_function(fast.dlsym(fast.dlopen(None), "prctl"), arguments) == 0)
    except (ImportError, OSError, AttributeError, TypeError):
        pass  # not CPython, or not as it is now
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(*arguments) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def guard(agent: int, directory: str, sshd: Optional[int]) -> None:
    """Wait for the end of the agent, then end its descendants, remove its directory, and end its ssh session.

    Args:
        agent: The agent's pid, a child of this process.
        directory: The agent's private directory.
        sshd: The sshd process of the session that brought the agent, None if there is none.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # or sigtimedwait would not see it
    session = ChildProcess(sshd) if sshd else None
    above = os.getppid()
    orderly = False
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        if pid == agent:
            orderly = status == 0
            break
    end_descendants()
    present = _present_sshd(directory)
    if present is not None:
        session = _as_noted(*present)
    if orderly or _has_ended(above, directory):
        clean(directory)
    else:  # whoever has started this is there; on the manager's machine, what is to be ended with it is in use
        remove([*further(directory), directory])
    if session is not None and not orderly:
        # ssh lingers while a forwarded connection is open; its manager has ended, so nobody else ends it.
        session.signal(signal.SIGTERM)


def _has_ended(manager: int, directory: str) -> bool:
    """Tell whether the process that has started this one has ended; one that was killed gets a moment for it.

    Its streams, by which its agent learns of it, are closed before: on a busy machine, well before.
    """
    deadline = time.monotonic() + (_DYING if os.path.exists(os.path.join(directory, AT_MANAGER_END_FILE)) else 0.0)
    while os.getppid() == manager:
        if time.monotonic() >= deadline:
            return False
        _wait_for_child()
    return True


def _present_sshd(directory: str) -> Optional[Tuple[int, int]]:
    try:
        with open(os.path.join(directory, SSHD_FILE)) as file:
            pid, started = file.read().split()
        return int(pid), int(started)
    except (OSError, ValueError):
        return None


def _as_noted(pid: int, started: int) -> Optional[ChildProcess]:
    """Return the sshd that the agent has left word of; None if there is none, or another process has its number."""
    process = ChildProcess(pid) if pid else None
    return process if process is not None and (process.started or 0) == started else None


def end_descendants() -> None:
    """End all descendants of this process, first asking, then not, until none is left that this user may end."""
    deadline = time.monotonic() + _PATIENCE
    asked: List[int] = []
    refused: List[int] = []
    while True:
        _reap()
        alive = [pid for pid in descendants([os.getpid()]) if pid not in refused]
        if not alive:
            return
        if time.monotonic() < deadline:
            send_signal((pid for pid in alive if pid not in asked), signal.SIGTERM)
            send_signal((pid for pid in alive if pid not in asked), signal.SIGCONT)
            asked = alive
        else:
            refused += send_signal(alive, signal.SIGKILL)
        # A child's end is a signal, a grandchild's becomes one as soon as it is ours; look again soon in any case.
        _wait_for_child()


def _wait_for_child() -> None:
    """Wait until a child has ended, or for a moment."""
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait([signal.SIGCHLD], _MOMENT)
    else:
        time.sleep(_MOMENT)


def _reap() -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def clean(directory: str) -> None:
    """Remove the agent's directory; end and remove what the manager asked to keep an eye on (on its own machine)."""
    try:
        with open(os.path.join(directory, AT_MANAGER_END_FILE), "rb") as file:
            kept: Dict[str, Any] = json_text.loads(file.read())
    except (OSError, ValueError):
        kept = {}
    readers = _readers(kept.get("paths", []))
    for name, patience in (("programs", 0.0), ("pids", _SLOWEST)):
        _end_foreign([(int(pid), int(started)) for pid, started in kept.get(name, [])], patience)
    remove(kept.get("paths", []))
    for fd in readers:
        os.close(fd)
    remove([*further(directory), directory])


def _end_foreign(processes: Iterable[Any], first_patience: float) -> None:
    # The manager's ssh processes end by themselves: when their hosts have cleaned up, or their links are dead. Over a
    # slow link it takes a while until the hosts learn that the manager has ended; cut short, it looks like a dead link.
    for number, patience in ((0, first_patience), (signal.SIGTERM, 0.5), (signal.SIGKILL, 0.5)):
        alive = [pid for pid, started in processes if start_time(pid) == started]
        if number:
            send_signal(alive, number)
        deadline = time.monotonic() + patience
        while alive and time.monotonic() < deadline:
            _wait_for_child()
            alive = [pid for pid, started in processes if start_time(pid) == started]
        if not alive:
            return


def remove(paths: Iterable[str]) -> None:
    """Remove files and directories; what is not there is no error."""
    from .deletion import remove_tree  # here and not above: the start of the agent does not wait for it

    for path in paths:
        readers = _readers([path])
        remove_tree(path)
        for fd in readers:
            os.close(fd)


def _readers(paths: Iterable[str]) -> List[int]:
    """Open the named pipes in directories for reading.

    An ssh that was started just before the manager was killed opens the one for its log: it would wait for a reader
    for ever, also when the pipe has no name any more.
    """
    found = []
    for path in paths:
        try:
            pipes = [
                entry.path for entry in os.scandir(path) if stat.S_ISFIFO(entry.stat(follow_symlinks=False).st_mode)
            ]
        except OSError:
            continue  # it is no directory, or not there
        for pipe in pipes:
            try:
                found.append(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC))
            except OSError:
                pass  # it has been removed
    return found
