"""Limits of what a task may use of its host, and the messages for one that wanted more."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from typing import Any

from lazycluster.core.sizes import size
from lazycluster.exceptions import TaskExecutionError

__all__ = ["Limits", "memory_hint"]

_LEAST_MEMORY = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of what a task may use of its host.

    Attributes:
        memory: Bytes of address space of each of its processes; for functions: beyond what their interpreter has.
        cpu: Seconds of processor time of each of its processes.
        wall: Seconds from its start to its end.
    """

    memory: int | None = None
    cpu: int | None = None
    wall: float | None = None

    @classmethod
    def checked(cls, memory: object, cpu: object, wall: object) -> Limits:
        """Return limits as a user gives them.

        Raises:
            TypeError, ValueError: If one makes no sense.
        """
        seconds = {"cpu_time": cpu, "wall_time": wall}
        for name, value in seconds.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
            if not 0 < value < 1e9:
                raise ValueError(f"{name} must be greater than 0 seconds, not {value}")
        cpu_seconds = None if seconds["cpu_time"] is None else math.ceil(float(str(cpu)))
        return cls(_bytes(memory), cpu_seconds, None if wall is None else float(str(wall)))

    def message(self, since: float) -> dict[str, Any]:
        """Return them as parameters of a request.

        Args:
            since: When the task began, by the monotonic clock.
        """
        left = None if self.wall is None else max(0.0, self.wall - (time.monotonic() - since))
        found = {"memory": self.memory, "cpu": self.cpu, "wall": left}
        return {name: value for name, value in found.items() if value is not None}

    def time_is_up(self) -> TaskExecutionError:
        """Return the error that says that a task took too long."""
        if self.wall is None:
            return TaskExecutionError("the host says that it was ended for its wall_time, but it has none")
        return TaskExecutionError(f"it was ended after its wall_time of {self.wall:g} s; allow it more with limit()")

    def explain(self, message: str, status: int | None, memory_error: bool = False) -> str:
        """Return the message of a step that failed, with the limit that it ran into."""
        if self.cpu is not None and status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
            return f"{message}: it used up its cpu_time of {self.cpu} s; allow it more with limit()"
        if self.memory is None:
            return message
        if memory_error:
            return f"it reached its memory limit of {self.memory} bytes; allow it more with limit()\n{message}"
        return f"{message} (its memory is limited to {self.memory} bytes)"


def memory_hint(verdict: str) -> str:
    """Return the part of a message that says why a process was killed.

    Args:
        verdict: What the host knows: see :func:`lazycluster.agent.oom.verdict`.
    """
    if verdict == "limit":
        return ": out of memory, by the limit of its control group on the host"
    if verdict == "host":
        return ": the host ran out of memory, and its system ended processes meanwhile"
    return "; the host may have run out of memory"


def _bytes(memory: object) -> int | None:
    if memory is None:
        return None
    if isinstance(memory, str):
        try:
            memory = size(memory)
        except ValueError as error:
            raise ValueError(f"memory: {error}") from None
    if isinstance(memory, bool) or not isinstance(memory, (int, float)):
        raise TypeError(f"memory must be a number of bytes or a string such as '2 GB', not {type(memory).__name__}")
    if not _LEAST_MEMORY <= memory < 2**62:
        raise ValueError(f"memory must be at least 1 MiB, not {memory:g} bytes")
    return int(memory)
