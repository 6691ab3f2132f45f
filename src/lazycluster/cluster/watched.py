"""The part of a cluster that tells how its processes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lazycluster.core import event_loop

from .exceptions import ClusterError
from .health import ClusterEvent, EventCallback, ProcessStatus, Watch
from .usage import Meter, ProcessUsage
from .views import ShownCluster

if TYPE_CHECKING:
    from .contracts import MasterLauncher, WorkerLauncher
    from .services import Service

__all__ = ["WatchedCluster"]


class WatchedCluster(ShownCluster):
    """The part of a cluster that tells how its processes do."""

    _master_launcher: MasterLauncher

    def __init__(self) -> None:
        self._watch = Watch()
        self._meter = Meter()

    @property
    def status(self) -> Any:
        """What the cluster does: ``created``, ``starting``, ``running``, ``closing``, ``closed`` or ``failed``.

        A cluster has failed if it did not start, or if its master, or each of its workers, has ended for good: it was
        started again as often as is allowed within minutes. Use of it raises an error then, which says why.
        """
        return "failed" if self._state == "running" and self._problem() else self._state

    @property
    def master(self) -> ProcessStatus | None:
        """How the master does; None if it was not started, or not by a launcher that watches it."""
        return next((ProcessStatus.of(service) for service in self._services(self._master_launcher)), None)

    @property
    def workers(self) -> list[ProcessStatus]:
        """How each worker does, those that have failed for good included."""
        return [ProcessStatus.of(service) for service in self._services(self._worker_launcher)]

    def usage(self, timeout: float = 1.0) -> dict[str, ProcessUsage]:
        """Ask the hosts what the workers use of them: processor and memory, each with all that it has started.

        May be called every second: it costs a host no more than 1 % of a core.

        Args:
            timeout: Seconds for the hosts' answers. One that says nothing is waited for only once.

        Returns:
            What is known, by the names that `workers` has. What has not been heard of for 10 s is left out.

        Examples:
            >>> for name, used in cluster.usage().items():                       # doctest: +SKIP
            ...     print(name, used.cpu, used.memory)
        """
        return event_loop.run(self._meter.look(self._services(self._worker_launcher), timeout))

    @property
    def events(self) -> list[ClusterEvent]:
        """What has happened to the master and the workers, the latest last."""
        return self._watch.events

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        """Have a function called with each event of the master and the workers.

        It is called on the thread that serves all connections: it must not wait, nor use the cluster itself.

        Args:
            callback: The function; it gets a `ClusterEvent`.

        Returns:
            A function that ends it.

        Examples:
            >>> cluster.on_event(print)                                          # doctest: +SKIP
        """
        return self._watch.on_event(callback)

    @staticmethod
    def _services(launcher: MasterLauncher | WorkerLauncher) -> list[Service]:
        return list(getattr(launcher, "services", []))

    def _problem(self) -> str:
        """Return why the cluster cannot do anything any more, "" if it can."""
        if problem := self._master_problem():
            return problem
        workers = self._services(self._worker_launcher)
        if workers and all(worker.state == "failed" for worker in workers):
            return f"no worker is left; the last one: {workers[-1].error}"
        return ""

    def _master_problem(self) -> str:
        failed = (s for s in self._services(self._master_launcher) if s.state == "failed")
        return next((str(service.error) for service in failed), "")

    def _check_alive(self) -> None:
        problem = self._problem() if self._state == "running" else ""
        if problem:
            raise ClusterError(f"the cluster has failed: {problem}\n  Next step: call cleanup(), then start()")
