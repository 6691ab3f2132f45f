"""Tunnels that the agent carries, for hosts whose sshd forbids to forward ports; only where that is asked for.

The bytes go over one further session of the host's ssh connection, whatever the number of tunnels, between two
processes that `agent/relay.py` describes: one on the host, one beside the keeper. None of them passes through the
manager's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import weakref
from collections.abc import Awaitable
from typing import Any, TypeVar

from lazycluster.core.words import counted
from lazycluster.exceptions import LazyclusterError, PortInUseError, TunnelError

from . import workspace
from .agent_program import bulk_command, new_marker
from .channel import Channel
from .connection import Connection
from .extra_sessions import SessionError, open_session
from .local_connection import hand_over
from .mux import MuxError
from .tunnel_handles import MANAGER, Outcome, Tunnel, TunnelRequest

__all__ = ["is_asked_for", "relay_of"]

T = TypeVar("T")

logger = logging.getLogger("lazycluster")

_START_LIMIT = 20.0
_ANSWER_LIMIT = 20.0
_ATTEMPTS = 3  # to bring it up again after it has ended
_PAUSE = 0.5  # seconds between them: sshd takes a moment to let go of a session that has ended

_relays: weakref.WeakKeyDictionary[Connection, AgentRelay] = weakref.WeakKeyDictionary()


def is_asked_for(connection: Connection) -> bool:
    """Return whether the agent may carry the tunnels of a connection."""
    settings = getattr(connection, "settings", None)
    return getattr(settings, "relay", None) == "agent"


def relay_of(connection: Connection) -> AgentRelay:
    """Return what carries the tunnels of a connection; it is started with the first of them."""
    relay = _relays.get(connection)
    if relay is None:
        relay = _relays[connection] = AgentRelay(connection)
    return relay


class _RelayEnd:
    """The process at one end, as the manager knows it."""

    def __init__(self, connection: Connection, first: bool) -> None:
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        loop = asyncio.get_running_loop()
        self.socket: asyncio.Future[str] = loop.create_future()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.host = connection.host
        self.channel: Channel = connection.channel("relay", {"first": first}, event=self._on_event)
        self.ended: asyncio.Future[Any] = asyncio.ensure_future(self.channel.result())
        self.ended.add_done_callback(self._over)

    def _on_event(self, event: dict[str, Any]) -> None:
        if "socket" in event:
            self.socket.set_result(str(event["socket"]))
        elif "ready" in event:
            self.ready.set_result(None)
        elif "done" in event and (waiting := self._waiting.pop(event["done"], None)) and not waiting.done():
            waiting.set_result(event)

    def _over(self, ended: asyncio.Future[Any]) -> None:
        cause = None if ended.cancelled() else ended.exception()
        error = TunnelError(f"{self.host}: the relay through the agent has ended" + (f": {cause}" if cause else ""))
        futures: list[asyncio.Future[Any]] = [self.socket, self.ready, *self._waiting.values()]
        for future in futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # that nobody waits for it is no error
        self._waiting.clear()

    async def ask(self, tunnel: int, **message: Any) -> dict[str, Any]:
        """Have it do something for a tunnel."""
        if self.ended.done():
            raise TunnelError(f"{self.host}: the relay through the agent has ended")
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[tunnel] = answer
        self.channel.control(**message)
        return await _within(_ANSWER_LIMIT, answer, f"{self.host}: the relay through the agent does not answer")

    def close(self) -> None:
        """End the process."""
        self.channel.close()


class AgentRelay:
    """The tunnels of one connection that go through its agent. For the event loop's thread only."""

    def __init__(self, connection: Connection) -> None:
        # It must not keep the connection alive, whose place in `_relays` goes with it.
        self._connection = weakref.ref(connection)
        self._host = connection.host
        self._numbers = itertools.count(1)
        self._tunnels: dict[int, Tunnel] = {}
        self._ends: tuple[_RelayEnd, _RelayEnd] | None = None  # here, and on the host
        self._session: asyncio.Task[int] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._stopped = False
        connection.at_close.append(self.stop)

    # --- tunnels -------------------------------------------------------------------------------
    async def open(self, request: TunnelRequest) -> Outcome:
        """Return a tunnel, or why there is none."""
        number = next(self._numbers)
        try:
            await self._ensure_running()
            await self._carry(number, request)
        except LazyclusterError as error:
            return error
        except asyncio.CancelledError:
            await self._close(number)
            raise
        tunnel = Tunnel(request, lambda: self._close(number), by_ssh=False)
        self._tunnels[number] = tunnel
        return tunnel

    async def _carry(self, number: int, request: TunnelRequest) -> None:
        assert self._ends is not None
        here, there = self._ends
        if request.kind == "to_runtime":
            listener, target, port, to, host = there, here, request.remote_port, request.local_port, self._host
        else:
            listener, target, port, to, host = here, there, request.local_port, request.remote_port, MANAGER
        await target.ask(number, target=number, port=to)
        answer = await listener.ask(number, listen=number, port=port)
        if "errno" in answer:
            with contextlib.suppress(TunnelError):
                await target.ask(number, close=number)
            if answer["errno"] == errno.EADDRINUSE:
                raise PortInUseError(port, host)
            raise TunnelError(f"{host}: nothing can listen on port {port}: {answer.get('message')}")

    async def _close(self, number: int) -> None:
        self._tunnels.pop(number, None)
        for end in self._ends or ():
            with contextlib.suppress(LazyclusterError):
                await end.ask(number, close=number)

    # --- the two processes ---------------------------------------------------------------------
    async def _ensure_running(self) -> None:
        """Start the relay unless it runs."""
        if self._stopped:
            raise TunnelError(f"{self._host}: the connection was closed")
        if self._restarting is not None:
            await self._shared(self._restarting)
        if self._ends is not None:
            return
        if self._starting is None or self._starting.done():
            self._starting = asyncio.ensure_future(self._start())
        await self._shared(self._starting)

    async def _shared(self, task: asyncio.Task[None]) -> None:
        """Wait for what serves all tunnels; that `stop` cancels it does not cancel whoever waits for it."""
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise TunnelError(f"{self._host}: the connection was closed") from None

    async def _start(self) -> None:
        connection = self._connection()
        if connection is None or self._stopped:
            raise TunnelError(f"{self._host}: the connection was closed")
        space = await workspace.acquire()  # the connection itself uses it as long as it lasts
        try:
            here = _RelayEnd(space.keeper, True)
            try:
                ends = here, _RelayEnd(connection, False)
            except BaseException:
                here.close()
                raise
        finally:
            await space.release()
        try:
            await _within(_START_LIMIT, self._join(connection, *ends), f"{self._host}: the relay does not come up")
        except BaseException:
            self._drop(ends)
            raise
        self._ends = ends
        for end in ends:
            end.ended.add_done_callback(lambda _: self._lost(ends))

    async def _join(self, connection: Connection, here: _RelayEnd, there: _RelayEnd) -> None:
        """Connect the two by a session."""
        marker = new_marker()
        info = connection.agent_info
        command = bulk_command(info.executable, marker, [await there.socket], info.pid)
        try:
            session = await open_session(connection.mux, command)
        except MuxError as error:
            raise TunnelError(
                f"{self._host}: there is no further session for the relay through its agent: {error}"
                "\n  Next step: allow at least MaxSessions 2 in its sshd_config, or end what else uses it"
            ) from None
        # The session must be held until it ends, which it does with the process on the host.
        self._session = session.ended
        with session.stream as ours:
            try:
                await session.started(marker)
            except SessionError as error:
                hint = f"\n  Next step: {error.hint}" if error.hint else ""
                raise TunnelError(f"{self._host}: the relay does not start: {error.detail}{hint}") from None
            hand_over(ours, b"stream", await here.socket)
        await asyncio.gather(here.ready, there.ready)

    # --- its end -------------------------------------------------------------------------------
    def _drop(self, ends: tuple[_RelayEnd, _RelayEnd]) -> None:
        for end in ends:
            end.close()
        if self._session is not None:
            self._session.cancel()
            self._session = None

    def _lost(self, ends: tuple[_RelayEnd, _RelayEnd]) -> None:
        if self._ends is ends:
            self._ends = None
            self._drop(ends)
            if not self._stopped and self._restarting is None:
                self._restarting = asyncio.ensure_future(self._restart())

    async def _restart(self) -> None:
        """Bring the relay up again with its tunnels, as soon as the host can be reached."""
        why = "the host can no longer be reached"
        try:
            for attempt in range(_ATTEMPTS):
                if not await self._reachable():
                    break
                try:
                    await self._start()
                    for number, tunnel in list(self._tunnels.items()):
                        await self._carry(number, tunnel.request)
                except LazyclusterError as error:
                    why = str(error)
                    if attempt + 1 < _ATTEMPTS:
                        await asyncio.sleep(_PAUSE)
                else:
                    logger.info("%s: the relay through the agent is back", self._host)
                    return
            self._give_up(why)
        finally:
            self._restarting = None

    async def _reachable(self) -> bool:
        """Wait until the link to the host is up; returns whether it will be."""
        connection = self._connection()
        if connection is None or connection.state not in ("open", "interrupted"):
            return False
        changed = asyncio.Event()
        forget = connection.on_state(lambda *_: changed.set())
        try:
            while connection.state == "interrupted":
                changed.clear()
                await changed.wait()
        finally:
            forget()
        return connection.state == "open"

    def _give_up(self, why: str) -> None:
        tunnels, self._tunnels = list(self._tunnels.values()), {}
        if tunnels and not self._stopped:
            logger.error("%s: not forwarded any more: %s: %s", self._host, counted(len(tunnels), "port"), why)
        for tunnel in tunnels:
            if self._stopped:
                tunnel.gone()
            else:
                tunnel.lost()

    def stop(self) -> None:
        """End the relay, because the connection is about to end."""
        self._stopped = True
        for task in (self._starting, self._restarting):
            if task is not None:
                task.cancel()
        ends, self._ends = self._ends, None
        if ends is not None:
            self._drop(ends)
        self._give_up("")


async def _within(seconds: float, work: Awaitable[T], problem: str) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise TunnelError(f"{problem} within {seconds:g} s") from None
