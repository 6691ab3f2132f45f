"""How busy a host is, cheap enough to be asked every few seconds."""

from __future__ import annotations

from .processes import TASK_MARKER, marks

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import List

    from .session import Channel


def activity(channel: Channel) -> None:
    """Handle the request `activity`: ticks of the processors, and what this user's managers have running here."""
    running = {mark.rpartition(":")[2] for _, mark in marks(TASK_MARKER)}
    # The marks of services, such as the workers of clusters, begin with a name.
    workers = {mark for mark in running if " " in mark}
    busy, total = ticks()
    channel.result(busy=busy, total=total, tasks=len(running - workers), workers=len(workers))


def ticks(path: str = "/proc/stat") -> List[int]:
    """Return for how many clock ticks the processors were busy, of how many; since the system's start."""
    try:
        with open(path) as file:
            fields = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return [0, 0]
    idle = sum(fields[3:5])
    return [sum(fields) - idle, sum(fields)]
