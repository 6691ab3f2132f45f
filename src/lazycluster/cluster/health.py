"""States and events of the processes of a cluster."""

from __future__ import annotations

import datetime
import logging
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .services import Service

__all__ = ["ClusterEvent", "ProcessStatus", "Watch", "how_it_ended"]

logger = logging.getLogger("lazycluster")

_KEPT = 1000  # events


@dataclass(frozen=True)
class ProcessStatus:
    """State of a master or worker at one moment.

    Attributes:
        name: What it is called.
        host: Where it runs; ``localhost`` is the manager.
        state: ``starting``, ``ready``, ``restarting``, ``ended`` (as it was asked to) or ``failed`` (for good).
        pid: Its process id there, None if it was never started.
        restarts: How often it, or the worker that it watches, was started again.
        last_exit: How it ended last: an exit status, or a negative signal; None if it never did.
        problem: Why it failed or had to be started again, or that the link to its host is interrupted, since when
            nothing was heard of it; "" if there was nothing.
        log_file: The file with all that it printed.
        log: The end of it.
    """

    name: str
    host: str
    state: str
    pid: int | None
    restarts: int
    last_exit: int | None
    problem: str
    log_file: str
    log: str = field(repr=False)

    @classmethod
    def of(cls, service: Service) -> ProcessStatus:
        """Return the status of a service."""
        return cls(
            service.label,
            service.place.host,
            service.state,
            service.pid,
            service.restarts + service.respawns,
            service.exit_status,
            service.link_problem or service.problem,
            str(service.log_file),
            service.last_output(),
        )


@dataclass(frozen=True)
class ClusterEvent:
    """Something that has happened to a process of a cluster.

    Attributes:
        time: When.
        kind: ``ready``, ``restarting``, ``respawned`` (by the process that watches it), ``ended`` or ``failed``.
        name: What it is called.
        host: Where it runs.
        detail: Why, and what that means.
    """

    time: datetime.datetime
    kind: str
    name: str
    host: str
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.time:%Y-%m-%d %H:%M:%S} {self.host}: {self.name}: {self.kind}"
        return f"{text}: {self.detail}" if self.detail else text


def how_it_ended(status: int | None) -> str:
    """Return what an exit status, or a negative signal, says."""
    if status is None:
        return "it has ended, with an unknown exit status"
    if status == -signal.SIGKILL:
        return "it was killed (SIGKILL); the host may have run out of memory"
    return f"it has ended with exit status {status}" if status >= 0 else f"it was ended by signal {-status}"


EventCallback = Callable[[ClusterEvent], Any]


class Watch:
    """Keeps what happens to services, and tells whoever wants to know."""

    def __init__(self) -> None:
        self._events: deque[ClusterEvent] = deque(maxlen=_KEPT)
        self._callbacks: list[EventCallback] = []

    @property
    def events(self) -> list[ClusterEvent]:
        """The latest events, in their order."""
        return list(self._events)

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        """Have a function called with each event; returns what ends that."""
        if not callable(callback):
            raise TypeError(f"a callback must be callable, not {type(callback).__name__}")
        self._callbacks.append(callback)

        def forget() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return forget

    def note_of(self, name: str, host: str, kind: str, detail: str = "") -> None:
        """Take note of what has happened to a process."""
        event = ClusterEvent(datetime.datetime.now(), kind, name, host, detail)
        self._events.append(event)
        for callback in list(self._callbacks):
            try:
                callback(event)
            except BaseException:  # also `sys.exit`: what follows where this was noted has to be done
                logger.exception("a callback for the events of the cluster failed: %s", event)
