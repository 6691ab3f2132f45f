"""Processes and directories of agents that were killed together with their guardians, or by a crash of the machine."""

from __future__ import annotations

import _socket as socket
import os
import stat
import time

from .directories import HOST_FILE, PREFIX, SOCKET, every_parent_directory, is_of_this_host
from .guardian import remove
from .processes import AGENT_MARKER, marked_processes, namespace, read_text, send_signal, start_time, tree_of

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import signal
    from typing import Any, Dict, Iterator, List, Tuple

    from .session import RequestChannel
else:
    import _signal as signal  # the module proper makes enumerations, for which it imports much

_YOUNG = 10.0  # seconds
_SLOWEST = 60.0  # seconds from the making of a directory until its agent listens, on the slowest of hosts
_NAME_SIZE = 12  # hexadecimal digits


def leftovers(channel: RequestChannel) -> None:
    """Handle the request `leftovers`: end and remove them, and tell what they were."""
    channel.result(**sweep(channel.agent.directory))


def sweep(own: str) -> Dict[str, Any]:
    """End and remove them.

    Args:
        own: The private directory of the agent that asks.

    Returns:
        The `processes`, each with `pid` and `command`, and the `directories`.
    """
    found = orphans()
    processes = [
        {"pid": pid, "command": read_text("/proc/{}/cmdline".format(pid))[:200].replace("\0", " ").strip()}
        for pid, _ in found
    ]
    for pid, started in found:
        send_signal(tree_of(pid, started, ""), signal.SIGKILL)
    directories = abandoned(own)
    remove(directories)
    directories += remove_unfinished(own)
    return {"processes": processes, "directories": directories}


def orphans() -> List[Tuple[int, int]]:
    """Return the processes whose agent has ended, each with its start time."""
    space = namespace("pid")
    found = []
    for pid, marker in marked_processes(AGENT_MARKER):
        here, agent, started = (marker.rsplit("-", 2) + ["", ""])[:3]
        # Numbers of another pid namespace (a container's, seen from outside) say nothing here.
        if here == space and agent.isdigit() and str(start_time(int(agent))) != started:
            begun = start_time(pid)
            if begun is not None:
                found.append((pid, begun))
    return found


def beside(own: str) -> Iterator[str]:
    """Yield the paths of what has the name of an agent's directory, beside our own and wherever else they may be."""
    for parent in dict.fromkeys([os.path.dirname(own), *every_parent_directory()]):
        try:
            names = os.listdir(parent)
        except OSError:
            continue
        for name in names:
            if name.startswith(PREFIX):
                yield os.path.join(parent, name)


def abandoned(own: str) -> List[str]:
    """Return the private directories of this user's agents, beside our own, that nobody serves any more."""
    found = []
    for path in beside(own):
        listener = os.path.join(path, SOCKET)
        try:
            mine = _is_private(os.lstat(path), _YOUNG)
            if mine and os.path.exists(listener) and is_of_this_host(path) and not _answers(listener):
                found.append(path)
        except OSError:
            continue
    return found


def remove_unfinished(own: str) -> List[str]:
    """Remove the directories of agents that did not get as far as to listen, e.g. since the disk was full.

    All that may be in them is the name of the host. Whatever else there is, it and its directory stay.

    Returns:
        Those that were removed.
    """
    removed = []
    for path in beside(own):
        try:
            if _is_named_by_agents(path) and _is_private(os.lstat(path), _SLOWEST) and is_of_this_host(path):
                if _names(path) == [HOST_FILE]:
                    os.unlink(os.path.join(path, HOST_FILE))
                os.rmdir(path)  # only an empty one
                removed.append(path)
        except OSError:
            continue
    return removed


def _is_named_by_agents(path: str) -> bool:
    name = os.path.basename(path)
    digits = name[len(PREFIX) :]
    return name.startswith(PREFIX) and len(digits) == _NAME_SIZE and not set(digits) - set("0123456789abcdef")


def _names(path: str) -> List[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []  # an umask took away the right to look into it: nothing could be made in it either


def _is_private(inode: os.stat_result, age: float) -> bool:
    """Return whether it is a directory of this user alone, as agents make them, and an agent would serve it by now."""
    alone = stat.S_ISDIR(inode.st_mode) and not inode.st_mode & 0o077 and inode.st_uid == os.getuid()
    return alone and inode.st_mtime < time.time() - age


def _answers(path: str) -> bool:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # One that has been stopped takes nobody in. Whoever waited for it would hang too, and so all that look for it.
        probe.setblocking(False)
        probe.connect(path)
    except BlockingIOError:
        return True
    except ConnectionRefusedError:
        return False
    finally:
        probe.close()
    return True
