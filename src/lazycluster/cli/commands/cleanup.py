"""``lazycluster cleanup``: the removal of what a crash left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.options import connection_options, fanout_option, host_options, targets

if TYPE_CHECKING:
    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.ssh.connection import Connection

__all__ = ["cleanup"]


@click.command()
@host_options
@fanout_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@connection_options
def cleanup(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, fanout: int, as_json: bool,
) -> int:  # fmt: skip
    """Remove what was left behind on hosts and on this machine, and list it.

    Normally nothing is left behind, but after a crash something may be. This looks for your processes and directories
    of lazycluster that are no longer in use, on all hosts of the ssh configuration unless you name some. What a running
    program uses is kept, and so are environments and detached tasks.

    \b
    Examples:
      lazycluster cleanup
      lazycluster cleanup -w 'node[1-4]'

    Exit status: 0 if at least one host was reached, and all that were named; else 255.
    """
    import json

    from lazycluster.cli.console import errors, lines_of, output
    from lazycluster.cli.fanout import InOrder, everywhere, exit_status
    from lazycluster.core import event_loop

    found: dict[str, dict[str, Any]] = {}

    async def work(connection: Connection) -> HostOutcome:
        return await _clean(connection, found)

    def tell(outcome: HostOutcome) -> None:
        if outcome.error:
            text = "\n".join(lines_of(f"{outcome.host}: {outcome.error}"))
            errors().print(text, markup=False, soft_wrap=True)
        elif not as_json:
            _show(outcome.host, found[outcome.host])

    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key, default="@all")
    tell(event_loop.run(_here(found)))
    rows: InOrder[HostOutcome] = InOrder(chosen.names, tell)
    outcomes = event_loop.run(everywhere(chosen, work, fanout, lambda outcome: rows.put(outcome.host, outcome)))
    if as_json:
        output().print_json(json.dumps(found))
    return exit_status(outcomes, chosen.everyone)


async def _here(found: dict[str, dict[str, Any]]) -> HostOutcome:
    from lazycluster.ssh.local_connection import LocalConnection

    connection = LocalConnection("this machine")
    await connection.open()
    try:
        return await _clean(connection, found)
    finally:
        await connection.close()


async def _clean(connection: Connection, found: dict[str, dict[str, Any]]) -> HostOutcome:
    from lazycluster.cli.fanout import HostOutcome

    found[connection.host] = await connection.request("leftovers", within=60.0)
    return HostOutcome(connection.host)


def _show(host: str, left: dict[str, Any]) -> None:
    from lazycluster.cli.console import output
    from lazycluster.exceptions import one_line

    say = output().print
    entries = [f"ended process {process['pid']}: {process['command']}" for process in left["processes"]]
    entries += [f"removed {path}" for path in left["directories"]]
    if not entries:
        say(f"{host}: nothing was left behind", markup=False)
    for entry in entries:
        say(f"{host}: {one_line(entry)}", markup=False, soft_wrap=True)
