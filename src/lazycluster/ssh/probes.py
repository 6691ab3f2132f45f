"""What the network of a host allows, found out by trying, once per connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import weakref
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any

from lazycluster.exceptions import TunnelError

from .connection import Connection
from .mux import LOOPBACK, Mux, MuxError

__all__ = ["can_connect", "mux_of", "reaches", "same_network"]

_TIMEOUT = 10.0
_DIRECT_TIMEOUT = 1.0  # whatever else listens on that port of the manager may stay silent

_Cache = MutableMapping[Connection, "asyncio.Task[bool]"]
_shared: _Cache = weakref.WeakKeyDictionary()
_connects: _Cache = weakref.WeakKeyDictionary()


def mux_of(connection: Connection) -> Mux:
    """Return the control socket of a connection's ssh process."""
    mux = getattr(connection, "mux", None)
    if not isinstance(mux, Mux):
        raise TunnelError(f"{connection.host}: is not connected through ssh")
    return mux


async def same_network(connection: Connection) -> bool:
    """Whether the host's loopback is the manager's own, so that a port is the same port on both.

    A secret on a listener tells: hostnames and boot ids are alike in containers that have a network each.
    """
    if connection.local:
        return True
    return await _once(_shared, connection, _is_same_network)


async def can_connect(connection: Connection) -> bool:
    """Whether the host's sshd carries connections to ports of the host.

    Where it does not, a forwarding listens on the manager nevertheless, and its connections just end.
    """
    if connection.local:
        return True
    return await _once(_connects, connection, _carries)


async def reaches(connection: Connection, port: int) -> bool:
    """Whether the host's sshd connects to one port, on which something listens."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            session = await mux_of(connection).connect(port, theirs.fileno(), theirs.fileno())
        except MuxError:
            return False
        session.close()
        return True


async def _once(
    cache: _Cache, connection: Connection, probe: Callable[[Connection], Coroutine[Any, Any, bool]]
) -> bool:
    task = cache.get(connection)
    if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
        task = cache[connection] = asyncio.ensure_future(probe(connection))
    return await asyncio.shield(task)


async def _is_same_network(connection: Connection) -> bool:
    answer = await connection.request("nonce")
    expected = answer["nonce"].encode()
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        reader, writer = await asyncio.wait_for(asyncio.open_connection(LOOPBACK, answer["port"]), _DIRECT_TIMEOUT)
        return bool(await _read(reader, writer, len(expected), _DIRECT_TIMEOUT) == expected)
    return False


async def _carries(connection: Connection) -> bool:
    answer = await connection.request("nonce")
    expected = answer["nonce"].encode()
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            session = await mux_of(connection).connect(answer["port"], theirs.fileno(), theirs.fileno())
    except MuxError as error:
        ours.close()
        if error.refused:
            return False
        raise
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        return bool(await _read(reader, writer, len(expected), _TIMEOUT) == expected)
    finally:
        session.close()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, timeout: float) -> bytes:
    try:
        return await asyncio.wait_for(reader.readexactly(size), timeout)
    except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
        return b""
    finally:
        writer.close()
