"""``lazycluster forward`` and ``lazycluster expose``: ports through the ssh connection, until Ctrl-C."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.console import tell
from lazycluster.cli.options import (
    Targets,
    complete_hosts,
    connection_options,
    host_options,
    relay_option,
    targets,
)

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["expose", "forward"]


@click.command()
@relay_option
@connection_options
@click.argument("host", shell_complete=complete_hosts)
@click.argument("ports", metavar="[LOCAL:]REMOTE...", nargs=-1, required=True)
def forward(
    host: str, ports: tuple[str, ...], config: str | None, connect_timeout: float | None, accept_new_host_key: bool,
    relay: bool,
) -> None:  # fmt: skip
    """Make ports of a host reachable on this machine, until Ctrl-C.

    REMOTE is the port on the host, LOCAL the one here; without it, the same number or the next free one. Only programs
    on this machine can connect to it.

    \b
    Examples:
      lazycluster forward gpu-a 8888   # then open http://localhost:8888
      lazycluster forward gpu-a 9000:8787 6006
    """
    from lazycluster.core import event_loop

    pairs = [_pair(text) for text in ports]
    chosen = targets((host,), (), None, config, connect_timeout, accept_new_host_key, relay=relay)
    if len(chosen.names) > 1:
        raise click.UsageError(f"{host!r} is not a single host: name the one whose ports are to be reached")
    event_loop.run(_forward(chosen.connection(chosen.names[0]), pairs))


@click.command()
@host_options
@relay_option
@click.argument("ports", metavar="LOCAL[:REMOTE]...", nargs=-1, required=True)
@connection_options
def expose(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, relay: bool, ports: tuple[str, ...],
) -> None:  # fmt: skip
    """Make ports of this machine reachable on hosts, until Ctrl-C.

    LOCAL is the port here, REMOTE the one on the hosts; without it, the same number. Programs on these hosts can
    connect to it, also those of other users: protect the service with a password. Other machines cannot connect.

    \b
    Examples:
      lazycluster expose -w 'node[1-4]' 5432   # your database
      lazycluster expose -w gpu-a 3128:8080
    """
    from lazycluster.core import event_loop

    pairs = [(first or last, last) for first, last in map(_pair, ports)]
    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key, relay=relay)
    event_loop.run(_expose(chosen, pairs))


def _pair(text: str) -> tuple[int | None, int]:
    found = re.fullmatch(r"(?:(\d{1,5}):)?(\d{1,5})", text)
    numbers = [int(number) if number else None for number in found.groups()] if found else []
    if not numbers or any(number is not None and not 0 < number < 65536 for number in numbers):
        raise click.BadParameter(f"{text!r} is not a port (8888) or a pair of ports (9000:8888) from 1 to 65535")
    first, last = numbers
    assert last is not None
    return first, last


async def _forward(connection: Connection, pairs: list[tuple[int | None, int]]) -> None:
    from lazycluster.runtime.network import open_from_runtime

    await connection.open()
    try:
        for local, remote in pairs:
            wanted = local if local is not None else [remote, *range(max(remote, 1024) + 1, min(remote + 100, 65536))]
            tunnel = await open_from_runtime(connection, remote, wanted)
            tell(f"localhost:{tunnel.local_port} -> {connection.host}:{remote}")
        await _until_lost([connection])
    finally:
        await connection.close()


async def _expose(chosen: Targets, pairs: list[tuple[int, int]]) -> None:
    import asyncio

    from lazycluster.cli.fanout import open_all
    from lazycluster.runtime.network import open_to_runtimes

    connections = await open_all(chosen)
    try:
        for local, remote in pairs:
            await open_to_runtimes(connections, local, remote)
            for connection in connections:
                tell(f"{connection.host}:{remote} -> localhost:{local}")
        await _until_lost(connections)
    finally:
        await asyncio.gather(*(connection.close() for connection in connections), return_exceptions=True)


async def _until_lost(connections: list[Connection]) -> None:
    import asyncio

    from lazycluster.exceptions import ConnectionLostError

    tell("Press Ctrl-C to end.", err=True)
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(connection: Connection, why: str) -> None:
        if not lost.done():
            lost.set_exception(ConnectionLostError(connection.host, why))

    for connection in connections:
        connection.on_lost.append(lambda why, connection=connection: fail(connection, why))  # type: ignore[misc]
    await lost
