"""Tables and views of runtimes and their hosts."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import LazyclusterError
from lazycluster.output.host_cells import cells, megabytes, number
from lazycluster.output.view import Cell, Fact, Table, View

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

    from .runtime import Runtime

__all__ = ["MACHINE", "account", "info_table", "info_view", "known_infos", "lasting", "state_cell"]

MACHINE = ("os", "cores", "memory", "python", "gpus")
_BRIEFLY = 1.0  # seconds that hosts get to answer before what is known is shown without them
_TABLE = ("os", "cores", "load", "memory", "disk", "python", "gpus")


def state_cell(connection: Connection) -> Cell:
    """Return the state of a connection as a cell."""
    state = connection.state
    return Cell(state, "good" if state == "open" else "bad" if state in ("lost", "interrupted") else "dim")


def account(connection: Connection) -> str:
    """Return the account on a host: ``user@hostname``."""
    return f"{connection.agent_info.user}@{connection.agent_info.hostname}"


def known_infos(runtimes: Sequence[Runtime]) -> list[dict[str, Any]]:
    """Return the known facts of hosts; those that were not asked are asked now, and waited for briefly.

    Args:
        runtimes: The runtimes.

    Returns:
        Their :attr:`Runtime.info`, empty for those that do not answer.
    """
    asked: list[concurrent.futures.Future[dict[str, Any]] | None] = []
    for runtime in runtimes:
        asked.append(None)
        if runtime._connection.state == "open" and runtime._session.is_ours:
            with contextlib.suppress(LazyclusterError):
                asked[-1] = runtime.fill_info_buffer()
    concurrent.futures.wait([future for future in asked if future is not None], _BRIEFLY)
    infos = []
    for future in asked:
        good = future is not None and future.done() and not future.cancelled() and future.exception() is None
        infos.append(future.result() if good and future is not None else {})
    return infos


def lasting(info: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of a machine that do not change from one moment to the next: see `MACHINE`."""
    return {**cells(info), "memory": megabytes(number(info.get("memory"))) if info else ""}


def info_view(host: str, info: Mapping[str, Any], working_dir: str) -> View:
    """Return all that is known of a host, as `Runtime.print_info` prints it."""
    shown = cells(info)
    facts: list[Fact] = [(name, shown[name]) for name in _TABLE if shown.get(name)]
    told = {"os", "cpu_cores", "load", "memory", "memory_free", "disk_total", "disk_free", "python_version", "gpus"}
    for name, value in info.items():
        if name not in told and value not in ("", None, []):
            facts.append((str(name).replace("_", " "), _duration(value) if name == "uptime" else str(value)))
    for gpu in info.get("gpus") or []:
        if isinstance(gpu, Mapping):
            facts.append(("gpu", ", ".join(f"{key} {_amount(key, value)}" for key, value in gpu.items())))
    facts.append(("working dir", working_dir))
    return View(host, None, facts)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return str(seconds)
    days, rest = divmod(int(seconds), 86400)
    return f"{days} days {rest // 3600} h" if days else f"{rest // 3600} h {rest % 3600 // 60} min"


def _amount(key: object, value: Any) -> str:
    return megabytes(value) if "memory" in str(key) and isinstance(value, (int, float)) else str(value)


def info_table(hosts: Sequence[str], infos: Sequence[Mapping[str, Any]]) -> Table:
    """Return the facts of hosts as a table; an information may be an ``error`` instead."""
    rows: list[list[Cell | str]] = []
    for host, info in zip(hosts, infos, strict=True):
        shown = cells(info) if "error" not in info else {"os": str(info["error"])}
        rows.append([host, *(shown.get(name, "") for name in _TABLE)])
    return Table(("host", *_TABLE), rows, right=frozenset({"cores", "load"}))
