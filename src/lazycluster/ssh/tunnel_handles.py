"""Handles of tunnels: the request, the open tunnel, and closing it."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from lazycluster.core import event_loop, interruptible
from lazycluster.exceptions import LazyclusterError

from .connection import Connection
from .mux import LOOPBACK, Direction, Forward
from .probes import network_of

__all__ = ["MANAGER", "Outcome", "Tunnel", "TunnelRequest", "check_port", "close_tunnels"]

MANAGER = "localhost"
_ANSWER_LIMIT = 20.0
Kind = Literal["to_runtime", "from_runtime"]


def check_port(port: object, what: str = "port") -> int:
    """Return a port if it is one.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is not between 1 and 65535.
    """
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"{what} must be an integer, not {type(port).__name__} ({port!r})")
    if not 0 < port < 65536:
        raise ValueError(f"{what} must be from 1 to 65535, not {port}")
    return port


@dataclass(frozen=True)
class TunnelRequest:
    """A tunnel that is wanted.

    Attributes:
        connection: The connection to the host.
        kind: ``to_runtime``: the manager's ``local_port`` can be reached on the host at ``remote_port``;
            ``from_runtime``: the host's ``remote_port`` can be reached on the manager at ``local_port``.
        local_port: A port of the manager.
        remote_port: A port of the host.
        known_free: The host was asked for its port a moment ago, and need not be asked again.
        host: The address of the host at which its ``remote_port`` listens, where it is reached on the manager.
    """

    connection: Connection
    kind: Kind
    local_port: int
    remote_port: int
    known_free: bool = False
    host: str = LOOPBACK

    @property
    def forward(self) -> Forward:
        """The forwarding that ssh is asked for."""
        if self.kind == "to_runtime":
            return Forward(Direction.REMOTE, self.remote_port, self.local_port)
        return Forward(Direction.LOCAL, self.local_port, self.remote_port, connect_host=self.host)

    @property
    def is_alike(self) -> bool:
        """True if both ends have one address and port, as each host knows its own."""
        return self.local_port == self.remote_port and self.host == LOOPBACK


class Tunnel:
    """An open tunnel. Closing it, or the connection, ends it; ``with`` closes it at the end of the block.

    Attributes:
        host: The host at the other end.
        direction: ``to_runtime`` if it listens on the host, ``from_runtime`` if it listens on the manager.
        local_port: The manager's port.
        remote_port: The host's port.
        request: What was wanted.
        by_ssh: The host's ssh process carries it.
        on_lost: Called with the tunnel when its port cannot be had again, after the link to the host dropped.
    """

    def __init__(self, request: TunnelRequest, undo: Callable[[], Awaitable[None]] | None, *, by_ssh: bool) -> None:
        self.host = request.connection.host
        self.direction: Kind = request.kind
        self.local_port = request.local_port
        self.remote_port = request.remote_port
        self.request = request
        self.on_lost: list[Callable[[Tunnel], object]] = []
        self._undo = undo
        self.by_ssh = by_ssh
        self._closed = False
        self._over = interruptible.Event()
        self._counts = by_ssh or undo is not None  # else no bytes are carried: both ends are one machine
        if self._counts:
            _count(request.connection, 1)
        if by_ssh:
            request.connection.on_port_lost.append(self._lost)

    @property
    def is_open(self) -> bool:
        """True while it carries connections, or will do so again when the link to the host is back."""
        return not self._closed and self.request.connection.state in ("open", "interrupted")

    @property
    def network(self) -> Hashable:
        """Identity of the machine at the other end: equal for two tunnels to one machine."""
        return network_of(self.request.connection)

    def gone(self) -> None:
        """Note that what carried it has ended."""
        with contextlib.suppress(ValueError):
            self.request.connection.on_port_lost.remove(self._lost)
        if self._counts and not self._closed:
            _count(self.request.connection, -1)
        self._closed = True
        self._over.set()

    def lost(self) -> None:
        """Note that its port cannot be had again."""
        told = [] if self._closed else list(self.on_lost)
        self.gone()
        for tell in told:
            tell(self)

    def _lost(self, forward: Forward) -> None:
        if forward.key == self.request.forward.key:
            self.lost()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is closed, or its connection is; returns whether it is.

        Args:
            timeout: Seconds; None: as long as it takes.
        """
        forget = self.request.connection.on_state(lambda *_: None if self.is_open else self._over.set())
        try:
            return not self.is_open or self._over.wait(timeout)
        finally:
            forget()

    def close(self) -> None:
        """Stop listening. Doing it again does nothing."""
        if not self._closed:
            event_loop.run(self.aclose())

    async def aclose(self) -> None:
        """Stop listening; for the event loop's thread."""
        await close_tunnels([self])

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self.is_open else "closed"
        arrow = "->" if self.direction == "from_runtime" else "<-"
        return f"<Tunnel {MANAGER}:{self.local_port} {arrow} {self.host}:{self.remote_port} {state}>"


Outcome = Tunnel | LazyclusterError


async def close_tunnels(tunnels: Iterable[Tunnel]) -> None:
    """Close tunnels, those of a connection at once."""
    per_connection: dict[Connection, list[Forward]] = {}
    others: list[Awaitable[None]] = []
    for tunnel in tunnels:
        if tunnel._closed:
            continue
        tunnel.gone()
        if tunnel.by_ssh and tunnel.request.connection.state in ("open", "interrupted"):
            per_connection.setdefault(tunnel.request.connection, []).append(tunnel.request.forward)
        if tunnel._undo is not None:
            others.append(tunnel._undo())
    closing = [_close_on(connection, forwards) for connection, forwards in per_connection.items()]
    await asyncio.gather(*closing, *others)


async def _close_on(connection: Connection, forwards: list[Forward]) -> None:
    with contextlib.suppress(LazyclusterError):  # a connection that has ended took its tunnels along
        if connection.state == "interrupted":
            connection.forget_forwards(forwards)
            return
        await connection.mux.close_forwards(forwards)
        if connection.answers and any(forward.direction is Direction.REMOTE for forward in forwards):
            # ssh says "ok" when it has asked the host, without waiting. The host's sshd takes things in order: once
            # the agent behind it has answered, the listeners are closed.
            await connection.wait_while_heard(asyncio.ensure_future(connection.request("ping")), _ANSWER_LIMIT)


_counts: weakref.WeakKeyDictionary[Connection, _TunnelCount] = weakref.WeakKeyDictionary()


class _TunnelCount:
    """Number of tunnels of one connection, which its agent is told: so it can be seen on the host by whoever looks."""

    def __init__(self) -> None:
        self.number = 0
        self.telling: asyncio.Task[None] | None = None

    async def tell(self, connection: Connection) -> None:
        told = -1
        with contextlib.suppress(LazyclusterError):  # with the connection the tunnels have gone
            while told != self.number:
                told = self.number
                await connection.request("tunnels", count=told)
        self.telling = None


def _count(connection: Connection, change: int) -> None:
    """Take note of tunnels that are opened or closed; the host is told in a moment, of many at once.

    Args:
        connection: What they go through.
        change: How many there are more than before.
    """
    if connection.local:
        return
    counted = _counts.get(connection)
    if counted is None:
        counted = _counts[connection] = _TunnelCount()
        connection.on_renewal.append(_after_renewal(weakref.ref(connection), counted))
    counted.number += change
    if counted.telling is None and connection.state in ("open", "interrupted"):
        counted.telling = asyncio.ensure_future(counted.tell(connection))


def _after_renewal(reference: weakref.ref[Connection], counted: _TunnelCount) -> Callable[[], Awaitable[None]]:
    async def tell() -> None:
        connection = reference()
        if connection is not None:
            await counted.tell(connection)

    return tell
