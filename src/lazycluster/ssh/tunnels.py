"""Tunnels: a port of the manager that can be reached on a host, or the other way round.

The bytes are moved by the one ssh process of the host, on the manager's own machine by the event loop. What listens,
listens on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import weakref
from collections.abc import Sequence

from lazycluster.core import event_loop, forks
from lazycluster.exceptions import (
    ForwardingForbiddenError,
    LazyclusterError,
    PortInUseError,
    TunnelError,
)

from . import agent_relay
from .connection import Connection
from .mux import LOOPBACK, MuxError
from .probes import can_connect, reaches, same_network
from .tunnel_handles import MANAGER, Outcome, Tunnel, TunnelRequest, check_port, close_tunnels

__all__ = [
    "Tunnel",
    "TunnelRequest",
    "check_port",
    "close_tunnels",
    "open_tunnels",
]

_CHUNK = 256 * 1024  # bytes
_RETURN_LIMIT = 30.0  # seconds for a link that is interrupted when a tunnel is wanted

# Connections whose sshd listens on loopback only, with the number of interruptions when that was found out.
_loopback_only: weakref.WeakKeyDictionary[Connection, int] = weakref.WeakKeyDictionary()


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
        asyncio.ensure_future(_open_on(connection, [requests[index] for index in indexes]))
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


# --- on one connection ----------------------------------------------------------------------------
async def _open_on(connection: Connection, requests: list[TunnelRequest]) -> list[Outcome]:
    """Open tunnels of one connection; none stays open if this is cancelled.

    Args:
        connection: The connection.
        requests: What is wanted of it.

    Returns:
        For each the tunnel, or why there is none.
    """
    outcomes: dict[int, Outcome] = {}
    try:
        await connection.wait_until_open(_RETURN_LIMIT)
        alike = any(request.is_alike for request in requests)
        shared = connection.local or (alike and await same_network(connection))
        for index, request in enumerate(requests):
            if shared and request.is_alike:
                outcomes[index] = Tunnel(request, None, by_ssh=False)
            elif connection.local:
                outcomes[index] = await _relay_here(request)
        if len(outcomes) < len(requests):
            await _forward(connection, requests, outcomes)
            await _forward_by_agent(connection, requests, outcomes)
    except BaseException as error:
        await close_tunnels(outcome for outcome in outcomes.values() if isinstance(outcome, Tunnel))
        if isinstance(error, LazyclusterError):
            return [error] * len(requests)
        raise
    return [outcomes[index] for index in range(len(requests))]


async def _relay_here(request: TunnelRequest) -> Outcome:
    forward = request.forward
    relay = _LocalRelay(forward.connect_host, forward.connect_port)
    try:
        await relay.listen(forward.listen_port)
    except OSError as error:
        return _not_here(forward.listen_port, error)
    request.connection.at_close.append(relay.stop)
    return Tunnel(request, relay.close, by_ssh=False)


async def _forward(connection: Connection, requests: list[TunnelRequest], outcomes: dict[int, Outcome]) -> None:
    """Have ssh forward those ports that have no outcome yet."""
    await _check_remote(connection, requests, outcomes)
    await _check_local(connection, requests, outcomes)
    rest = [index for index in range(len(requests)) if index not in outcomes]
    if not rest:
        return
    results = await connection.mux.open_forwards([requests[index].forward for index in rest])
    refused = []
    for index, result in zip(rest, results, strict=True):
        if isinstance(result, MuxError):
            refused.append((index, result))
        else:
            outcomes[index] = Tunnel(requests[index], None, by_ssh=True)
    for index, error in refused:
        outcomes[index] = await _refused(requests[index], error)
    await _check_exposed(connection, outcomes)


async def _forward_by_agent(
    connection: Connection, requests: list[TunnelRequest], outcomes: dict[int, Outcome]
) -> None:
    """Have the agent carry what the host's sshd forbids, if the user asked for that."""
    forbidden = [index for index, outcome in outcomes.items() if isinstance(outcome, ForwardingForbiddenError)]
    if not forbidden or not agent_relay.is_asked_for(connection):
        return
    relay = agent_relay.relay_of(connection)
    opening = {index: asyncio.ensure_future(relay.open(requests[index])) for index in forbidden}
    try:
        await event_loop.together(list(opening.values()))
    finally:
        outcomes.update({index: event_loop.outcome(task, outcomes[index]) for index, task in opening.items()})


async def _check_remote(connection: Connection, requests: list[TunnelRequest], outcomes: dict[int, Outcome]) -> None:
    """Ask the host for the ports: its sshd does not say why it refuses one."""
    listening = {
        index: request.remote_port
        for index, request in enumerate(requests)
        if index not in outcomes and request.kind == "to_runtime" and not request.known_free
    }
    if not listening:
        return
    answer = await connection.request("ports", ports=sorted(set(listening.values())))
    free, denied = set(answer["free"]), set(answer.get("denied", ()))
    for index, port in listening.items():
        if port in denied:
            outcomes[index] = _privileged(port, connection.host)
        elif port not in free:
            outcomes[index] = PortInUseError(port, connection.host)


async def _check_local(connection: Connection, requests: list[TunnelRequest], outcomes: dict[int, Outcome]) -> None:
    """Find out whether the host's sshd carries connections: a forwarding that it forbids listens nevertheless."""
    wanted = [i for i, request in enumerate(requests) if i not in outcomes and request.kind == "from_runtime"]
    if not wanted or await can_connect(connection):
        return
    for index in wanted:
        port = requests[index].remote_port
        if not await reaches(connection, port, requests[index].host):  # PermitOpen may allow this very port
            outcomes[index] = ForwardingForbiddenError(
                connection.host,
                f"port {port} cannot be exposed from the host, its sshd refuses to connect to it: AllowTcpForwarding, "
                "PermitOpen or DisableForwarding in its sshd_config (or an option of your key in authorized_keys) must "
                "allow it",
            )


async def _check_exposed(connection: Connection, outcomes: dict[int, Outcome]) -> None:
    """Close what the host's sshd opened to its whole network, whatever address it was asked for."""
    listening = {
        outcome.remote_port: index
        for index, outcome in outcomes.items()
        if isinstance(outcome, Tunnel) and outcome.by_ssh and outcome.direction == "to_runtime"
    }
    # An sshd reads its configuration once per ssh process.
    if not listening or _loopback_only.get(connection) == connection.interruptions:
        return
    began = connection.interruptions
    answer = await connection.request("exposed", ports=list(listening))
    exposed = set(answer["exposed"]).intersection(listening)
    if not exposed:
        _loopback_only[connection] = began
    await close_tunnels(tunnel for port in exposed if isinstance(tunnel := outcomes[listening[port]], Tunnel))
    for port in exposed:
        outcomes[listening[port]] = ForwardingForbiddenError(
            connection.host,
            f"port {port} would be open to the host's whole network, and was closed again: its sshd makes every "
            "forwarded port public; GatewayPorts in its sshd_config must be no (the default) or clientspecified",
        )


async def _refused(request: TunnelRequest, error: MuxError) -> LazyclusterError:
    connection = request.connection
    if not error.refused:
        return TunnelError(f"{connection.host}: {error}")
    if request.kind == "from_runtime":
        return _why_not_here(request.local_port, error)
    port = request.remote_port
    if port not in (await connection.request("ports", ports=[port]))["free"]:
        return PortInUseError(port, connection.host)
    return ForwardingForbiddenError(
        connection.host,
        f"port {port} is free there, but its sshd refuses to listen on it: AllowTcpForwarding, PermitListen or "
        "DisableForwarding in its sshd_config (or an option of your key in authorized_keys) must allow it",
    )


def _why_not_here(port: int, error: MuxError) -> LazyclusterError:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
    except OSError as why:
        return _not_here(port, why)
    return TunnelError(f"ssh does not listen on port {port} of the manager: {error}")


def _not_here(port: int, error: OSError) -> LazyclusterError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(port, MANAGER)
    if error.errno in (errno.EACCES, errno.EPERM):
        return _privileged(port, MANAGER)
    return TunnelError(f"nothing can listen on port {port} of the manager: {error}")


def _privileged(port: int, host: str) -> TunnelError:
    return TunnelError(f"port {port} is privileged on {host}: use one above 1023")


# --- without ssh ----------------------------------------------------------------------------------
class _LocalRelay:
    """Carries connections to one loopback port on to another address, within the event loop."""

    def __init__(self, connect_host: str, connect_port: int) -> None:
        self._end = connect_host, connect_port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self, port: int) -> None:
        """Begin to listen; raises OSError if that is not possible."""
        self._server = await asyncio.start_server(self._carry, LOOPBACK, port)
        forks.close_in_children(*(listener.fileno() for listener in self._server.sockets))

    def stop(self) -> None:
        """Stop listening, and begin to end the connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._connections:
            connection.cancel()

    async def close(self) -> None:
        """Stop listening, and end the connections."""
        connections = list(self._connections)
        self.stop()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        forks.close_in_children(_fd(writer))
        other: asyncio.StreamWriter | None = None
        try:
            answers, other = await asyncio.open_connection(*self._end)
            forks.close_in_children(_fd(other))
            await asyncio.gather(_pump(reader, other), _pump(answers, writer))
        except OSError:
            pass  # either end has gone: the other sees its connection end, as with ssh
        except asyncio.CancelledError:
            pass  # by close(), which waits for the end
        finally:
            self._connections.discard(task)
            writer.close()
            if other is not None:
                other.close()


def _fd(writer: asyncio.StreamWriter) -> int:
    return int(writer.get_extra_info("socket").fileno())


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
