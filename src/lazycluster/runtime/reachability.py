"""Probe of hosts at addresses of their own: every pair is tried, each direction, on the ports to be used.

Each host listens on its addresses, and all dial all others at once. A listener proves with a secret of the probe which
host it is: private addresses may be those of somebody else's machine. What passes through the manager is one request
and one summary per host.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from lazycluster.exceptions import LazyclusterError
from lazycluster.ssh.agent_replies import NAME, check_shape
from lazycluster.ssh.channel import Channel
from lazycluster.ssh.connect_limit import resolve
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.probes import network_of
from lazycluster.ssh.ssh_connection import SshConnection

__all__ = ["DirectAddress", "NetworkChoice", "Obstacle", "ProbedHost", "Reachability", "ReachabilityCache",
           "checked_address", "checked_network", "probe", "session_of"]  # fmt: skip

NetworkChoice = Literal["tunnel", "direct", "auto"]

_LISTEN_LIMIT = 6.0  # seconds for all hosts to listen
_ROUND_LIMIT = 7.5  # seconds for the summaries of a round; a host gives up after 6, or says that it is still answered
_STILL_LIMIT = 3.0  # seconds more, each time it says so
_LONGEST_ROUND = 22.0  # seconds for all that; it gives up after 20
_RESOLVED_AT_ONCE = 8  # processes that look hosts up in the ssh configuration
_PORTS_OF_ONE = 8  # obstacles that are looked at for another port of the same pair
_SHOWN = 5  # obstacles in a message
_LOOPBACK = "127.0.0.1"

_PORT = range(1, 65536)
_EVENTS: dict[str, dict[str, Any]] = {
    "listening": {"addresses": [NAME], "own": [NAME], "taken": [_PORT], "problem": str},
    "dialing": {},
    "dialed": {"failed": [list], "translated": [list]},
}
_WHY = {
    "refused": "refused",
    "no answer": "no answer within 2 s",
    "unreachable": "no route to it",
    "other program": "something else than our listener answers there",
    "not tried": "not tried, since too many others did not answer in time",
}


def checked_network(value: str) -> NetworkChoice:
    """Return the choice of how hosts reach each other.

    Raises:
        ValueError: If it is none.
    """
    for choice in get_args(NetworkChoice):
        if value == choice:
            return cast(NetworkChoice, choice)
    raise ValueError(f"network must be 'tunnel', 'direct' or 'auto', not {value!r}")


def checked_address(value: object, host: str) -> str:
    """Return the address that was stated for a host, as it is written usually.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is no address at which other machines can reach a host.
    """
    import ipaddress

    if not isinstance(value, str):
        raise TypeError(f"{host}: address must be a string, not {type(value).__name__}")
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        raise ValueError(f"{host}: address must be an IP address such as 10.0.0.7 or fd00::7, not {value!r}") from None
    if address.is_loopback or address.is_unspecified or address.is_multicast or address.is_link_local:
        raise ValueError(f"{host}: other hosts cannot reach it at the address {value}: name one of its network")
    return str(address)


@dataclass(frozen=True)
class DirectAddress:
    """An address of a host at which the others reach it.

    Attributes:
        address: As they know it.
        bind: As the host itself knows it, to listen on; another one where addresses are translated on the way (NAT).
    """

    address: str
    bind: str


@dataclass(frozen=True)
class ProbedHost:
    """A host in a probe.

    Attributes:
        host: Its name.
        connection: The connection to it.
        ports: The ports on which it is to be reached, free at present.
        running: Further ones, on which services listen already.
        address: Where it is to be reached, if the user has said so.
        only_from: Those of the ports that only one host must reach, with the connection to that host.
    """

    host: str
    connection: Connection
    ports: tuple[int, ...]
    running: tuple[int, ...] = ()
    address: str | None = None
    only_from: Mapping[int, Connection] = field(default_factory=dict)

    @property
    def proofs(self) -> set[tuple[int, Hashable]]:
        """What will be known of the free ports: each with the network of the one that must reach it, None if all do."""
        return {(port, network_of(self.only_from[port]) if port in self.only_from else None) for port in self.ports}


@dataclass(frozen=True)
class Obstacle:
    """Reason why one host does not reach another one.

    Attributes:
        source: The host that dialed.
        target: The host that was not reached.
        address: The address that was dialed; "" if there was none.
        port: The port.
        why: What happened, in a few words.
    """

    source: str
    target: str
    address: str
    port: int
    why: str

    @property
    def where(self) -> str:
        """Address and port, as they are written usually."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def __str__(self) -> str:
        if not self.address:
            return f"{self.source} cannot reach {self.target}: {self.why}"
        return f"{self.source} cannot reach {self.target} at {self.where}: {self.why}"


@dataclass(frozen=True)
class Reachability:
    """Findings of a probe.

    Attributes:
        addresses: By host, where all others reach it; those that are not reached by all are missing.
        obstacles: Why others are not.
        taken: By host, ports that are not free any more, so that nothing is known of them.
    """

    addresses: Mapping[str, DirectAddress] = field(default_factory=dict)
    obstacles: tuple[Obstacle, ...] = ()
    taken: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_proven(self) -> bool:
        """True if every host reaches every other one."""
        return not self.obstacles and not self.taken

    def __str__(self) -> str:
        lines = [str(obstacle) for obstacle in self.obstacles[:_SHOWN]]
        if len(self.obstacles) > _SHOWN:
            lines.append(f"and {len(self.obstacles) - _SHOWN} more")
        return "; ".join(lines) or "all hosts reach each other"


class ReachabilityCache:
    """Cache of what was proven for a group: asked again when a host joins or comes back, or for other ports."""

    def __init__(self) -> None:
        self._hosts: weakref.WeakKeyDictionary[Connection, tuple[Hashable, int, int]] = weakref.WeakKeyDictionary()
        self._ports: weakref.WeakKeyDictionary[Connection, set[tuple[int, Hashable]]] = weakref.WeakKeyDictionary()
        self._last = Reachability()

    async def prove(self, hosts: Sequence[ProbedHost]) -> Reachability:
        """Return what is known of some hosts, after a probe if need be.

        Args:
            hosts: The hosts, with the ports that will be used.
        """
        if not self._knows(hosts):
            found = await probe(hosts)
            if not found.is_proven:
                self._hosts.clear()
                return found
            if any(self._hosts.get(one.connection) != session_of(one.connection) for one in hosts):
                self._ports.clear()  # who has come since has not dialed the ports of before
            self._last = found
            for one in hosts:
                self._hosts[one.connection] = session_of(one.connection)
                self._ports.setdefault(one.connection, set()).update(one.proofs)
        return Reachability({one.host: self._last.addresses[one.host] for one in hosts})

    def _knows(self, hosts: Sequence[ProbedHost]) -> bool:
        return all(
            self._hosts.get(one.connection) == session_of(one.connection)
            and not one.running
            and one.host in self._last.addresses
            and one.address in (None, self._last.addresses[one.host].address)
            and self._are_proven(one)
            for one in hosts
        )

    def _are_proven(self, host: ProbedHost) -> bool:
        known = self._ports.get(host.connection, set())
        return all((port, None) in known or (port, dialer) in known for port, dialer in host.proofs)


def session_of(connection: Connection) -> tuple[Hashable, int, int]:
    """Return what changes when a host was away: its address may be another one then."""
    return network_of(connection), connection.generation, connection.interruptions


async def probe(hosts: Sequence[ProbedHost]) -> Reachability:
    """Find out whether every host reaches every other one.

    Args:
        hosts: The hosts, with the ports that will be used. Those that share a network are one.
    """
    groups: dict[Any, list[ProbedHost]] = {}
    for one in hosts:
        groups.setdefault(network_of(one.connection), []).append(one)
    members = [_merged(same) for same in groups.values()]
    key = secrets.token_hex(32)
    parties = [_Party(index, one, key) for index, one in enumerate(members)]
    try:
        await asyncio.gather(*(party.listen() for party in parties))
        found = await _Rounds(parties).run()
    finally:
        for party in parties:
            party.close()
    first = {one.host: same for one, same in zip(members, groups.values(), strict=True)}
    addresses = {one.host: found.addresses[host] for host in found.addresses for one in first[host]}
    return Reachability(addresses, found.obstacles, found.taken)


def _merged(same: Sequence[ProbedHost]) -> ProbedHost:
    ports = dict.fromkeys(port for one in same for port in one.ports)
    running = dict.fromkeys(port for one in same for port in one.running)
    stated = next((one.address for one in same if one.address), None)
    only_from = {port: dialer for one in same for port, dialer in one.only_from.items()}
    return ProbedHost(same[0].host, same[0].connection, tuple(ports), tuple(running), stated, only_from)


class _Party:
    """One host of a probe: what it was asked, and what it has said.

    Attributes:
        addresses: Its addresses, the one that is tried first first.
        own: Those of its interfaces, also if another one was stated.
        taken: Ports that others use there.
        problem: Why it takes no part, "" if it does.
        failed: What it could not reach in this round: [host, address, port, why], by their numbers.
        translated: What it has reached in another way than it is known there: [host, address, as it is known there].
    """

    def __init__(self, index: int, host: ProbedHost, key: str) -> None:
        self.index, self.host = index, host
        self.addresses: list[str] = []
        self.own: frozenset[str] = frozenset()
        self.taken: tuple[int, ...] = ()
        self.problem = ""
        self.failed: list[tuple[int, str, int, str]] = []
        self.translated: list[tuple[int, str, str]] = []
        self._key = key
        self._channel: Channel | None = None
        self._news = asyncio.Event()
        self._due = 0.0

    async def listen(self) -> None:
        """Have it listen, and tell its addresses."""
        params = {
            "key": self._key, "me": self.index, "ports": list(self.host.ports), "address": self.host.address or "",
        }  # fmt: skip
        try:
            self._channel = self.host.connection.channel("reach", params, event=self._on_event)
        except LazyclusterError as error:
            self.problem = str(error)
            return
        await self._heard(_LISTEN_LIMIT, "it does not listen")

    async def dial(self, others: Sequence[Sequence[Any]]) -> None:
        """Have it dial: [host, address, ports, ports of services], ...; what comes of it is in `failed`."""
        self.failed, self.translated = [], []
        if self._channel is not None and not self.problem:
            self._news.clear()
            self._channel.control(dial=list(others))
            await self._heard(_ROUND_LIMIT, "it has not finished dialing")

    async def _heard(self, limit: float, otherwise: str) -> None:
        assert self._channel is not None
        loop = asyncio.get_running_loop()
        since, self._due = loop.time(), loop.time() + limit
        ending, hearing = asyncio.ensure_future(self._channel.result()), asyncio.ensure_future(self._news.wait())
        while not (ending.done() or hearing.done()):
            left = min(self._due, since + _LONGEST_ROUND) - loop.time()
            if left <= 0:
                self.problem = f"{otherwise} within {loop.time() - since:.1f} s"
                break
            await asyncio.wait([ending, hearing], timeout=left, return_when=asyncio.FIRST_COMPLETED)
        hearing.cancel()
        if ending.done():
            error = ending.exception()
            self.problem = str(error) if error is not None else otherwise
        ending.cancel()

    def _on_event(self, event: dict[str, Any]) -> None:
        state = str(event.get("state"))
        check_shape(event, _EVENTS.get(state, {}))
        if state == "listening":
            self.addresses = [checked_address(one, self.host.host) for one in event["addresses"]]
            self.own = frozenset(checked_address(one, self.host.host) for one in event["own"])
            self.taken = tuple(event["taken"])
            self.problem = event["problem"]
        elif state == "dialed":
            self.failed = [_checked(one, int, str, int, str) for one in event["failed"]]
            self.translated = [_checked(one, int, str, str) for one in event["translated"]]
        elif state == "dialing":
            self._due = asyncio.get_running_loop().time() + _STILL_LIMIT
            return
        self._news.set()

    def close(self) -> None:
        """End its part."""
        if self._channel is not None:
            self._channel.close()


def _checked(row: Sequence[Any], *kinds: type) -> Any:
    if len(row) != len(kinds) or not all(isinstance(one, kind) for one, kind in zip(row, kinds, strict=True)):
        raise ValueError(f"{row!r:.80} is not a finding of a dial")
    return tuple(row)


class _Rounds:
    """The rounds of a probe: first one address of each host, then the others of those that were not reached there."""

    def __init__(self, parties: Sequence[_Party]) -> None:
        self._parties = parties
        self._bind: dict[tuple[int, str], str] = {}
        self._obstacles: dict[tuple[int, str], list[Obstacle]] = {}
        self._tried: dict[int, list[str]] = {party.index: [] for party in parties}

    async def run(self) -> Reachability:
        """Dial, and return what was found."""
        taken = {party.host.host: party.taken for party in self._parties if party.taken}
        if taken:
            return Reachability(taken=taken)
        silent = tuple(self._silent(party) for party in self._parties if party.problem or not party.addresses)
        if silent and len(self._parties) > 1:
            return Reachability(obstacles=silent)
        if len(self._parties) == 1:
            address = next(iter(self._parties[0].addresses), _LOOPBACK)
            return Reachability({self._parties[0].host.host: DirectAddress(address, address)})
        await self._round({party.index: party.addresses[:1] for party in self._parties})
        rest = [party for party in self._parties if self._best(party)[1]]
        slots = asyncio.Semaphore(_RESOLVED_AT_ONCE)
        more = await asyncio.gather(*(_other_addresses(party, slots) for party in rest))
        others = {party.index: addresses for party, addresses in zip(rest, more, strict=True)}
        if any(others.values()):
            await self._round(others)
        addresses, obstacles = {}, []
        for party in self._parties:
            address, problems = self._best(party)
            obstacles += problems
            if not problems:
                addresses[party.host.host] = DirectAddress(address, self._bind.get((party.index, address), address))
        return Reachability(addresses, tuple(obstacles))

    def _silent(self, party: _Party) -> Obstacle:
        host = party.host.host
        why = party.problem or "it has no address but those of its loopback interface: state one with address="
        return Obstacle("the others", host, "", 0, why)

    async def _round(self, addresses: Mapping[int, Sequence[str]]) -> None:
        single = {network_of(dialer) for party in self._parties for dialer in party.host.only_from.values()}
        of_all = self._dials(addresses, None)
        dials = {party.index: of_all for party in self._parties}
        for party in self._parties if single else ():
            network = network_of(party.host.connection)
            if network in single:
                dials[party.index] = self._dials(addresses, network)
        for index, several in addresses.items():
            self._tried[index] += several
        await asyncio.gather(*(party.dial(dials[party.index]) for party in self._parties))
        for party in self._parties:
            self._take_note(party, dials[party.index])

    def _dials(self, addresses: Mapping[int, Sequence[str]], dialer: Hashable) -> list[list[Any]]:
        """Return what a host dials that must reach what all must reach, and what the one of a network must."""
        found: list[list[Any]] = []
        for index, several in addresses.items():
            host = self._parties[index].host
            by_others = {port for port, one in host.only_from.items() if network_of(one) != dialer}
            ports, running = ([port for port in some if port not in by_others] for some in (host.ports, host.running))
            if ports or running:
                found += [[index, address, ports, running] for address in several]
        return found

    def _take_note(self, party: _Party, dials: Iterable[Sequence[Any]]) -> None:
        if party.problem:
            for index, address, ports, running in dials:
                if index != party.index:
                    self._add(party, index, address, next(iter([*ports, *running]), 0), party.problem)
        for index, address, port, why in party.failed:
            if 0 <= index < len(self._parties):
                self._add(party, index, address, port, self._words(party, why))
        for index, address, known_as in party.translated:
            if not 0 <= index < len(self._parties):
                continue
            # A host must not say where another one listens: on all of its addresses, say.
            if known_as in self._parties[index].own:
                self._bind[index, address] = known_as
            else:
                port = next(iter(self._parties[index].host.ports), 0)
                why = f"it is known there as {known_as!r:.60}, which is none of its addresses"
                self._add(party, index, address, port, why)

    def _add(self, party: _Party, index: int, address: str, port: int, why: str) -> None:
        target = self._parties[index].host.host
        obstacles = self._obstacles.setdefault((index, address), [])
        if not any((one.source, one.why) == (party.host.host, why) for one in obstacles[-_PORTS_OF_ONE:]):
            obstacles.append(Obstacle(party.host.host, target, address, port, why))  # one port of a pair says enough

    def _words(self, party: _Party, why: str) -> str:
        if why == "own":
            return f"{party.host.host} has that address, too"
        number = why.removeprefix("host ")
        if number != why and number.isdecimal() and int(number) < len(self._parties):
            return f"{self._parties[int(number)].host.host} answers there"
        return _WHY.get(why, why)

    def _best(self, party: _Party) -> tuple[str, list[Obstacle]]:
        """Return the address of a host that is reached by the most, and why others do not reach it there."""
        several = self._tried[party.index]
        best = min(several, key=lambda address: len(self._obstacles.get((party.index, address), [])))
        return best, self._obstacles.get((party.index, best), [])


async def _other_addresses(party: _Party, slots: asyncio.Semaphore) -> list[str]:
    """Return the addresses of a host that were not tried first; that by which ssh knows it may be none of its own."""
    if party.host.address is not None:
        return []
    async with slots:
        by_ssh = await _ssh_addresses(party.host)
    return [*party.addresses[1:], *(one for one in by_ssh if one not in party.addresses)]


async def _ssh_addresses(host: ProbedHost) -> list[str]:
    if not isinstance(host.connection, SshConnection):
        return []
    way = await resolve(host.connection.settings)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(way.get("hostname", host.host), None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(checked_address(str(one[4][0]), host.host) for one in found))
    except (OSError, ValueError):
        return []
