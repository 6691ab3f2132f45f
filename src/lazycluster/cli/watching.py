"""The live view of hosts."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lazycluster import _loop
from lazycluster._views.cells import cells
from lazycluster.exceptions import LazyclusterError

from .console import output, printable
from .targets import Targets

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["watch"]

_REFRESH = 2.0
_GPUS_EVERY = 5  # refreshes: nvidia-smi costs a host more than all the rest
_RETRY = 10.0


class _Watched:
    """One host: its connection, made again when it was lost, and its last answer."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.state = "connecting"
        self.why = ""
        self.info: dict[str, Any] = {}

    async def follow(self, targets: Targets) -> None:
        while True:
            connection = targets.connection(self.host)
            try:
                await connection.open()
                await self._ask(connection)
            except (LazyclusterError, OSError, asyncio.TimeoutError) as error:
                self.state, self.why = "inactive", str(error) or type(error).__name__
            finally:
                await connection.close()
            await asyncio.sleep(_RETRY)

    async def _ask(self, connection: Connection) -> None:
        for turn in range(1_000_000_000):
            with_gpus = turn % _GPUS_EVERY == 0
            started = time.perf_counter()
            info = await asyncio.wait_for(connection.request("info", gpus=with_gpus), 30)
            if not with_gpus:
                info["gpus"] = self.info.get("gpus", [])
            info["latency"] = time.perf_counter() - started
            self.info, self.state, self.why = info, "active", ""
            await asyncio.sleep(_REFRESH)


def watch(targets: Targets, long: bool) -> int:
    """Show hosts until Ctrl-C.

    Args:
        targets: The hosts.
        long: Whether to show what machines they are.
    """
    watched = [_Watched(name) for name in targets.names]

    async def follow_all() -> None:
        tasks = [asyncio.ensure_future(one.follow(targets)) for one in watched]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with Live(get_renderable=lambda: _table(watched, long), console=output(), refresh_per_second=2):
        _loop.run(follow_all())
    return 0


def _table(watched: list[_Watched], long: bool) -> Group:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = (
        ["load", "cores", "memory", "disk", "gpus"]
        if not long
        else ["os", "cores", "load", "memory", "disk", "python", "gpus"]
    )
    for name in ("host", "state", *names):
        table.add_column(name.upper(), justify="right" if name in ("cores", "load") else "left", no_wrap=True)
    for one in watched:
        shown = cells(one.info) if one.info else {}
        style = {"active": "", "inactive": "red"}.get(one.state, "dim")
        table.add_row(one.host, one.state, *[shown.get(name, "") for name in names], style=style)
    reasons = [
        Text(f"{one.host}: {printable(one.why).partition(chr(10))[0]}", style="red") for one in watched if one.why
    ]
    return Group(table, *reasons)
