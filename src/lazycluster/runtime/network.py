"""Networks of hosts: who shares one, which ports are free on all, and one port for all.

Hosts share a network if a port of one is a port of the other: two names of one machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from lazycluster.core.words import counted
from lazycluster.exceptions import ConnectionLostError, NoAnswerError, NoPortsLeftError, PortInUseError, TunnelError
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.probes import network_of, same_network
from lazycluster.ssh.tunnels import Tunnel, TunnelRequest, check_port, close_tunnels, open_tunnels

__all__ = [
    "checked_ports",
    "free_on_all",
    "network_of",
    "one_per_network",
    "open_all",
    "open_from_runtime",
    "open_to_runtime",
    "open_to_runtimes",
    "pick_port",
]

T = TypeVar("T")

Ports = int | Iterable[int]

_ASKED_AT_ONCE = 64


def one_per_network(hosts: Iterable[T], network: Callable[[T], Hashable]) -> list[T]:
    """Return the first host of each network.

    Args:
        hosts: Hosts, of any kind.
        network: Returns the network of one, see `network_of`.
    """
    first: dict[Hashable, T] = {}
    for host in hosts:
        first.setdefault(network(host), host)
    return list(first.values())


async def free_on_all(
    ports: Sequence[int], connections: Iterable[Connection], *, service: int | None = None, skip_lost: bool = False
) -> list[int]:
    """Return those of some ports that are free on all hosts, tried by binding.

    Args:
        ports: The ports.
        connections: The hosts.
        service: A port of the manager that is to be reached on the hosts: where a host shares the manager's network,
            it is taken by the very service, and counts as free.
        skip_lost: A host that is lost or does not answer has no say.

    Raises:
        ConnectionLostError, NoAnswerError: If a host cannot be asked, unless `skip_lost`.
    """

    async def free_on(connection: Connection) -> set[int]:
        try:
            free = set((await connection.request("ports", ports=list(ports)))["free"])
        except (ConnectionLostError, NoAnswerError):
            if not skip_lost:
                raise
            return set(ports)
        if service is not None and service in ports and await same_network(connection):
            free.add(service)
        return free

    everywhere = set(ports).intersection(*await asyncio.gather(*map(free_on, connections)))
    return [port for port in ports if port in everywhere]


def checked_ports(ports: Ports, what: str = "port") -> list[int]:
    """Return one port or several as a list.

    Args:
        ports: The ports.
        what: What they are called in errors.

    Raises:
        TypeError, ValueError: If one is no port.
    """
    if isinstance(ports, Iterable) and not isinstance(ports, (str, bytes)):
        return [check_port(port, what) for port in ports]
    return [check_port(ports, what)]


def pick_port(ports: Sequence[int], free: Iterable[int], where: str) -> int:
    """Return the first port that is free.

    Raises:
        NoPortsLeftError: If none is.
    """
    available = set(free)
    for port in ports:
        if port in available:
            return port
    if not ports:
        raise NoPortsLeftError(f"{where}: the list of ports is empty")
    shown = ", ".join(map(str, ports[:10])) + (", ..." if len(ports) > 10 else "")
    privileged = " (a port below 1024 needs special rights)" if min(ports) < 1024 else ""
    raise NoPortsLeftError(f"{where}: of {counted(len(ports), 'port')}, none is free: {shown}{privileged}")


# --- one port for all --------------------------------------------------------------------------------
def _candidates(ports: Ports | None, default: int, what: str) -> tuple[list[int], bool]:
    """Return the ports to try, and whether there was a choice."""
    candidates = checked_ports(default if ports is None else ports, what)
    if not candidates:
        raise NoPortsLeftError(f"{what}: the list of ports is empty")
    return candidates, isinstance(ports, Iterable)


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
    first = one_per_network(connections, network_of)
    tried = 0
    while tried < len(candidates):
        part = candidates[tried : tried + _ASKED_AT_ONCE]
        tried += len(part)
        for port in await free_on_all(part, first, service=local_port) if choice else part:
            requests = [TunnelRequest(one, "to_runtime", local_port, port, known_free=choice) for one in first]
            tunnels = await open_all(requests, another=choice)
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
        tunnels = await open_all([TunnelRequest(connection, "from_runtime", port, runtime_port)], another=choice)
        if tunnels is not None:
            return tunnels[0]
    raise NoPortsLeftError(f"of the {counted(len(candidates), 'port')} that may be used, none is free on the manager")


async def open_all(requests: Sequence[TunnelRequest], *, another: bool) -> list[Tunnel] | None:
    """Open tunnels, all or none.

    Args:
        requests: What is wanted, under one port.
        another: There is another port to try if this one is taken.

    Returns:
        The tunnels; None if the port is taken and there is another to try.

    Raises:
        PortInUseError: If the port is taken.
        TunnelError, ConnectionLostError: If one cannot be opened for another reason.
    """
    outcomes = await open_tunnels(requests)
    tunnels = [outcome for outcome in outcomes if isinstance(outcome, Tunnel)]
    errors = [outcome for outcome in outcomes if not isinstance(outcome, Tunnel)]
    if not errors:
        return tunnels
    await close_tunnels(tunnels)
    grave = [error for error in errors if not isinstance(error, PortInUseError)]
    if not grave and another:
        return None
    grave = grave or errors
    if len(grave) == 1:
        raise grave[0]
    if all(isinstance(error, PortInUseError) for error in grave):
        hosts = ", ".join(str(getattr(error, "host", "")) for error in grave)
        raise PortInUseError(requests[0].forward.listen_port, hosts)
    raise TunnelError("\n".join(str(error) for error in grave))
