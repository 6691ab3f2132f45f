"""Ports of a cluster: which are used, and the tunnels that make them the same everywhere.

A party that listens on a port of its host's loopback interface is reached by the others under the same loopback
address and port: so it may tell its address to anybody, as engines do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from lazycluster.exceptions import ConnectionLostError, LazyclusterError, NoPortsLeftError, PortInUseError
from lazycluster.runtime.network import free_on_all, network_of, one_per_network
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.mux import LOOPBACK
from lazycluster.ssh.tunnels import Tunnel, TunnelRequest, close_tunnels, open_tunnels

from .direct_network import DirectNetwork
from .worker_hosts import WorkerHost

_AT_ONCE = 48  # candidates that are looked at beyond those that are needed


class Reach(Enum):
    """Range from which a port is to be reached, beside the processes of its own host."""

    LOCAL = "local"
    MANAGER = "manager"
    MASTER = "master"
    ALL = "all"

    @property
    def is_between_hosts(self) -> bool:
        """True if processes of other hosts connect to it, or may do so."""
        return self in (Reach.MASTER, Reach.ALL)

    @property
    def is_for_master(self) -> bool:
        """True if of other hosts only the master's connects to it."""
        return self is Reach.MASTER


@dataclass(frozen=True)
class Port:
    """A port, or several, that a process of an engine listens on, at 127.0.0.1.

    Attributes:
        name: What it is for.
        reach: Who connects to it. Where it is reached, it has the same address and number.
        count: How many there are; with more than one, their names are ``name0``, ``name1``, ...
    """

    name: str
    reach: Reach = Reach.ALL
    count: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.reach, Reach):
            raise TypeError(f"the reach of the port {self.name!r} must be a Reach, as Reach.ALL, not {self.reach!r}")
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"the port {self.name!r} must be there at least once, not {self.count!r} times")

    @property
    def names(self) -> list[str]:
        """The names of the single ports."""
        return [self.name] if self.count == 1 else [f"{self.name}{index}" for index in range(self.count)]


def single_ports(ports: Iterable[Port]) -> list[Port]:
    """Return the same ports, each by itself."""
    return [Port(name, port.reach) for port in ports for name in port.names]


def forwards_needed(uses: Iterable[Port], workers: int, hosts: int) -> int:
    """Return how many ports are forwarded through the manager, so that workers are reached.

    Args:
        uses: The ports of one worker.
        workers: How many there are.
        hosts: On how many hosts.
    """
    each = {Reach.LOCAL: 0, Reach.MANAGER: 1, Reach.MASTER: 1, Reach.ALL: hosts}
    return workers * sum(each[use.reach] for use in uses)


@dataclass(frozen=True)
class Listener:
    """A port of a process on a host.

    Attributes:
        place: Where it listens.
        port: The port.
        reach: Who is to reach it.
    """

    place: WorkerHost
    port: int
    reach: Reach


# Ports that clusters of this process have chosen: between the choice and the moment when something listens, another
# cluster that is started at the same time must not choose them, too.
_chosen: set[int] = set()
_lock = threading.Lock()


class PortSupply:
    """Ports that may be used, in the order in which they are tried. Each is handed out once.

    Args:
        ports: The ports.
    """

    def __init__(self, ports: Iterable[int]) -> None:
        self._left = list(dict.fromkeys(ports))
        self._mine: set[int] = set()

    @property
    def left(self) -> list[int]:
        """The ports that were not used."""
        return list(self._left)

    async def take(self, count: int, connections: Sequence[Connection]) -> list[int]:
        """Return ports that are free on all hosts.

        Raises:
            NoPortsLeftError: If there are not enough.
        """
        found: list[int] = []
        tried: set[int] = set()
        while len(found) < count:
            batch = [port for port in self._left if port not in tried][: count - len(found) + _AT_ONCE]
            if not batch:
                raise NoPortsLeftError(
                    f"{count} ports are needed that are free on all hosts and on the manager, but of the "
                    f"{len(self._left)} that may be used only {len(found)} are"
                    "\n  Next step: free some, or allow more: ports="
                )
            tried.update(batch)
            free = await free_on_all(batch, connections, skip_lost=True)
            found += list(self._reserve(free, count - len(found)))
        self._left = [port for port in self._left if port not in self._mine]
        return found

    def _reserve(self, ports: Iterable[int], count: int) -> Iterator[int]:
        with _lock:
            usable = [port for port in ports if port not in _chosen][:count]
            _chosen.update(usable)
        self._mine.update(usable)
        yield from usable

    @property
    def in_use(self) -> bool:
        """True if ports were taken that are not released yet."""
        return bool(self._mine)

    def release(self, ports: Iterable[int] | None = None) -> None:
        """Let other clusters use some ports, or all."""
        released = self._mine & set(self._mine if ports is None else ports)
        with _lock:
            _chosen.difference_update(released)
        self._mine -= released


class Network:
    """The ways by which the processes of one cluster reach each other: tunnels, or the hosts' own addresses.

    Args:
        direct: The addresses of hosts, and whether they are used; by default they are not.

    Attributes:
        direct: The addresses of hosts, and whether they are used.
        on_lost: Called with a tunnel whose port cannot be had again, after the link to its host dropped.
    """

    def __init__(self, direct: DirectNetwork | None = None) -> None:
        self.direct = direct or DirectNetwork()
        self._tunnels: dict[int, list[Tunnel]] = {}
        self._masters: dict[int, list[Listener]] = {}
        self.on_lost: Callable[[Tunnel], object] | None = None

    def _keep(self, port: int, tunnel: Tunnel) -> None:
        self._tunnels.setdefault(port, []).append(tunnel)
        if self.on_lost is not None:
            tunnel.on_lost.append(self.on_lost)

    async def share_master(self, port: int, places: Iterable[WorkerHost]) -> dict[str, LazyclusterError]:
        """Make the port of a master reachable on hosts: one of the manager, or of a host that `open_master` was told.

        Returns:
            Why it is not, for the hosts where it is not.
        """
        places = list(places)
        if self.direct.is_direct:
            return {}
        if port in self._masters:
            return await self.extend(self._masters[port], places)
        open_to = {tunnel.host for tunnel in self._tunnels.get(port, []) if tunnel.is_open}
        reached = {place.network for place in places if place.host in open_to}
        wanted = _one_each(place for place in places if place.network not in reached)
        outcomes = await open_tunnels([TunnelRequest(place.connection, "to_runtime", port, port) for place in wanted])
        for outcome in outcomes:
            if isinstance(outcome, Tunnel):
                self._keep(port, outcome)
        failed = {
            place.network: outcome
            for place, outcome in zip(wanted, outcomes, strict=True)
            if isinstance(outcome, LazyclusterError)
        }
        return {place.host: failed[place.network] for place in places if place.network in failed}

    async def open_master(self, listeners: Sequence[Listener], places: Sequence[WorkerHost]) -> list[LazyclusterError]:
        """Make the ports of a master on a host reachable; the first is the one that it is known by.

        Returns:
            Why they are not, on the manager or elsewhere.

        Raises:
            LazyclusterError: If they cannot be reached from the manager, whatever their numbers are.
        """
        direct = self.direct.is_direct
        if direct:
            self.direct.master = listeners[0].place
            taken = await self.direct.prove(listeners, places)
            if taken:
                return [error for _, error in taken.values()]
        here = [one if direct or one.reach is Reach.LOCAL else replace(one, reach=Reach.MANAGER) for one in listeners]
        failed = [error for _, error in (await self._tunnelled(here, places)).values()]
        for error in failed:
            if not isinstance(error, PortInUseError):
                raise error
        if failed:
            return failed
        self._masters[listeners[0].port] = list(listeners)
        return list((await self.extend(listeners, places)).values())

    async def open(
        self, listeners: Sequence[Listener], places: Sequence[WorkerHost]
    ) -> dict[int, tuple[str, LazyclusterError]]:
        """Make ports of workers reachable.

        Args:
            listeners: The ports.
            places: All hosts of the cluster.

        Returns:
            For each port that failed the host where, and why. No tunnel of it is left.
        """
        if not self.direct.is_direct:
            return await self._tunnelled(listeners, places)
        taken = await self.direct.prove(listeners, places)
        if taken:
            return taken
        return await self._tunnelled([one for one in listeners if not one.reach.is_between_hosts], places)

    async def _tunnelled(
        self, listeners: Sequence[Listener], places: Sequence[WorkerHost]
    ) -> dict[int, tuple[str, LazyclusterError]]:
        requests: list[TunnelRequest] = []
        for listener in listeners:
            port, home, bind = listener.port, listener.place, self.direct.bind_of(listener)
            if listener.reach is not Reach.LOCAL:
                requests.append(TunnelRequest(home.connection, "from_runtime", port, port, host=bind or LOOPBACK))
            if bind is None and self._is_for_all(listener):
                away = [place for place in places if place.network != home.network]
                requests += [TunnelRequest(place.connection, "to_runtime", port, port) for place in _one_each(away)]
        failed: dict[int, tuple[str, LazyclusterError]] = {}
        for request, outcome in zip(requests, await open_tunnels(requests), strict=True):
            if isinstance(outcome, Tunnel):
                self._keep(request.local_port, outcome)
            elif not isinstance(outcome, ConnectionLostError):
                failed.setdefault(request.local_port, (request.connection.host, outcome))
        for port in failed:
            await self.close(port)
        return failed

    def _is_for_all(self, listener: Listener) -> bool:
        # A master on the manager is where tunnels end anyway.
        return listener.reach is Reach.ALL or (listener.reach is Reach.MASTER and bool(self._masters))

    async def extend(self, listeners: Sequence[Listener], places: Sequence[WorkerHost]) -> dict[str, LazyclusterError]:
        """Make ports of workers that are open already reachable on hosts that are new.

        Returns:
            Why they are not, for the hosts where they are not.
        """
        requests = []
        for listener in [] if self.direct.is_direct else listeners:
            if self._is_for_all(listener):
                open_to = {tunnel.network for tunnel in self._tunnels.get(listener.port, []) if tunnel.is_open}
                new = [place for place in places if place.network not in open_to]
                requests += [
                    TunnelRequest(place.connection, "to_runtime", listener.port, listener.port)
                    for place in _one_each(new)
                    if place.network != listener.place.network
                ]
        failed: dict[Hashable, LazyclusterError] = {}
        for request, outcome in zip(requests, await open_tunnels(requests), strict=True):
            if isinstance(outcome, Tunnel):
                self._keep(request.local_port, outcome)
            else:
                home = next(place for place in places if place.connection is request.connection)
                failed.setdefault(home.network, outcome)
        return {place.host: failed[place.network] for place in places if place.network in failed}

    async def keep(self, connections: Iterable[Connection]) -> None:
        """Close the tunnels that lead to other hosts than these."""
        networks = {network_of(connection) for connection in connections}
        gone = [tunnel for tunnels in self._tunnels.values() for tunnel in tunnels if tunnel.network not in networks]
        for port, tunnels in self._tunnels.items():
            self._tunnels[port] = [tunnel for tunnel in tunnels if tunnel not in gone]
        with contextlib.suppress(LazyclusterError):
            await close_tunnels(gone)

    async def close(self, port: int | None = None) -> None:
        """Close the tunnels of a port, or all."""
        for number in list(self._masters) if port is None else [port]:
            self._masters.pop(number, None)
        if port is not None:
            self.direct.closed(port)
        ports = list(self._tunnels) if port is None else [port]
        tunnels = [tunnel for number in ports for tunnel in self._tunnels.pop(number, [])]
        with contextlib.suppress(LazyclusterError):  # a connection that has gone took its tunnels along
            await close_tunnels(tunnels)


def _one_each(places: Iterable[WorkerHost]) -> list[WorkerHost]:
    return one_per_network(places, lambda place: place.network)
