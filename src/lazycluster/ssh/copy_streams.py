"""The streams that copies use, one set per connection: each is a session of its own, kept for the next copy."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from lazycluster.agent.stream import StreamClosedError
from lazycluster.exceptions import LazyclusterError

#: Copies at once on one connection: more do not make it faster, and sshd limits its sessions.
AT_ONCE = 2

#: How long sshd may take to let go of a session that has ended, in seconds.
_LETTING_GO = 3.0


class SessionError(StreamClosedError):
    """A further session on a host did not start what it was to start.

    Attributes:
        detail: Why.
        hint: The next step, if one is known.
    """

    def __init__(self, detail: str, hint: str = "") -> None:
        self.detail = detail
        self.hint = hint
        super().__init__(detail)


class HostConnection(Protocol):
    """What a copy needs of a connection."""

    host: str
    interruptions: int
    at_close: list[Callable[[], Any]]
    on_lost: list[Callable[[str], Any]]

    @property
    def state(self) -> str:
        """``open``, or ``interrupted`` while the link is silent or down."""

    def check(self) -> None:
        """Raise an error if the connection cannot be used."""

    async def answering(self) -> None:
        """Wait until the host answers, over a link that may have to come back first."""

    async def bulk(self) -> socket.socket:
        """Return a stream to a new process on the host that copies files."""

    def problem_since(self, moment: float) -> str:
        """Return what the agent said of something that went wrong since then, in the loop's time; "" if nothing."""


class StreamPool:
    """The streams of one connection that wait for the next copy."""

    def __init__(self, connection: HostConnection) -> None:
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._opening = asyncio.Lock()
        self._returned = asyncio.Event()
        self._last_closed = -_LETTING_GO
        self.slots = asyncio.Semaphore(AT_ONCE)
        connection.at_close.append(self.close)
        connection.on_lost.append(lambda _: self.close())

    async def take(self, connection: HostConnection) -> tuple[socket.socket, bool]:
        """Return a stream, and whether it has been used before."""
        # One at a time: so who is refused knows whether another copy here has what could be waited for.
        async with self._opening:
            while True:
                sock = self._take_idle()
                if sock is not None:
                    return sock, True
                try:
                    sock = await connection.bulk()
                except LazyclusterError:
                    connection.check()
                    if not await self._session_may_come():
                        raise
                else:
                    self._busy.add(sock)
                    return sock, False

    def _take_idle(self) -> socket.socket | None:
        while self._idle:
            sock = self._idle.pop()
            # It says nothing while it is idle: what can be read is its end.
            waiting = select.poll()
            waiting.register(sock, select.POLLIN)
            if not waiting.poll(0):
                self._busy.add(sock)
                return sock
            sock.close()
            self._last_closed = time.monotonic()
        return None

    async def _session_may_come(self) -> bool:
        """Wait while the host may still grant one though it has just refused it; return whether it may."""
        if self._busy:
            # It allows fewer sessions than we would like.
            self._returned.clear()
            await self._returned.wait()
            return True
        if time.monotonic() - self._last_closed < _LETTING_GO:
            # It may not have noticed yet that one has ended, and does not say when it has.
            await asyncio.sleep(0.05)
            return True
        return False

    def give_back(self, sock: socket.socket, usable: bool) -> None:
        """Keep a stream for the next copy, or close it."""
        if sock in self._busy and usable:
            self._idle.append(sock)
        else:
            sock.close()
            self._last_closed = time.monotonic()
        self._busy.discard(sock)
        self._returned.set()

    def close(self) -> None:
        """Close the idle streams; those in use end, and are closed by who uses them."""
        while self._idle:
            self._idle.pop().close()
        for sock in self._busy:
            hang_up(sock)
        self._busy.clear()
        self._returned.set()


def hang_up(sock: socket.socket) -> None:
    """End a stream that a thread may be using; the descriptor stays."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
