"""State of the hosts of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime

__all__ = ["HostStatus", "host_status", "watch"]

HostCallback = Callable[["HostStatus"], Any]


@dataclass(frozen=True)
class HostStatus:
    """State of a host at one moment.

    Attributes:
        host: The host.
        state: Of the connection: ``connecting``, ``open``, ``interrupted`` (it is being made again, and what runs goes
            on), ``lost`` (for good) or ``closed``.
        why: Why it is interrupted or lost, else "".
        running: How many tasks run there.
    """

    host: str
    state: str
    why: str
    running: int


def host_status(runtime: Runtime) -> HostStatus:
    """Return the state of the host of a runtime."""
    connection = runtime._connection
    running = sum(not task.future.done() for task in runtime.tasks)
    return HostStatus(runtime.host, connection.state, connection.why, running)


def watch(runtimes: Iterable[Runtime], callback: HostCallback) -> Callable[[], None]:
    """Have a function called whenever the state of a host changes; returns what ends that."""
    if not callable(callback):
        raise TypeError(f"a callback must be callable, not {type(callback).__name__}")

    def on(runtime: Runtime) -> Callable[[], None]:
        return runtime._connection.on_state(lambda state, why: callback(host_status(runtime)))

    ends = [on(runtime) for runtime in runtimes]

    def forget() -> None:
        for end in ends:
            end()

    return forget
