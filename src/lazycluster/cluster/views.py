"""Tables and texts that show clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lazycluster.core.words import counted
from lazycluster.output.host_cells import gpus, number
from lazycluster.output.view import Cell, Fact, Table, Tone, View

if TYPE_CHECKING:
    from .services import Service

__all__ = ["cluster_view", "ready"]

_STATES: dict[str, Tone] = {"running": "good", "ready": "good", "failed": "bad", "restarting": "bad", "ended": "dim"}


def ready(services: Sequence[Service]) -> int:
    """Return how many of some services are ready."""
    return sum(service.state == "ready" for service in services)


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
