"""Views of groups and of the manager: tables for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazycluster.core.words import counted
from lazycluster.exceptions import LazyclusterError
from lazycluster.output.view import Cell, Table, View
from lazycluster.runtime.views import MACHINE, account, known_infos, lasting, state_cell

if TYPE_CHECKING:
    from lazycluster.runtime.session import HostSession
    from lazycluster.runtimes import Runtime

__all__ = ["group_view", "hosts_view", "info_or_error", "manager_view", "reasons"]


def group_view(runtimes: Sequence[Runtime], unreachable: Mapping[str, str]) -> View:
    """Return the view of a group in a notebook."""
    rows: list[list[Cell | str]] = []
    cores = 0.0
    for runtime, info in zip(runtimes, known_infos(runtimes), strict=True):
        shown = lasting(info)
        cores += float(shown.get("cores") or 0)
        machine = [shown.get(name, "") for name in MACHINE]
        running = str(runtime.alive_task_process_count)
        rows.append([runtime.host, state_cell(runtime._connection), *machine, running])
    count = counted(len(runtimes), "host")
    state = Cell(f"{count}, {counted(cores, 'core')}" if cores else count)
    table = Table(("host", "state", *MACHINE, "tasks"), rows, right=frozenset({"cores", "tasks"}))
    return View("RuntimeGroup", state, tables=(table, *reasons("Skipped hosts", unreachable)))


def hosts_view(title: str, hosts: Sequence[str], left_out: str = "", why: Mapping[str, str] | None = None) -> View:
    """Return the names of hosts, and of those that are left out with the reasons."""
    names = Table((title,), [[host] for host in hosts] or [[Cell("none", "dim")]])
    return View(tables=(names, *reasons(left_out, why or {})))


def reasons(title: str, hosts: Mapping[str, str]) -> tuple[Table, ...]:
    """Return a table of hosts with the reasons; none if there are no hosts."""
    rows = [[host, why.removeprefix(f"{host}: ")] for host, why in hosts.items()]
    return (Table(("host", "why"), rows, title),) if rows else ()


def manager_view(sessions: Mapping[str, HostSession], inactive: Mapping[str, str]) -> View:
    """Return the view of a manager in a notebook."""
    rows: list[list[Cell | str]] = []
    for host, session in sessions.items():
        connection = session.connection
        version = ".".join(map(str, connection.agent_info.python))
        rows.append([host, state_cell(connection), account(connection), version])
    state = Cell(f"{counted(len(sessions), 'active host')}, {len(inactive)} inactive")
    table = Table(("host", "state", "account", "python"), rows)
    return View("RuntimeManager", state, tables=(table, *reasons("Inactive hosts", inactive)))


def info_or_error(runtime: Runtime) -> dict[str, Any]:
    """Return the facts of a host's machine, or the reason why it cannot be asked."""
    try:
        return runtime.info
    except LazyclusterError as error:
        return {"error": str(error).partition("\n")[0]}
