"""The load of a host and what services use of it, cheap enough to be asked every second."""

from __future__ import annotations

import os
import time

from .directories import is_of_this_host
from .leftovers import beside
from .processes import TASK_MARKER, family, marked_processes, start_time, stat_fields

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

    from .server import Agent
    from .session import RequestChannel

_KEPT = 0.5  # seconds for which an answer about services is good, at least: a shorter time tells little of processors
_SHARE = 0.01  # of a processor is spent on this at most: what took long is kept for longer
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
    running = {marker.rpartition(":")[2] for _, marker in marked_processes(TASK_MARKER)}
    # The markers of services, such as the workers of clusters, begin with a name.
    workers = {marker for marker in running if " " in marker}
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
            continue  # it has none, or has just been removed
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


# --- services -------------------------------------------------------------------------------------
class ServiceUsage:
    """Processor time and memory that the services of an agent use."""

    def __init__(self, agent: Agent) -> None:
        from .services import RunningServices

        self._running = agent.shared(RunningServices)
        self._answer: Dict[str, Any] = {}
        self._good_until = 0.0

    def answer(self) -> Dict[str, Any]:
        """Return it, as it is now or was a moment ago."""
        now = time.monotonic()
        if now >= self._good_until:
            began = time.process_time()
            found = {str(pid): measured(pid, started) for pid, started in self._running.items()}
            self._answer = {"services": found, "time": now, "hertz": os.sysconf("SC_CLK_TCK")}
            self._good_until = now + max(_KEPT, (time.process_time() - began) / _SHARE)
        return self._answer


def usage(channel: RequestChannel) -> None:
    """Handle the request `usage`: what each service of this agent, with all that it has started, uses of the host.

    Nothing is asked for by number: an agent tells of no process but those that its own manager has had started. The
    answer has for each service the ticks of the processors since it began, and the bytes of memory.
    """
    channel.result(**channel.agent.shared(ServiceUsage).answer())


def measured(pid: int, started: Optional[int]) -> List[int]:
    """Return the ticks of the processors and the bytes of memory that a process and its descendants have used.

    The ticks of descendants that have ended are in them, once their parents know of it.

    Args:
        pid: The process.
        started: When it started: if the number belongs to another one by now, there is nothing to tell.
    """
    ticks = pages = 0
    if started is not None and start_time(pid) == started:
        for one in family(pid):
            fields = stat_fields(one)
            if fields:
                ticks += sum(int(number) for number in fields[11:15])
                pages += int(fields[21])
    return [ticks, pages * os.sysconf("SC_PAGE_SIZE")]
