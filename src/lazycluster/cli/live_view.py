"""The live view of hosts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError, one_line, printable
from lazycluster.output import progress
from lazycluster.output.host_cells import cells, number

from .columns import GAP, fitting
from .console import output
from .options import Targets

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["watch"]

_REFRESH = 2.0
_GPUS_EVERY = 5  # refreshes: nvidia-smi costs a host more than all the rest
_RETRY = 10.0
_FEW = 2  # GPUs, each of which has a place of its own
_RIGHT = ("cores", "load", "cpu", "tasks", "workers", "tunnels")
_RUNNING = ("tasks", "workers", "tunnels")
_LEAST = {"os": 9, "load": 5, "cpu": 4, "memory": 9, "disk": 9, "state": 8}  # so that columns do not come and go
# Where there is little room: what never changes goes first, then what the processors' share says, too.
_DISPENSABLE = ("os", "cores", "load", "disk", "gpus", "tunnels", "workers")


class _Watched:
    """One host: its connection, made again when it was lost, and its last answer."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.state = "connecting"
        self.why = ""
        self.info: dict[str, Any] = {}
        self.activity: dict[str, int] = {}
        self.cpu = ""

    async def follow(self, targets: Targets) -> None:
        while True:
            connection = targets.connection(self.host)
            try:
                await connection.open()
                await self._ask(connection)
            except (LazyclusterError, OSError) as error:
                self.state, self.why = "inactive", str(error) or type(error).__name__
            finally:
                await connection.close()
            await asyncio.sleep(_RETRY)

    async def _ask(self, connection: Connection) -> None:
        for turn in range(1_000_000_000):
            with_gpus = turn % _GPUS_EVERY == 0
            info = await connection.request("info", gpus=with_gpus)
            if not with_gpus:
                info["gpus"] = self.info.get("gpus", [])
            self._note(await connection.request("activity"))
            self.info, self.state, self.why = info, "active", ""
            await asyncio.sleep(_REFRESH)

    def _note(self, activity: dict[str, int]) -> None:
        """Take note of what runs there, and how busy the processors were since the last time."""
        before, self.activity = self.activity, activity
        passed = activity["total"] - before.get("total", 0)
        if before and passed > 0:
            self.cpu = f"{100 * (activity['busy'] - before['busy']) / passed:.0f}%"


def watch(targets: Targets, long: bool) -> int:
    """Show hosts until Ctrl-C.

    Args:
        targets: The hosts.
        long: Whether to show what machines they are.
    """
    watched = [_Watched(name) for name in targets.names]

    async def follow_all() -> None:
        await event_loop.together([asyncio.ensure_future(one.follow(targets)) for one in watched])

    view = Live(get_renderable=lambda: _table(watched, long), console=output(), refresh_per_second=2)
    with view, progress.shown(wanted=False):
        event_loop.run(follow_all())
    return 0


def _table(watched: list[_Watched], long: bool) -> Group:
    names = ["cpu", "memory", "disk", *_RUNNING]
    if any(gpu for one in watched for gpu in one.info.get("gpus") or []):
        names.insert(1, "gpus")
    if long:
        names = ["os", "cores", "load", *names]
    names = ["host", "state", *names]
    rows = [{"host": one.host, "state": one.state, **_shown(one)} for one in watched]
    widths = {name: max(len(name), _LEAST.get(name, 0), *(len(row.get(name, "")) for row in rows)) for name in names}
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    shown = fitting(widths, output().width, _DISPENSABLE)
    for name in shown:
        table.add_column(name.upper(), justify="right" if name in _RIGHT else "left", no_wrap=True)
    for one, row in zip(watched, rows, strict=True):
        style = {"active": "", "inactive": "red"}.get(one.state, "dim")
        table.add_row(*[Text(row.get(name, "")) for name in shown], style=style)
    reasons = [
        Text(f"{one.host}: {printable(one.why).partition(chr(10))[0]}", style="red") for one in watched if one.why
    ]
    return Group(table, *reasons)


def _shown(one: _Watched) -> dict[str, str]:
    found = {**cells(one.info), "cpu": one.cpu, "gpus": _gpus(one.info)} if one.info else {}
    running = {name: str(one.activity[name]) for name in _RUNNING if name in one.activity}
    return {name: one_line(text) for name, text in {**found, **running}.items()}


def _gpus(info: dict[str, Any]) -> str:
    """Return how busy the GPUs are: one after the other, or of many their number and mean."""
    used = [gpu.get("utilization") for gpu in info.get("gpus") or [] if isinstance(gpu, dict)]
    known = [number(share) for share in used if share is not None]
    if len(known) > _FEW:
        return f"{len(used)}x {sum(known) / len(known):.0f}%"
    return " ".join("?" if share is None else f"{number(share):.0f}%" for share in used) or "-"
