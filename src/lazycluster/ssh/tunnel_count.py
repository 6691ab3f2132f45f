"""How many tunnels each connection has. Its agent is told, so that it can be seen on the host, by whoever looks."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Awaitable, Callable

from lazycluster.exceptions import LazyclusterError

from .connection import Connection

__all__ = ["count"]

_tallies: weakref.WeakKeyDictionary[Connection, _Tally] = weakref.WeakKeyDictionary()


class _Tally:
    """The number of one connection, and who tells it."""

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


def count(connection: Connection, change: int) -> None:
    """Take note of tunnels that are opened or closed; the host is told in a moment, of many at once.

    Args:
        connection: What they go through.
        change: How many there are more than before.
    """
    if connection.local:
        return
    tally = _tallies.get(connection)
    if tally is None:
        tally = _tallies[connection] = _Tally()
        connection.on_renewal.append(_again(weakref.ref(connection), tally))
    tally.number += change
    if tally.telling is None and connection.state in ("open", "interrupted"):
        tally.telling = asyncio.ensure_future(tally.tell(connection))


def _again(reference: weakref.ref[Connection], tally: _Tally) -> Callable[[], Awaitable[None]]:
    async def tell() -> None:
        connection = reference()
        if connection is not None:
            await tally.tell(connection)

    return tell
