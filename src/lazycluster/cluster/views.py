"""What is shown of clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lazycluster.core.words import counted
from lazycluster.output.host_cells import gpus, number
from lazycluster.output.view import Cell, Fact, Shown, Table, Tone, View

if TYPE_CHECKING:
    from .contracts import MasterLauncher, WorkerLauncher
    from .services import Service

__all__ = ["ShownCluster", "cluster_view", "ready"]

_STATES: dict[str, Tone] = {"running": "good", "ready": "good", "failed": "bad", "restarting": "bad", "ended": "dim"}


def ready(services: Sequence[Service]) -> int:
    """Return how many of some services are ready."""
    return sum(service.state == "ready" for service in services)


class ShownCluster(Shown):
    """The part of a cluster that notebooks show. Their outputs are stored, so there is nothing secret in it."""

    _state: str
    _worker_launcher: WorkerLauncher
    if TYPE_CHECKING:

        @property
        def master_port(self) -> int | None:
            """The port of the master."""

        @staticmethod
        def _services(launcher: MasterLauncher | WorkerLauncher) -> list[Service]: ...

        def _problem(self) -> str: ...

    @property
    def _processes(self) -> list[Service]:
        """The processes of the workers."""
        return self._services(self._worker_launcher)

    def _facts(self) -> list[Fact]:
        """Return what is said of the cluster."""
        hosts = dict.fromkeys(worker.place.host for worker in self._processes)
        facts: list[Fact] = [("master", f"port {self.master_port}" if self.master_port else "none")]
        facts.append(("hosts", str(len(hosts))))
        problem = self._problem() if self._state == "running" else ""
        return [*facts, ("problem", Cell(problem, "bad"))] if problem else facts

    def _columns(self) -> dict[str, list[str]]:
        """Return what an engine shows of each worker beside its state."""
        return {}

    def _view(self) -> View:
        state = "failed" if self._state == "running" and self._problem() else self._state
        return cluster_view(type(self).__name__, state, self._facts(), self._processes, self._columns())


def cluster_view(
    name: str, state: str, facts: Sequence[Fact], workers: Sequence[Service], columns: Mapping[str, Sequence[str]] = {}
) -> View:
    """Return what is shown of a cluster in a notebook.

    Args:
        name: The name of its class.
        state: Its state.
        facts: What is said of it.
        workers: The processes of its workers.
        columns: What an engine shows of each worker beside that.
    """
    with_gpus = any(worker.gpus for worker in workers)
    head = ("worker", "host", "state", "pid", "restarts", *columns, *(("gpus",) if with_gpus else ()))
    rows: list[list[Cell | str]] = []
    for index, worker in enumerate(workers):
        row: list[Cell | str] = [
            worker.label.partition(" ")[2] or worker.label,
            worker.place.host,
            Cell(worker.state, _STATES.get(worker.state, "")),
            f"{number(worker.pid):.0f}" if worker.pid else "",
            f"{number(worker.restarts) + number(worker.respawns):.0f}",
            *(values[index] for values in columns.values()),
        ]
        rows.append([*row, gpus(worker.gpus)] if with_gpus else row)
    right = frozenset({"pid", "restarts", *columns})
    tables = (Table(head, rows, f"{ready(workers)} of {counted(len(workers), 'worker')} ready", right),) if rows else ()
    return View(name, Cell(state, _STATES.get(state, "dim")), facts, tables)
