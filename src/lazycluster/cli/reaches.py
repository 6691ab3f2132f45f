"""Which hosts reach each other, as clusters with ``--network direct`` need it: for ``doctor`` and ``list-runtimes``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lazycluster.runtime.network import free_on_all
from lazycluster.runtime.reachability import ProbedHost, Reachability, probe
from lazycluster.ssh.connection import Connection

__all__ = ["by_host", "probe_all", "told"]

_PORTS = range(25000, 25064)  # those of clusters
_MOST_NAMED = 8


async def probe_all(connections: Sequence[Connection]) -> Reachability:
    """Find out which of some hosts reach each other.

    Args:
        connections: The hosts, connected.
    """
    free = await free_on_all(_PORTS, connections, skip_lost=True)
    return await probe([ProbedHost(connection.host, connection, tuple(free[:2])) for connection in connections])


def by_host(found: Reachability, hosts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return for each host, by the names of the others, why it does not reach them; "" if it does."""
    obstacles = {(one.source, one.target): f"{one.where} {one.why}".strip() for one in found.obstacles}
    apart = {one.target: str(one.why) for one in found.obstacles if not one.address}  # of a host that nobody reaches
    return {
        host: {other: obstacles.get((host, other), apart.get(other, "")) for other in hosts if other != host}
        for host in hosts
    }


def told(reaches: Mapping[str, str]) -> str:
    """Return which others a host reaches, in a line; "" if there are none."""
    bad = [f"{host} no: {why}" for host, why in reaches.items() if why]
    good = [host for host, why in reaches.items() if not why]
    if len(good) > _MOST_NAMED:
        return ", ".join([f"{len(good)} hosts yes", *bad])
    return ", ".join([*(f"{host} yes" for host in good), *bad])
