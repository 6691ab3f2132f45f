"""Probes of what the network of a host allows, made once per connection."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import weakref
from collections.abc import Callable, Coroutine, Hashable, MutableMapping
from typing import Any

from .connection import Connection
from .mux import LOOPBACK, MuxError

__all__ = ["can_connect", "network_of", "reaches", "same_network"]

_TIMEOUT = 10.0
_DIRECT_TIMEOUT = 1.0  # whatever else listens on that port of the manager may stay silent

_Answer = Coroutine[Any, Any, bool]
_Cache = MutableMapping[Connection, "asyncio.Task[bool]"]
_shared: _Cache = weakref.WeakKeyDictionary()
_connects: _Cache = weakref.WeakKeyDictionary()


def network_of(connection: Connection) -> Hashable:
    """Return what is equal for two connections that lead into one network: two names of one machine."""
    info = connection.agent_info
    # Containers of one machine share its boot id, but each has a network with a number of its own.
    return (info.boot_id, info.network) if info.boot_id and info.network else id(connection)


async def same_network(connection: Connection) -> bool:
    """Return whether the host's loopback is the manager's own, so that a port is the same port on both.

    A secret on a listener tells: hostnames and boot ids are alike in containers that have a network each.
    """
    if connection.local:
        return True
    return await _once(_shared, connection, _is_same_network)


async def can_connect(connection: Connection) -> bool:
    """Return whether the host's sshd carries connections to ports of the host.

    Where it does not, a forwarding listens on the manager nevertheless, and its connections just end.
    """
    if connection.local:
        return True
    return await _once(_connects, connection, _carries)


async def reaches(connection: Connection, port: int, host: str = LOOPBACK) -> bool:
    """Return whether the host's sshd connects to one port, on which something listens."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            session = await connection.mux.connect(port, theirs.fileno(), theirs.fileno(), host)
        except MuxError:
            return False
        session.close()
        return True


async def _once(cache: _Cache, connection: Connection, probe: Callable[[Connection], _Answer]) -> bool:
    task = cache.get(connection)
    if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
        task = cache[connection] = asyncio.ensure_future(probe(connection))
    return await asyncio.shield(task)


async def _is_same_network(connection: Connection) -> bool:
    answer = await connection.request("nonce")
    port, expected = answer["port"], answer["nonce"].encode()
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        reader, writer = await asyncio.wait_for(asyncio.open_connection(LOOPBACK, port), _DIRECT_TIMEOUT)
        if secrets.compare_digest(await _read(reader, writer, len(expected), _DIRECT_TIMEOUT), expected):
            return True
    if connection not in _connects:
        # The listener on the host is still there, and goes when it has been connected to.
        _connects[connection] = asyncio.ensure_future(_delivers(connection, port, expected))
        await asyncio.wait([_connects[connection]])
    return False


async def _carries(connection: Connection) -> bool:
    answer = await connection.request("nonce")
    return await _delivers(connection, answer["port"], answer["nonce"].encode())


async def _delivers(connection: Connection, port: int, expected: bytes) -> bool:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            session = await connection.mux.connect(port, theirs.fileno(), theirs.fileno())
    except MuxError as error:
        ours.close()
        if error.refused:
            return False
        raise
    except BaseException:
        ours.close()
        raise
    try:
        reader, writer = await asyncio.open_connection(sock=ours)
        return secrets.compare_digest(await _read(reader, writer, len(expected), _TIMEOUT), expected)
    finally:
        session.close()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, timeout: float) -> bytes:
    try:
        return await asyncio.wait_for(reader.readexactly(size), timeout)
    except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
        return b""
    finally:
        writer.close()
