"""Ports of a group: free on all hosts, and exposed on all or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lazycluster.agent.ports import is_free
from lazycluster.core.words import counted
from lazycluster.exceptions import NoPortsLeftError
from lazycluster.runtime.network import (
    checked_ports,
    free_on_all,
    network_of,
    one_per_network,
    open_all,
    open_to_runtimes,
    pick_port,
)
from lazycluster.runtimes import Runtime
from lazycluster.ssh.tunnels import Tunnel, TunnelRequest, check_port

__all__ = ["expose_from_one", "expose_to_all", "free_everywhere"]


async def free_everywhere(runtimes: Sequence[Runtime], ports: Sequence[int], on_manager: bool) -> list[int]:
    """Return those of some ports that are free on all hosts, tried by binding.

    Args:
        runtimes: The hosts.
        ports: The ports.
        on_manager: Whether they must be free on the manager, too.
    """
    for runtime in runtimes:
        runtime._session.check()
    free = await free_on_all(ports, [runtime._connection for runtime in runtimes])
    return [port for port in free if not on_manager or is_free(port) is None]


def _one_each(runtimes: Sequence[Runtime]) -> list[Runtime]:
    return one_per_network(runtimes, lambda runtime: network_of(runtime._connection))


async def expose_to_all(
    runtimes: Sequence[Runtime], local_port: int, ports: int | Iterable[int] | None
) -> list[tuple[Runtime, Tunnel]]:
    """Make a port of the manager reachable on hosts, under the same port on all of them, or on none.

    Args:
        runtimes: The hosts.
        local_port: The manager's port.
        ports: The port on the hosts, or several, of which the first that is free everywhere is taken.

    Returns:
        The tunnels, with the runtimes that they lead to.
    """
    chosen = _one_each(runtimes)
    tunnels = await open_to_runtimes([runtime._connection for runtime in chosen], local_port, ports)
    return list(zip(chosen, tunnels, strict=True))


async def expose_from_one(
    source: Runtime, others: Sequence[Runtime], runtime_port: int, ports: int | Iterable[int] | None
) -> tuple[int, list[tuple[Runtime, Tunnel]]]:
    """Make a port of a host reachable on the manager and on other hosts, under the same port on all, or on none.

    Args:
        source: The host that has the service.
        others: The other hosts.
        runtime_port: The service's port.
        ports: The port to be used, or several; by default the same.

    Returns:
        The port, and the tunnels with the runtimes that they lead to.

    Raises:
        PortInUseError: If the only port that was given is taken somewhere.
        NoPortsLeftError: If several were given and each is taken somewhere.
    """
    check_port(runtime_port, "runtime_port")
    candidates = checked_ports(runtime_port if ports is None else ports)
    choice = isinstance(ports, Iterable)
    here = _one_each([source, *others])[1:]  # those that do not share the ports of the source
    if choice:
        free = await free_everywhere(here, candidates, on_manager=False)
        pick_port(candidates, free, "the group")
        candidates = free
    for port in candidates:
        requests = [TunnelRequest(source._connection, "from_runtime", port, runtime_port)]
        requests += [TunnelRequest(other._connection, "to_runtime", port, port, known_free=choice) for other in here]
        tunnels = await open_all(requests, another=choice)
        if tunnels is not None:
            return port, list(zip([source, *here], tunnels, strict=True))
    raise NoPortsLeftError(
        f"of the {counted(len(candidates), 'port')} that may be used, none is free on the manager and in the group"
    )
