"""What agents of this user left that were killed together with their guardians, or by a crash of the machine."""

from __future__ import annotations

import _socket as socket
import os
import signal
import stat
import time

from .guardian import is_of_this_host, remove
from .processes import AGENT_MARKER, marks, send_signal, start_time, tree_of

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, List, Tuple

    from .session import Channel

_YOUNG = 10.0


def leftovers(channel: Channel) -> None:
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
    processes = [{"pid": pid, "command": _command(pid)} for pid, _ in found]
    for pid, started in found:
        send_signal(tree_of(pid, started, ""), signal.SIGKILL)
    directories = abandoned(own)
    remove(directories)
    return {"processes": processes, "directories": directories}


def orphans() -> List[Tuple[int, int]]:
    """Return the processes whose agent has gone, each with its start time."""
    space = namespace()
    found = []
    for pid, mark in marks(AGENT_MARKER):
        here, agent, started = (mark.rsplit("-", 2) + ["", ""])[:3]
        # Numbers of another pid namespace (a container's, seen from outside) say nothing here.
        if here == space and agent.isdigit() and str(start_time(int(agent))) != started:
            begun = start_time(pid)
            if begun is not None:
                found.append((pid, begun))
    return found


def abandoned(own: str) -> List[str]:
    """Return the private directories of this user's agents, beside our own, that nobody serves any more."""
    place, name = os.path.split(own)
    prefix = name.rpartition("-")[0] + "-"
    found = []
    for name in os.listdir(place):
        path = os.path.join(place, name)
        listener = os.path.join(path, "agent.sock")
        try:
            mine = name.startswith(prefix) and _is_private(os.lstat(path))
            if mine and os.path.exists(listener) and is_of_this_host(path) and not _answers(listener):
                found.append(path)
        except OSError:
            continue
    return found


def _is_private(inode: os.stat_result) -> bool:
    """Whether it is a directory of this user alone, as agents make them, and none that an agent is about to serve."""
    alone = stat.S_ISDIR(inode.st_mode) and not inode.st_mode & 0o077 and inode.st_uid == os.getuid()
    return alone and inode.st_mtime < time.time() - _YOUNG


def namespace() -> str:
    """Return the name of this process's pid namespace."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


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


def _command(pid: int) -> str:
    try:
        with open("/proc/{}/cmdline".format(pid), "rb") as file:
            return file.read(200).replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""
