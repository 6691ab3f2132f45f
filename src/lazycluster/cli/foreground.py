"""A cluster that runs in the foreground: how to connect, and what its workers do, until it is told to end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lazycluster.cluster.exceptions import ClusterError
from lazycluster.core.words import counted
from lazycluster.exceptions import one_line
from lazycluster.output.host_cells import megabytes

from .console import OutputGoneError, is_terminal, lines_of, output

if TYPE_CHECKING:
    from lazycluster.cluster.engine_cluster import EngineCluster
    from lazycluster.cluster.health import ClusterEvent, ProcessStatus
    from lazycluster.cluster.usage import ProcessUsage

__all__ = ["serve"]

_REFRESH = 1.0
_STYLES = {"ready": "green", "failed": "bold red", "ended": "dim"}

_PATIENCE = 0.5  # seconds for what hosts tell of their workers; the view goes on without it


def serve(cluster: EngineCluster, connection_file: Path | None) -> None:
    """Show a cluster until Ctrl-C, or until it has failed for good.

    Args:
        cluster: A cluster that runs.
        connection_file: Where other processes find out how to connect, if it was asked for.

    Raises:
        ClusterError: If it has failed.
        OutputGoneError: If nobody reads any more what it prints.
    """
    for line in _how_to_connect(cluster, connection_file):
        output().print(line, markup=False, soft_wrap=True)
    output().print("Ctrl-C ends it.", style="dim")
    over = threading.Event()

    def tell(event: ClusterEvent) -> None:
        try:
            output().print("\n".join(lines_of(str(event))), markup=False, soft_wrap=True)
        except OutputGoneError:
            over.set()

    with contextlib.ExitStack() as stack:
        if is_terminal():
            work = stack.enter_context(cluster._work_line())
            view = Live(console=output(), refresh_per_second=1, get_renderable=lambda: _view(cluster, work))
            stack.enter_context(view)
        else:
            stack.callback(cluster.on_event(tell))
        while not over.wait(_REFRESH):
            _check(cluster)
    raise OutputGoneError


def _check(cluster: EngineCluster) -> None:
    master, workers = cluster.master, cluster.workers
    if master is not None and master.state in ("failed", "ended"):
        raise ClusterError(f"{master.name} has ended: {master.problem}\n{master.log}")
    if workers and all(worker.state == "failed" for worker in workers):
        last = workers[-1]
        raise ClusterError(f"no worker is left; the last one, {last.name} on {last.host}: {last.problem}\n{last.log}")


def _how_to_connect(cluster: EngineCluster, connection_file: Path | None) -> list[str]:
    name, module = type(cluster).__name__, cluster.engine.module or type(cluster).__module__
    workers = counted(len(cluster.workers), "worker")
    lines = [f"{name} with {workers}, its master on port {cluster.master_port} of this machine."]
    if connection_file is not None:
        lines += [
            "Connect from Python (the file holds secrets, and goes when the cluster ends):",
            f"  from {module} import {name}",
            f'  {name}.connect("{connection_file}")',
        ]
    else:
        lines.append("For other processes to connect, start it with --connection-file FILE.")
    return [*lines, *cluster._further_addresses()]


def _view(cluster: EngineCluster, work: Callable[[], str]) -> RenderableType:
    used: dict[str, ProcessUsage] = {}
    try:
        used = cluster.usage(_PATIENCE)
        line = work()
    except Exception as error:  # noqa: BLE001  (what is shown beside the table must not end the cluster)
        line = f"not known: {error}"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("WORKER", "HOST", "STATE", "RESTARTS", "PID", "CPU", "MEMORY"):
        table.add_column(name, justify="left" if name in ("WORKER", "HOST", "STATE") else "right", no_wrap=True)
    for worker in cluster.workers:
        state = Text(worker.state, style=_STYLES.get(worker.state, "yellow"))
        figures = _figures(used.get(worker.name))
        name = worker.name.rpartition(" ")[2]
        table.add_row(name, worker.host, state, str(worker.restarts), str(worker.pid or ""), *figures)
    problems = [_problem(worker) for worker in cluster.workers if worker.state == "failed"]
    return Group(Text(), table, *problems, Text(one_line(line), style="dim"))


def _figures(used: ProcessUsage | None) -> tuple[str, str]:
    if used is None:
        return "", ""
    return "" if used.cpu is None else f"{used.cpu:.0f}%", megabytes(used.memory)


def _problem(worker: ProcessStatus) -> Text:
    return Text(f"{worker.name} on {worker.host}: {one_line(worker.problem)}", style="red")
