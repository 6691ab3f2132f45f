"""Limits on connections of those who have not shown who they are: on this machine everybody can open some."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from distributed.comm.tcp import TLSListener
from tornado.iostream import IOStream

from ....cluster.sent import auth_limit

_MOST_FILES = 1 << 16  # descriptors; distributed's own programs take half of what the system allows
# Where unauthenticated clients cause log lines: failed handshakes, unknown pages, connections that cannot be accepted.
_LOGGERS = ("distributed.comm.tcp", "tornado.general", "tornado.access", "tornado.application", "asyncio")
_SWEEP_EVERY = 1.0


class HandshakeLimit:
    """The connections to one kind of listener that have not shown who they are: those that do not in time are ended."""

    def __init__(self) -> None:
        room = auth_limit.room_for_connections(_MOST_FILES)
        self._pending: auth_limit.AuthLimit[IOStream] = auth_limit.AuthLimit(time.monotonic, IOStream.close, room)
        self._sweeping = False

    def came(self, stream: IOStream) -> None:
        """Note a new connection."""
        self._pending.came(stream)
        if not self._sweeping:
            self._sweeping = True
            self._sweep_later()

    def known(self, stream: Any) -> None:
        """Note that one has shown who it is, or has ended."""
        self._pending.gone(stream)

    def _sweep_later(self) -> None:
        asyncio.get_running_loop().call_later(_SWEEP_EVERY, self._sweep)

    def _sweep(self) -> None:
        self._pending.sweep()
        self._sweeping = bool(self._pending)
        if self._sweeping:
            self._sweep_later()


_limit: HandshakeLimit | None = None
_prepare = TLSListener._prepare_stream


def limit_unauthenticated() -> None:
    """Limit connections to this process before their handshake is over, and what is logged of them."""
    global _limit
    _limit = HandshakeLimit()
    auth_limit.limit_lines(*_LOGGERS)
    TLSListener._prepare_stream = _prepare_stream


async def _prepare_stream(self: TLSListener, stream: IOStream, address: str) -> Any:
    """Wait for the end of the handshake, in which the other side shows a certificate of the cluster."""
    assert _limit is not None
    _limit.came(stream)
    try:
        return await _prepare(self, stream, address)
    finally:
        _limit.known(stream)
