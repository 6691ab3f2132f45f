"""The network of a cluster: through the manager (tunnels), or from host to host, where that was proven to work."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from lazycluster.exceptions import LazyclusterError, PortInUseError
from lazycluster.runtime.reachability import (
    DirectAddress,
    NetworkChoice,
    ProbedHost,
    Reachability,
    ReachabilityCache,
    checked_network,
    session_of,
)
from lazycluster.ssh.connection import Connection

from .exceptions import UnreachableError
from .worker_hosts import WorkerHost

if TYPE_CHECKING:
    from .engine import Endpoint, Engine
    from .network import Listener

__all__ = ["DirectNetwork"]

_UNSTATED = "its processes listen on loopback only"
_OPEN = "it does not encrypt and authenticate what hosts say to each other"
_OWN_LAUNCHERS = "a launcher of your own starts its processes"


class DirectNetwork:
    """Addresses at which the hosts of one cluster reach each other, if that is wanted, and proven.

    Args:
        wanted: What the user has asked for.
        cache: What was proven of the group's hosts.

    Attributes:
        wanted: What the user has asked for.
        uses: What is used: ``tunnel`` or ``direct``; "" while ``auto`` is undecided.
        why: Why that is so, for people.
        master: Where the master runs, or will run; None if that is not on a host, or not known yet.
    """

    def __init__(self, wanted: NetworkChoice = "tunnel", cache: ReachabilityCache | None = None) -> None:
        self.wanted = checked_network(wanted)
        self._cache = cache or ReachabilityCache()
        self._no_auto = ""
        self.forget()

    def forget(self) -> None:
        """Forget what was decided and proven, when the cluster has ended."""
        self.uses: Literal["", "tunnel", "direct"] = "" if self.wanted == "auto" else self.wanted
        self.why = ""
        if self._no_auto:
            self._fall_back(self._no_auto)
        self._addresses: dict[Hashable, DirectAddress] = {}
        self._listeners: dict[int, Listener] = {}
        self._hosts: set[Hashable] = set()
        self.master: WorkerHost | None = None

    @property
    def is_direct(self) -> bool:
        """True if hosts talk to each other at their own addresses."""
        return self.uses == "direct"

    def refuse(self, engine: Engine, own_launchers: bool) -> str:
        """Return why the engine cannot use it, "" if it can; ``auto`` is decided then.

        Args:
            engine: The statement of the engine.
            own_launchers: Whether launchers start its processes that do not know of this.
        """
        if self.wanted == "tunnel":
            return ""
        why = _OWN_LAUNCHERS if own_launchers else _UNSTATED if engine.direct == "no" else ""
        if self.wanted == "auto" and not why and not engine.encrypts():
            why = _OPEN
        if self.wanted == "auto" and why:
            self._no_auto = why
            self._fall_back(why)
            return ""
        return why

    def _fall_back(self, why: str) -> None:
        self.uses, self.why = "tunnel", why

    async def decide(self, listeners: Sequence[Listener], places: Sequence[WorkerHost]) -> None:
        """Find out ahead whether processes will be reached, and choose the network if that is wanted.

        Args:
            listeners: What will listen.
            places: All hosts of the cluster.

        Raises:
            UnreachableError: If they will not, and nothing else is to be used.
        """
        found = await self._found(listeners, places)
        if self.uses and found.obstacles:
            raise UnreachableError(found)
        if found.obstacles:
            self._fall_back(str(found))
        elif not self.uses:  # another port than one that is taken is tried when it is used
            self.uses, self.why = "direct", "all hosts reach each other"

    async def prove(
        self, listeners: Sequence[Listener], places: Sequence[WorkerHost]
    ) -> dict[int, tuple[str, LazyclusterError]]:
        """Make sure that processes that are about to listen will be reached by all hosts.

        Args:
            listeners: What will listen.
            places: All hosts of the cluster.

        Returns:
            For each port that is taken the host, and the error.

        Raises:
            UnreachableError: If a host does not reach another one.
        """
        found = await self._found(listeners, places)
        if found.obstacles:
            raise UnreachableError(found)
        if found.taken:
            return {port: (host, PortInUseError(port, host)) for host, ports in found.taken.items() for port in ports}
        for listener in listeners:
            if listener.reach.is_between_hosts:
                self._addresses.setdefault(listener.place.network, found.addresses[listener.place.host])
        self._hosts.update(session_of(place.connection) for place in places)
        self._listeners.update({listener.port: listener for listener in listeners if listener.reach.is_between_hosts})
        return {}

    async def _found(self, listeners: Sequence[Listener], places: Sequence[WorkerHost]) -> Reachability:
        new = [listener for listener in listeners if listener.reach.is_between_hosts]
        # Who has come since has not dialed what runs.
        running = (
            []
            if all(session_of(place.connection) in self._hosts for place in places)
            else list(self._listeners.values())
        )
        hosts = [
            ProbedHost(
                place.host,
                place.connection,
                _ports_on(place, new),
                tuple(set(_ports_on(place, running)) - set(_ports_on(place, new))),
                self._address_to_try(place),
                self._only_from_master(place, [*new, *running], places),
            )
            for place in places
        ]
        return await self._cache.prove(hosts)

    def _only_from_master(
        self, place: WorkerHost, listeners: Iterable[Listener], places: Sequence[WorkerHost]
    ) -> dict[int, Connection]:
        """Return the ports of a host that none but the master connects to, which halves the dials between workers."""
        if self.master is None or not any(place.network == self.master.network for place in places):
            return {}
        return dict.fromkeys(
            _ports_on(place, (one for one in listeners if one.reach.is_for_master)), self.master.connection
        )

    def _address_to_try(self, place: WorkerHost) -> str | None:
        """Return the one address to be tried: what runs there listens on it."""
        known = self._addresses.get(place.network) if self._any_on(place) else None
        return known.address if known is not None else place.address

    def _any_on(self, place: WorkerHost) -> bool:
        return any(listener.place.network == place.network for listener in self._listeners.values())

    def closed(self, port: int) -> None:
        """Note that nothing listens on a port any more."""
        listener = self._listeners.pop(port, None)
        if listener is not None and not self._any_on(listener.place):
            self._addresses.pop(listener.place.network, None)

    def locate(self, at: Endpoint, place: WorkerHost) -> None:
        """Tell a process where it is reached, and where it is to listen."""
        found = self._addresses.get(place.network) if self.is_direct else None
        if found is not None:
            at.address, at.bind = found.address, found.bind

    def bind_of(self, listener: Listener) -> str | None:
        """Return where a process listens for other hosts; None if it does not, or on loopback."""
        if not self.is_direct or not listener.reach.is_between_hosts:
            return None
        return self._addresses[listener.place.network].bind

    def described(self) -> str:
        """Return which network is used, and why, in a line."""
        uses = {"tunnel": "tunnels through this machine", "direct": "direct", "": "not decided yet"}[self.uses]
        return f"{uses} ({self.why})" if self.why else uses


def _ports_on(place: WorkerHost, listeners: Iterable[Listener]) -> tuple[int, ...]:
    return tuple(one.port for one in listeners if one.place.connection is place.connection)
