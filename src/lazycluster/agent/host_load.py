"""How busy a host is, cheap enough to be asked every few seconds."""

from __future__ import annotations

import os

from .directories import is_of_this_host
from .leftovers import beside
from .processes import TASK_MARKER, marks

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import List

    from .session import RequestChannel


_TUNNELS = "tunnels"  # the file in an agent's directory that tells others how many lead to its manager


def tunnels(channel: RequestChannel) -> None:
    """Handle the request `tunnels`: the manager tells how many it has; the sshd that carries them does not."""
    path = os.path.join(channel.agent.directory, _TUNNELS)
    with open(path + ".new", "w") as file:
        file.write(str(int(channel.params["count"])))
    os.rename(path + ".new", path)
    channel.result()


def activity(channel: RequestChannel) -> None:
    """Handle the request `activity`: ticks of the processors, and what this user's managers have running here."""
    running = {mark.rpartition(":")[2] for _, mark in marks(TASK_MARKER)}
    # The marks of services, such as the workers of clusters, begin with a name.
    workers = {mark for mark in running if " " in mark}
    busy, total = ticks()
    count = count_tunnels(channel.agent.directory)
    channel.result(busy=busy, total=total, tasks=len(running - workers), workers=len(workers), tunnels=count)


def count_tunnels(own: str) -> int:
    """Return how many tunnels lead through the agents of this user.

    Args:
        own: The private directory of one of them, beside which those of the others are.
    """
    count = 0
    for path in beside(own):
        try:
            if os.lstat(path).st_uid == os.getuid() and is_of_this_host(path):
                with open(os.path.join(path, _TUNNELS)) as file:
                    count += int(file.read())
        except (OSError, ValueError):
            continue  # it has none, or is gone
    return count


def ticks(path: str = "/proc/stat") -> List[int]:
    """Return for how many clock ticks the processors were busy, of how many; since the system's start."""
    try:
        with open(path) as file:
            fields = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return [0, 0]
    idle = sum(fields[3:5])
    return [sum(fields) - idle, sum(fields)]
