"""Limits of what a task may use of its host: set where its processes begin; a clock for the time that it takes.

This module stands alone: its text is also run in front of a command, and sent to the interpreters of functions.
"""

from __future__ import annotations

import os
import resource
import sys

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

_GRACE = 2  # seconds of cpu time between the signal that may be caught and the one that may not


def lower(which: int, soft: int, hard: int) -> None:
    """Set a limit of this process and those that it starts; one that is lower already stays."""
    _, most = resource.getrlimit(which)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(which, (soft, hard))


def apply(limits: Dict[str, Any], used: int = 0) -> None:
    """Set what a process may use.

    Args:
        limits: ``memory`` in bytes, ``cpu`` in seconds.
        used: Bytes of memory that do not count: what the process had already.
    """
    if limits.get("memory"):
        most = int(limits["memory"]) + used
        lower(resource.RLIMIT_AS, most, most)
    if limits.get("cpu"):
        seconds = max(1, int(limits["cpu"]))
        lower(resource.RLIMIT_CPU, seconds, seconds + _GRACE)


def address_space() -> int:
    """Return the bytes of memory that this process has mapped, 0 if the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def wrapped(argv: List[str], limits: Dict[str, Any]) -> List[str]:
    """Return a command that sets limits and becomes another one."""
    if not (limits.get("memory") or limits.get("cpu")):
        return argv
    text = __loader__.get_source(__name__) + "\nmain()\n"  # type: ignore[name-defined]
    numbers = [str(int(limits.get(name) or 0)) for name in ("memory", "cpu")]
    return [sys.executable, "-ISc", text, *numbers, *argv]


def main() -> None:
    """Set the limits that the arguments say, and become the program that follows them."""
    memory, cpu, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    apply({"memory": memory, "cpu": cpu})
    try:
        os.execvp(argv[0], argv)  # noqa: S606  (it is what the manager asked for)
    except OSError as error:
        sys.stderr.write("{}: {}\n".format(argv[0], error.strerror))
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


class Clock:
    """Ends work that takes too long.

    Args:
        loop: The reactor.
        limits: ``wall`` in seconds, if there is a limit.
        end: Ends the work.

    Attributes:
        over: Whether the time was up.
    """

    def __init__(self, loop: Any, limits: Dict[str, Any], end: Callable[[], Any]) -> None:
        self.over = False
        self._end = end
        wall = limits.get("wall")
        self._timer: Optional[Any] = None if wall is None else loop.call_later(max(0.0, float(wall)), self._ring)

    def _ring(self) -> None:
        self.over = True
        self._end()

    def stop(self) -> None:
        """Forget the time."""
        if self._timer is not None:
            self._timer.cancel()
