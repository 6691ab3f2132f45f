"""Tunnels: a port of the manager that can be reached on a host, or the other way round.

The bytes are moved by the one ssh process of the host. Whatever listens, listens on loopback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from lazycluster.core import event_loop
from lazycluster.core.words import counted
from lazycluster.exceptions import NoPortsLeftError, PortInUseError, TunnelError

from .connection import Connection
from .forwarding import open_on
from .probes import network_of, same_network
from .tunnel_handles import Outcome, Tunnel, TunnelRequest, check_port, close_tunnels

__all__ = [
    "Tunnel",
    "TunnelRequest",
    "check_port",
    "close_tunnels",
    "open_from_runtime",
    "open_to_runtime",
    "open_to_runtimes",
    "open_tunnels",
]

_ASKED_AT_ONCE = 64
Ports = int | Iterable[int]


def _candidates(ports: Ports | None, default: int, what: str) -> tuple[list[int], bool]:
    """Return the ports to try, and whether there was a choice."""
    if ports is None:
        return [default], False
    if isinstance(ports, Iterable) and not isinstance(ports, (str, bytes)):
        several = [check_port(port, what) for port in ports]
        if not several:
            raise NoPortsLeftError(f"{what}: the list of ports is empty")
        return several, True
    return [check_port(ports, what)], False


async def open_tunnels(requests: Sequence[TunnelRequest]) -> list[Outcome]:
    """Open tunnels on any number of connections at once.

    If this is cancelled, all of them are closed.

    Args:
        requests: What is wanted.

    Returns:
        For each the tunnel, or why there is none: PortInUseError, TunnelError, ConnectionLostError.
    """
    per_connection: dict[Connection, list[int]] = {}
    for index, request in enumerate(requests):
        per_connection.setdefault(request.connection, []).append(index)
    tasks = [
        asyncio.ensure_future(open_on(connection, [requests[index] for index in indexes]))
        for connection, indexes in per_connection.items()
    ]
    try:
        parts = await event_loop.together(tasks)
    except BaseException:
        opened = [item for task in tasks for item in event_loop.outcome(task, [])]
        await close_tunnels(item for item in opened if isinstance(item, Tunnel))
        raise
    outcomes: dict[int, Outcome] = {}
    for indexes, part in zip(per_connection.values(), parts, strict=True):
        outcomes.update(zip(indexes, part, strict=True))
    return [outcomes[index] for index in range(len(requests))]


async def open_to_runtimes(
    connections: Sequence[Connection], local_port: int, ports: Ports | None = None
) -> list[Tunnel]:
    """Make a port of the manager reachable on hosts, under the same port on all of them.

    Args:
        connections: The hosts.
        local_port: The manager's port.
        ports: The port on the hosts, or several, of which the first that is free everywhere is taken; by default
            ``local_port``.

    Returns:
        The tunnels, in the order of the connections; their ``remote_port`` is the port.

    Raises:
        PortInUseError: If the only port is taken on a host.
        NoPortsLeftError: If none of several is free on all hosts.
        TunnelError: If a host forbids it. Nothing stays open then.
    """
    check_port(local_port, "local_port")
    candidates, choice = _candidates(ports, local_port, "runtime_port")
    # Of several names of one machine, one tunnel serves all.
    first = list({network_of(connection): connection for connection in reversed(connections)}.values())
    tried = 0
    while tried < len(candidates):
        part = candidates[tried : tried + _ASKED_AT_ONCE]
        tried += len(part)
        for port in await _free_on_all(first, part, local_port) if choice else part:
            requests = [TunnelRequest(connection, "to_runtime", local_port, port) for connection in first]
            tunnels = await _all_or_none(requests, choice)
            if tunnels is not None:
                opened = dict(zip(first, tunnels, strict=True))
                return [opened.get(c) or _shared(c, local_port, port) for c in connections]
    hosts = ", ".join(connection.host for connection in connections)
    raise NoPortsLeftError(f"of the {counted(len(candidates), 'port')} that may be used, none is free on {hosts}")


def _shared(connection: Connection, local_port: int, port: int) -> Tunnel:
    return Tunnel(TunnelRequest(connection, "to_runtime", local_port, port), None, by_ssh=False)


async def open_to_runtime(connection: Connection, local_port: int, runtime_port: Ports | None = None) -> Tunnel:
    """Make a port of the manager reachable on a host; see :func:`open_to_runtimes`."""
    return (await open_to_runtimes([connection], local_port, runtime_port))[0]


async def open_from_runtime(connection: Connection, runtime_port: int, local_port: Ports | None = None) -> Tunnel:
    """Make a port of a host reachable on the manager.

    Args:
        connection: The host.
        runtime_port: The host's port.
        local_port: The manager's port, or several, of which the first that is free is taken; by default
            ``runtime_port``.

    Returns:
        The tunnel; its ``local_port`` is the port.

    Raises:
        PortInUseError: If the only port is taken on the manager.
        NoPortsLeftError: If none of several is free.
        TunnelError: If the host forbids it.
    """
    check_port(runtime_port, "runtime_port")
    candidates, choice = _candidates(local_port, runtime_port, "local_port")
    for port in candidates:
        tunnels = await _all_or_none([TunnelRequest(connection, "from_runtime", port, runtime_port)], choice)
        if tunnels is not None:
            return tunnels[0]
    raise NoPortsLeftError(f"of the {counted(len(candidates), 'port')} that may be used, none is free on the manager")


async def _all_or_none(requests: list[TunnelRequest], choice: bool) -> list[Tunnel] | None:
    """Open all, or raise; None if a port is taken and there is another to try."""
    outcomes = await open_tunnels(requests)
    tunnels = [outcome for outcome in outcomes if isinstance(outcome, Tunnel)]
    errors = [outcome for outcome in outcomes if not isinstance(outcome, Tunnel)]
    if not errors:
        return tunnels
    await close_tunnels(tunnels)
    grave = [error for error in errors if not isinstance(error, PortInUseError)]
    if not grave and choice:
        return None
    grave = grave or errors
    if len(grave) == 1:
        raise grave[0]
    if all(isinstance(error, PortInUseError) for error in grave):
        hosts = ", ".join(str(getattr(error, "host", "")) for error in grave)
        raise PortInUseError(requests[0].forward.listen_port, hosts)
    raise TunnelError("\n".join(str(error) for error in grave))


async def _free_on_all(connections: Sequence[Connection], ports: list[int], local_port: int) -> list[int]:
    async def free(connection: Connection) -> set[int]:
        found = set((await connection.request("ports", ports=ports))["free"])
        if local_port in ports and await same_network(connection):
            found.add(local_port)  # it is taken by the very service that is to be reached there
        return found

    everywhere = set(ports).intersection(*await asyncio.gather(*(free(connection) for connection in connections)))
    return [port for port in ports if port in everywhere]
