"""``lazycluster list-runtimes``: the hosts that can be used, and their machines, once or as a live view."""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.console import is_terminal, output
from lazycluster.cli.options import Targets, connection_options, host_options, targets

if TYPE_CHECKING:
    from rich.console import Group

    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.ssh.connection import Connection

__all__ = ["list_runtimes"]

# Column -> its width; that of the names depends on them.
_SHORT = {"state": 8, "latency": 8}
_LONG = {"os": 12, "cores": 5, "load": 5, "memory": 9, "disk": 9, "python": 7, "gpus": 4}
_RIGHT = ("latency", "cores", "load", "memory", "disk")
# Left out where there is little room, the first one first.
_DISPENSABLE = ("latency", "python", "os", "load")

_UNUSABLE = re.compile(r"not usable as a runtime \((.+?)\)(?:: )?")
_GAP = 2  # spaces between columns

# The live view
_REFRESH = 2.0  # seconds
_GPUS_EVERY = 5  # refreshes: nvidia-smi costs a host more than all the rest
_RETRY = 10.0  # seconds
_FEW = 2  # GPUs, each of which has a place of its own
_RUNNING = ("tasks", "workers", "tunnels")
_LIVE_RIGHT = ("cores", "load", "cpu", *_RUNNING)
_LEAST = {"os": 9, "load": 5, "cpu": 4, "memory": 9, "disk": 9, "state": 8}  # so that columns do not come and go
# What never changes goes first, then what the processors' share says, too.
_LIVE_DISPENSABLE = ("os", "cores", "load", "disk", "gpus", "tunnels", "workers")


@click.command()
@host_options
@click.option("-l", "--long", is_flag=True, help="Also show cores, load, memory, disk, Python, GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--watch", is_flag=True, help="Keep showing what runs on the hosts, until Ctrl-C.")
@functools.partial(connection_options, user_flags=("--user",))  # -l is --long
def list_runtimes(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, long: bool, as_json: bool, watch: bool,
) -> int:  # fmt: skip
    """Show the hosts of the ssh configuration: which can be used, and why others cannot.

    A host that takes long holds back no other. LATENCY is the time of a message to the host and back, once connected;
    MEMORY and DISK are used/total. With -l, the last line says whether the hosts reach each other, as --network direct
    needs it.

    \b
    Examples:
      lazycluster list-runtimes
      lazycluster list-runtimes -l -w 'gpu-*'
      lazycluster list-runtimes -l --watch
      lazycluster list-runtimes --json | jq -r '.[].host'

    Exit status: 0 if at least one host can be used, and all that were named; else 255.
    """
    from lazycluster.cli.fanout import exit_status

    if watch and as_json:
        raise click.UsageError("either --watch or --json can be given, not both")
    if watch and not is_terminal():
        raise click.UsageError("--watch needs a terminal")
    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key, default="@all")
    if watch:
        return _watch(chosen, long)
    listing = _Listing(chosen, long or as_json)
    outcomes = listing.run_as_json() if as_json else listing.run()
    if any(outcome.kind == "done" for outcome in outcomes):
        return exit_status(outcomes, chosen.everyone)
    return 255


class _Listing:
    """The hosts and what they answered, printed as rows as they come, or as JSON."""

    def __init__(self, chosen: Targets, long: bool) -> None:
        self._targets = chosen
        self._long = long
        columns = {"host": max(4, *map(len, chosen.names)), **_SHORT, **(_LONG if long else {})}
        shown = _fitting(columns, output().width, _DISPENSABLE) if long and is_terminal() else columns
        self._columns = {name: columns[name] for name in shown}
        self._left_out = [name for name in columns if name not in shown]
        self.infos: dict[str, dict[str, Any]] = {}
        self._reaches: dict[str, dict[str, str]] = {}
        self._between = ""

    def run(self) -> list[HostOutcome]:
        from lazycluster.cli.fanout import InOrder, everywhere
        from lazycluster.core import event_loop
        from lazycluster.ssh.terminal import when_answered

        rows: InOrder[HostOutcome] = InOrder(self._targets.names, lambda one: when_answered(lambda: self.show(one)))
        output().print(self._line({name: name.upper() for name in self._columns}), style="bold", soft_wrap=True)
        outcomes = event_loop.run(
            everywhere(
                self._targets,
                self._ask,
                on_done=lambda outcome: rows.put(outcome.host, outcome),
                at_end=self._probe if self._long else None,
            )
        )
        self.finish(outcomes)
        return outcomes

    def run_as_json(self) -> list[HostOutcome]:
        """Print one document at the end."""
        from lazycluster.cli.fanout import everywhere
        from lazycluster.core import event_loop

        outcomes = event_loop.run(everywhere(self._targets, self._ask, at_end=self._probe))
        document = []
        for outcome in outcomes:
            active = outcome.kind == "done"
            entry: dict[str, Any] = {"host": outcome.host, "state": "active" if active else "inactive"}
            entry.update(self.infos.get(outcome.host, {}) if active else {"reason": outcome.error})
            if active:
                entry["reaches"] = self._reaches.get(outcome.host, {})
            document.append(entry)
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return outcomes

    async def _ask(self, connection: Connection) -> HostOutcome:
        from lazycluster.cli.fanout import HostOutcome

        started = time.perf_counter()
        await connection.request("ping")
        info = {"latency": time.perf_counter() - started}
        if self._long:
            info.update(await connection.request("info"))
        self.infos[connection.host] = info
        return HostOutcome(connection.host)

    async def _probe(self, connections: list[Connection]) -> None:
        """Find out which hosts reach each other."""
        from lazycluster.cli.reaches import by_host, probe_all

        if len(connections) > 1:
            found = await probe_all(connections)
            count = len(connections)
            self._between = f"The {count} active hosts reach each other: --network direct can be used"
            if found.obstacles:
                self._between = f"--network direct cannot be used: {found}"
            self._reaches = by_host(found, [connection.host for connection in connections])

    def show(self, outcome: HostOutcome) -> None:
        """Print the row of a host."""
        from rich.text import Text

        from lazycluster.exceptions import one_line
        from lazycluster.output.host_cells import cells

        if outcome.kind != "done":
            self._show_inactive(outcome)
            return
        row = {"host": outcome.host, "state": "active"}
        if outcome.host in self.infos:
            info = self.infos[outcome.host]
            row["latency"] = f"{info['latency'] * 1000:.1f} ms"
            row.update({name: one_line(cell) for name, cell in cells(info).items()} if self._long else {})
        output().print(Text(self._line(row)), soft_wrap=True)

    def _show_inactive(self, outcome: HostOutcome) -> None:
        """Print the kind of reason; `finish` prints all of it, with the next step."""
        from rich.text import Text

        from lazycluster.exceptions import one_line

        kind = _UNUSABLE.match(outcome.error)
        why = one_line(kind[1]).replace("_", " ") if kind else "see below"
        row = self._line({"host": outcome.host, "state": "inactive"})
        output().print(Text(f"{row}  {why}", style="dim"), soft_wrap=True)

    def _line(self, row: dict[str, str]) -> str:
        padded = [
            row.get(name, "").rjust(width) if name in _RIGHT else row.get(name, "").ljust(width)
            for name, width in self._columns.items()
        ]
        return "  ".join(padded).rstrip()

    def finish(self, outcomes: list[HostOutcome]) -> None:
        """Print whether hosts reach each other, why some cannot be used, and which columns there was no room for."""
        from lazycluster.exceptions import one_line, printable

        if self._left_out:
            output().print(_told_left_out(self._left_out, "or --json"), style="dim", soft_wrap=True)
        if self._between:
            output().print(one_line(self._between), markup=False, soft_wrap=True, style="dim")
        bad = [outcome for outcome in outcomes if outcome.kind != "done"]
        if bad:
            output().print("\nInactive:", style="bold")
        for outcome in bad:
            first, *rest = _UNUSABLE.sub("", printable(outcome.error)).split("\n")
            output().print(f"  {outcome.host}: {first}", markup=False, soft_wrap=True)
            for line in rest:
                style = "cyan" if "Next step:" in line else None
                output().print(f"    {line.strip()}", markup=False, soft_wrap=True, style=style)


def _told_left_out(names: Sequence[str], otherwise: str = "") -> str:
    """Say which columns are not shown, and how to see them."""
    ways = " ".join(filter(None, ["a wider terminal", otherwise]))
    return f"No room for: {', '.join(name.upper() for name in names)} ({ways} shows them)"


def _fitting(widths: Mapping[str, int], room: int, dispensable: Sequence[str]) -> list[str]:
    """Return the columns that there is room for; those in `dispensable` are left out first, in that order."""
    names = list(widths)
    for name in dispensable:
        if sum(widths[name] + _GAP for name in names) - _GAP <= room:
            break
        if name in names:
            names.remove(name)
    return names


# --- the live view -------------------------------------------------------------------------------
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
        import asyncio

        from lazycluster.exceptions import LazyclusterError

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
        import asyncio

        for turn in range(1_000_000_000):
            with_gpus = turn % _GPUS_EVERY == 0
            info = await connection.request("info", gpus=with_gpus)
            if not with_gpus:
                info["gpus"] = self.info.get("gpus", [])
            self._note(await connection.request("activity"))
            self.info, self.state, self.why = info, "active", ""
            await asyncio.sleep(_REFRESH)

    def _note(self, activity: dict[str, int]) -> None:
        """Note what runs there, and how busy the processors were since the last time."""
        before, self.activity = self.activity, activity
        passed = activity["total"] - before.get("total", 0)
        if before and passed > 0:
            self.cpu = f"{100 * (activity['busy'] - before['busy']) / passed:.0f}%"


def _watch(targets: Targets, long: bool) -> int:
    """Show hosts until Ctrl-C."""
    import asyncio

    from rich.live import Live

    from lazycluster.core import event_loop
    from lazycluster.output import progress

    watched = [_Watched(name) for name in targets.names]

    async def follow_all() -> None:
        await event_loop.together([asyncio.ensure_future(one.follow(targets)) for one in watched])

    view = Live(get_renderable=lambda: _table(watched, long), console=output(), refresh_per_second=2)
    with view, progress.shown(wanted=False):
        event_loop.run(follow_all())
    return 0


def _table(watched: list[_Watched], long: bool) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names = ["cpu", "memory", "disk", *_RUNNING]
    if any(gpu for one in watched for gpu in one.info.get("gpus") or []):
        names.insert(1, "gpus")
    if long:
        names = ["os", "cores", "load", *names]
    names = ["host", "state", *names]
    rows = [{"host": one.host, "state": one.state, **_shown(one)} for one in watched]
    widths = {name: max(len(name), _LEAST.get(name, 0), *(len(row.get(name, "")) for row in rows)) for name in names}
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    shown = _fitting(widths, output().width, _LIVE_DISPENSABLE)
    left_out = [name for name in names if name not in shown]
    notes = [Text(_told_left_out(left_out), style="dim")] if left_out else []
    for name in shown:
        table.add_column(name.upper(), justify="right" if name in _LIVE_RIGHT else "left", no_wrap=True)
    for one, row in zip(watched, rows, strict=True):
        style = {"active": "", "inactive": "red"}.get(one.state, "dim")
        table.add_row(*[Text(row.get(name, "")) for name in shown], style=style)
    reasons = [Text(_reason(one), style="red") for one in watched if one.why]
    return Group(table, *notes, *reasons)


def _reason(one: _Watched) -> str:
    """Return why a host is inactive, in a line."""
    from lazycluster.exceptions import printable

    why = printable(one.why).partition("\n")[0].removeprefix(f"{one.host}: ")
    return f"{one.host}: {_UNUSABLE.sub('', why)}"


def _shown(one: _Watched) -> dict[str, str]:
    from lazycluster.exceptions import one_line
    from lazycluster.output.host_cells import cells

    found = {**cells(one.info), "cpu": one.cpu, "gpus": _gpus(one.info)} if one.info else {}
    running = {name: str(one.activity[name]) for name in _RUNNING if name in one.activity}
    return {name: one_line(text) for name, text in {**found, **running}.items()}


def _gpus(info: dict[str, Any]) -> str:
    """Return the utilization of the GPUs, one after the other; of many, their number and mean."""
    from lazycluster.output.host_cells import number

    used = [gpu.get("utilization") for gpu in info.get("gpus") or [] if isinstance(gpu, dict)]
    known = [number(share) for share in used if share is not None]
    if len(known) > _FEW:
        return f"{len(used)}x {sum(known) / len(known):.0f}%"
    return " ".join("?" if share is None else f"{number(share):.0f}%" for share in used) or "-"
