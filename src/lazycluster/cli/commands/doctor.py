"""``lazycluster doctor``: the way to a working host."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lazycluster.cli.targets import complete_hosts, connection_options, targets

if TYPE_CHECKING:
    from lazycluster.cli.checkup import Checkup
    from lazycluster.cli.targets import Targets

__all__ = ["doctor"]


@click.command()
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.argument("hosts", nargs=-1, shell_complete=complete_hosts)
def doctor(
    hosts: tuple[str, ...], config: str | None, connect_timeout: float | None, accept_new_host_key: bool, as_json: bool
) -> int:
    """Check step by step what hosts need to be usable, and how to mend what is wrong.

    HOSTS are names or sets, by default all of the ssh configuration. Each step is ok, failed, or not reached because
    one before it failed; what differs matters for some uses only.

    \b
    Examples:
      lazycluster doctor
      lazycluster doctor 'node[1-4]' me@192.0.2.7

    Exit status: 0 if all hosts can be used, else 1.
    """
    from lazycluster import _loop

    chosen = targets(hosts, (), None, config, connect_timeout, accept_new_host_key, default="@all")
    checkups = _loop.run(_check_all(chosen, as_json))
    if as_json:
        document = [{"usable": checkup.usable, **asdict(checkup)} for checkup in checkups]
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0 if all(checkup.usable for checkup in checkups) else 1


async def _check_all(chosen: Targets, silent: bool) -> list[Checkup]:
    import asyncio

    from lazycluster.cli.checkup import Checkup
    from lazycluster.ssh.openssh import SshConnection

    slots = asyncio.Semaphore(32)

    async def check(name: str) -> Checkup:

        async with slots:
            checkup = Checkup(name)
            connection = chosen.connection(name)
            assert isinstance(connection, SshConnection)
            await checkup.run(connection)
            if not silent:
                _show(checkup)
            return checkup

    return list(await asyncio.gather(*(check(name) for name in chosen.names)))


_STYLES = {"ok": "green", "failed": "bold red", "differs": "yellow", "not reached": "dim"}


def _show(checkup: Checkup) -> None:
    from rich.text import Text

    from lazycluster.cli.checkup import STEPS
    from lazycluster.cli.console import output
    from lazycluster.exceptions import printable

    out = output()
    out.print(Text(checkup.host, style="bold"))
    width = max(map(len, STEPS))
    indent = "\n" + " " * (width + 17)
    for step in checkup.steps:
        line = Text("  ")
        line.append(step.name.ljust(width + 2))
        line.append(step.state.ljust(13), style=_STYLES[step.state])
        line.append(printable(step.detail).replace("\n", indent))
        out.print(line, soft_wrap=True)
        if step.mend:
            mend = printable(step.mend).replace("\n", indent)
            out.print(Text(f"{indent[1:]}-> {mend}", style="cyan"), soft_wrap=True)
    out.print()
