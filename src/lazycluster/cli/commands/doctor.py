"""``lazycluster doctor``: a diagnosis of hosts, step by step."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lazycluster.cli.options import complete_hosts, connection_options, targets

if TYPE_CHECKING:
    from lazycluster.cli.diagnosis import Diagnosis, Step
    from lazycluster.cli.options import Targets

__all__ = ["doctor"]


@click.command()
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("hosts", nargs=-1, shell_complete=complete_hosts)
def doctor(
    hosts: tuple[str, ...], config: str | None, connect_timeout: float | None, accept_new_host_key: bool, as_json: bool
) -> int:
    """Check hosts step by step, and say how to fix what is wrong.

    HOSTS are names or sets, by default all of the ssh configuration. Each step is 'ok', 'failed', 'not reached' since
    an earlier one failed, or 'differs', which matters for some uses only.

    \b
    Examples:
      lazycluster doctor
      lazycluster doctor 'node[1-4]' me@192.0.2.7

    Exit status: 0 if all hosts can be used, else 1.
    """
    from lazycluster.core import event_loop

    chosen = targets(hosts, (), None, config, connect_timeout, accept_new_host_key, default="@all")
    diagnoses = event_loop.run(_check_all(chosen, as_json))
    if as_json:
        document = [{"usable": diagnosis.usable, **asdict(diagnosis)} for diagnosis in diagnoses]
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0 if all(diagnosis.usable for diagnosis in diagnoses) else 1


async def _check_all(chosen: Targets, silent: bool) -> list[Diagnosis]:
    import asyncio

    from lazycluster.cli.diagnosis import Diagnosis
    from lazycluster.cli.fanout import InOrder
    from lazycluster.cli.reaches import by_host, probe_all
    from lazycluster.ssh.ssh_connection import SshConnection
    from lazycluster.ssh.terminal import when_answered

    connections: dict[SshConnection, Diagnosis] = {}
    slots = asyncio.Semaphore(32)
    shown: InOrder[Diagnosis] = InOrder(chosen.names, lambda one: when_answered(lambda: _show(one)))

    async def check(name: str) -> Diagnosis:

        async with slots:
            diagnosis = Diagnosis(name)
            connection = chosen.connection(name)
            assert isinstance(connection, SshConnection)
            connections[connection] = diagnosis
            await diagnosis.run(connection)
            if not silent:
                shown.put(name, diagnosis)
            return diagnosis

    try:
        diagnoses = list(await asyncio.gather(*(check(name) for name in chosen.names)))
        usable = {connection: one for connection, one in connections.items() if connection.state == "open"}
        if len(usable) > 1:
            reaches = by_host(await probe_all(list(usable)), [one.host for one in usable.values()])
            for one in usable.values():
                one.reaches = reaches[one.host]
            if not silent:
                when_answered(lambda: _show_reached(diagnoses))
    finally:
        await asyncio.gather(*(connection.close() for connection in connections))
    return diagnoses


_UNLIMITED = 10_000  # columns, where it is no terminal
_STYLES = {"ok": "green", "failed": "bold red", "differs": "yellow", "not reached": "dim"}


def _show(diagnosis: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    from lazycluster.cli.console import is_terminal, output
    from lazycluster.cli.diagnosis import STEPS
    from lazycluster.exceptions import one_line

    out = output()
    out.print(Text(one_line(diagnosis.host), style="bold"))
    name, state = max(map(len, STEPS)), max(map(len, _STYLES))
    for step in diagnosis.steps:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=name + 2)
        row.add_column(width=state)
        row.add_column(overflow="fold")
        row.add_row(f"  {step.name}", Text(step.state, style=_STYLES[step.state]), Text(_detail(step)))
        out.print(row, width=None if is_terminal() else _UNLIMITED)
        if step.fix:
            # In one line, so that commands can be copied from it.
            out.print(Text(f"    -> {one_line(step.fix)}", style="cyan"), soft_wrap=True)
    out.print()


def _show_reached(diagnoses: list[Diagnosis]) -> None:
    from rich.text import Text

    from lazycluster.cli.console import output
    from lazycluster.cli.reaches import told
    from lazycluster.exceptions import one_line

    out = output()
    out.print(Text("between the hosts, for clusters with --network direct", style="bold"))
    for one in diagnoses:
        if one.reaches:
            style = "yellow" if any(one.reaches.values()) else "green"
            out.print(
                Text(f"  {one_line(one.host)} reaches: {one_line(told(one.reaches))}", style=style), soft_wrap=True
            )
    out.print()


def _detail(step: Step) -> str:
    """Return the detail of a step; that of a step which is not ok is an error, and may have several lines."""
    from lazycluster.exceptions import one_line, printable

    return one_line(step.detail) if step.state == "ok" else printable(step.detail)
