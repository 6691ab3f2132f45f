"""The connection to one host: a process that brings an agent there, and the link to that agent."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal

from lazycluster.exceptions import (
    ConnectionLostError,
    InvalidRuntimeError,
    LazyclusterError,
    NoAnswerError,
    TunnelError,
)

from .agent_program import COPIES, OLDEST_PYTHON, expected, payload
from .agent_replies import AgentInfo
from .channel import Bytes, Channel, Event
from .errors import last_words, on_terminal
from .link import AgentLink
from .mux import Forward, Mux
from .process import WatchedProcess
from .start_marker import StartError, StartMarker, read_marker

State = Literal["new", "connecting", "open", "interrupted", "lost", "closed"]

logger = logging.getLogger("lazycluster")

ANSWER_LIMIT = 30.0
"""Seconds that a host gets to answer a question, if nothing else is said."""

_TICK = 1.0
_START_LIMIT = 30.0  # seconds for a further agent to start, on a connection that works
_STOP_PATIENCE = 6.0  # seconds that the agent gets to end what it started
_QUIET = 5.0
_UNHEARD_PATIENCE = 1.0  # the same if its host is not heard anyway


StateCallback = Callable[[State, str], Any]


class Connection(abc.ABC):
    """The connection to one host. All methods are for the event loop's thread, unless they say otherwise.

    Attributes:
        host: The host as the user named it.
        why: Why it is in its state, where that is not what was asked for: what interrupted it, or how it was lost.
        interruptions: How often its link has dropped so far.
        silent: Is set when nothing has come from the host for a while, while it is being connected.
        generation: Which agent it leads to: it grows when the host has lost the one before, and all that this one ran.
        on_lost: Called when the connection is lost (not when it is closed), with the reason.
        on_port_lost: Called when a port was forwarded before the link dropped, and cannot be had again.
        on_renewal: Awaited when a new agent has taken the place of a lost one, before the connection is open again.
    """

    local = False

    def __init__(self, host: str) -> None:
        self.host = host
        self.why = ""
        self.interruptions = 0
        self.silent = asyncio.Event()
        self.generation = 0
        self._state: State = "new"
        self._state_since = time.monotonic()
        self._state_callbacks: list[StateCallback] = []
        self.on_lost: list[Callable[[str], Any]] = []
        self.on_renewal: list[Callable[[], Awaitable[Any]]] = []
        self.on_port_lost: list[Callable[[Forward], Any]] = []
        self._owner = os.getpid()
        self._process: WatchedProcess | None = None
        self._link: AgentLink | None = None
        self._agent_info: AgentInfo | None = None
        self._shell_output = bytearray()
        self._gone: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._unanswered: NoAnswerError | None = None
        self._copies_from = 0  # the generation whose agent can serve copies
        self._given_up = -1.0  # when the host was heard last of all, if that was too long ago for somebody
        self.at_close: list[Callable[[], Any]] = []

    @property
    def state(self) -> State:
        """State: ``new``, ``connecting``, ``open``, ``interrupted``, ``lost`` or ``closed``.

        An interrupted one can be used: what runs goes on, and what is asked for is answered when the host can be
        reached again. It becomes ``open`` then, or ``lost`` if that takes too long. May be read from any thread.
        """
        return self._state

    @property
    def interrupted_for(self) -> float | None:
        """Seconds for which its link has been interrupted; None if it is not. May be read from any thread."""
        return time.monotonic() - self._state_since if self.state == "interrupted" else None

    def on_state(self, callback: StateCallback) -> Callable[[], None]:
        """Have a function called with the new state and the reason (or "") whenever the state changes, on the loop.

        Returns:
            What ends that; calling it again does nothing.
        """
        self._state_callbacks.append(callback)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._state_callbacks.remove(callback)

        return forget

    def _become(self, state: State, why: str = "") -> None:
        if state == self._state:
            return
        self._state, self.why, self._state_since = state, why, time.monotonic()
        for callback in list(self._state_callbacks):
            try:
                callback(state, why)
            except BaseException:  # also `sys.exit`: what follows here has to be done
                logger.exception("%s: a callback for the state of the connection failed", self.host)

    # --- what the kinds of connection differ in ------------------------------------------------
    @abc.abstractmethod
    async def open(self) -> None:
        """Connect and start the agent.

        Raises:
            InvalidRuntimeError: If that fails, with the reason.
        """

    @abc.abstractmethod
    async def open_copy_stream(self) -> socket.socket:
        """Return a blocking stream to a new process on the host that copies files; closing it ends that process."""

    @abc.abstractmethod
    async def start_another_agent(self) -> AgentLink:
        """Return a link to a further agent on the host, which is nobody's descendant; for the one who asks alone."""

    def forget_forwards(self, forwards: Iterable[Forward]) -> None:  # noqa: B027  (most have none)
        """Do not open these ports again when the link is back."""

    async def _release(self) -> None:  # noqa: B027  (most have nothing)
        """Let go of what `open` took, after the process has ended."""

    async def _begin(self, fd_in: int, fd_out: int, marker: str, exited: asyncio.Future[int]) -> AgentLink:
        """Start an agent through streams of which nothing has been read; the link owns them."""
        for fd in (fd_in, fd_out):
            os.set_blocking(fd, False)
        try:
            start = await asyncio.wait_for(read_marker(fd_in, expected(marker), exited, bytearray()), _START_LIMIT)
        except BaseException as error:
            os.close(fd_in)
            os.close(fd_out)
            if isinstance(error, asyncio.TimeoutError):
                raise self._start_overdue() from None
            if isinstance(error, StartError):
                raise ConnectionLostError(self.host, f"no further agent could be started there: {error}") from None
            raise
        link = AgentLink(self.host, fd_in, fd_out, lambda error: link.lost(str(error or "it has ended")), start.rest)
        link.start_agent(False, start.tag)
        try:
            await asyncio.wait_for(link.started, _START_LIMIT)
        except BaseException as error:
            link.lost("it was given up")
            if isinstance(error, asyncio.TimeoutError):
                raise self._start_overdue() from None
            raise
        return link

    def _start_overdue(self) -> NoAnswerError:
        return NoAnswerError(self.host, "a further agent to start", _START_LIMIT)

    async def _prepare_copies(self) -> None:
        """Have the agent get the modules that copies need: they begin on other streams than the requests."""
        if self._link is not None and self._copies_from != self.generation:
            generation = self.generation
            self._link.send_modules(COPIES)
            await self.request("ping")
            self._copies_from = generation

    # --- the agent -----------------------------------------------------------------------------
    @property
    def mux(self) -> Mux:
        """The control socket of the ssh process.

        Raises:
            TunnelError: If there is none.
        """
        raise TunnelError(f"{self.host}: is not connected through ssh")

    @property
    def agent_info(self) -> AgentInfo:
        """Facts about the host, from its agent."""
        if self._agent_info is None:
            raise LazyclusterError(f"{self.host}: not connected")
        return self._agent_info

    def check(self) -> None:
        """Raise an error if the connection cannot be used. May be called from any thread."""
        if os.getpid() != self._owner:
            raise LazyclusterError(
                f"{self.host}: this runtime belongs to the process {self._owner}; a forked child cannot use it. "
                "Make a new Runtime in the child"
            )
        if self.state == "lost":
            raise ConnectionLostError(self.host, self.why)
        if self.state not in ("open", "interrupted"):
            raise LazyclusterError(f"{self.host}: the runtime was closed (cleanup() was called); make a new one")

    def channel(
        self,
        op: str,
        params: dict[str, Any] | None = None,
        *,
        stdout: Bytes | None = None,
        stderr: Bytes | None = None,
        output: Bytes | None = None,
        event: Event | None = None,
    ) -> Channel:
        """Send a request whose answers go to the functions given, as they come."""
        self.check()
        assert self._link is not None
        return self._link.open_channel(op, params or {}, stdout, stderr, output, event)

    async def request(self, op: str, *, within: float | None = None, **params: Any) -> dict[str, Any]:
        """Send a request and wait for its result.

        Args:
            op: What is asked for.
            within: Seconds for the answer; None: as long as any question may take.
            **params: What the agent must know for it.

        Raises:
            AgentError: If the agent answers with an error.
            ConnectionLostError: If the connection ends before.
            NoAnswerError: If no answer comes in time.
        """
        return await self.result_of(self.channel(op, params), f"an answer to {op!r}", within)

    async def result_of(
        self, channel: Channel, awaited: str, within: float | None = None, came: Callable[[], int] = lambda: 0
    ) -> dict[str, Any]:
        """Wait for the result of a channel; it is closed if that does not come.

        Args:
            channel: The channel.
            awaited: What is waited for, for messages.
            within: See `request`.
            came: Returns how much of the answer has come, if it comes in parts: then each has so much time.

        Raises:
            AgentError, ConnectionLostError, NoAnswerError: See `request`.
        """
        limit = ANSWER_LIMIT if within is None else within
        try:
            if not await self._in_time(channel, limit, came):
                interrupted = f"its link is interrupted: {self.why}" if self.state == "interrupted" else ""
                self._unanswered = NoAnswerError(self.host, awaited, limit, interrupted)
                raise self._unanswered
            self._unanswered = None
            return await channel.result()
        finally:
            channel.close()

    async def _in_time(self, channel: Channel, limit: float, came: Callable[[], int]) -> bool:
        """Wait for the end of a channel; time in which this process slept, or did not listen, does not count."""
        loop, left, before = asyncio.get_running_loop(), limit, came()
        while left > 0:
            began, step = loop.time(), min(left, _TICK)
            if await channel.ended(step):
                return True
            if came() != before:
                left, before = limit, came()
            elif self._link is None or not self._link.is_held:
                left -= min(max(loop.time() - began, step), 2 * step)
        return False

    @property
    def unanswered(self) -> NoAnswerError | None:
        """The error of the last request that was not answered; None once another one was."""
        return self._unanswered

    def hold(self, held: bool) -> None:
        """Listen to nothing that the agent says for the time being, so that its host waits; or go on."""
        if self._link is not None:
            self._link.hold(held)

    async def wait_until_open(self, within: float | None = None) -> None:
        """Wait while the connection is interrupted.

        Args:
            within: Seconds; None: until it is decided whether it comes back.

        Raises:
            ConnectionLostError: If it is lost.
            NoAnswerError: If that takes longer.
        """
        if self.state == "interrupted":
            news = asyncio.Event()
            forget = self.on_state(lambda *_: news.set())
            try:
                await asyncio.wait_for(news.wait(), within)
            except asyncio.TimeoutError:
                raise NoAnswerError(self.host, "its link to come back", within or 0.0, self.why) from None
            finally:
                forget()
        self.check()

    async def wait_until_it_answers(self) -> None:
        """Wait until the agent answers, over a link that may have to come back first.

        Raises:
            ConnectionLostError: If it does not come back.
            NoAnswerError: If the agent does not answer, though its link is there.
        """
        with contextlib.suppress(ConnectionLostError):  # the one that was there, perhaps not its successor
            while True:
                try:
                    await self.request("ping")
                    break
                except NoAnswerError:
                    if self.state != "interrupted":
                        raise
                await self.wait_until_open()
        await self.wait_until_open()

    def problem_since(self, moment: float) -> str:
        """Return what the agent said of something that went wrong since then, in the loop's time; "" if nothing."""
        when, text = self._link.problem if self._link is not None else (0.0, "")
        return text if when >= moment else ""

    @property
    def answers(self) -> bool:
        """True if the host responds: its link is up, and the last wait for it was not in vain."""
        link = self._link
        return link is not None and link.is_attached and self._given_up != link.heard and self.state != "interrupted"

    async def wait_while_heard(self, work: asyncio.Future[Any], limit: float) -> bool:
        """Wait for what the host ends; not for long if it does not answer: it ends everything by itself.

        Args:
            work: Done when that has ended; it is cancelled if it is not waited for any more.
            limit: Seconds for it.

        Returns:
            Whether it is done.
        """
        link, quiet = self._link, self._quiet
        try:
            if link is not None and not work.done():
                limit = limit if self.answers else min(limit, _UNHEARD_PATIENCE)
                await link.wait_while_heard(work, limit, quiet)
                if not work.done() and asyncio.get_running_loop().time() - link.heard >= min(quiet, limit):
                    self._given_up = link.heard
        finally:
            if not work.cancel() and not work.cancelled():
                work.exception()  # whoever wants it asks for it; nobody must
        return work.done() and not work.cancelled()

    @property
    def _quiet(self) -> float:
        """Seconds without a word after which a host is not waited for that is to end something."""
        return _QUIET

    # --- starting ------------------------------------------------------------------------------
    async def _bring_up(self, process: WatchedProcess, marker: str) -> None:
        """Start an agent, or reach the one that waits, through a process whose output is a shell's up to the marker."""
        self._process = process
        self._shell_output.clear()
        fd_in, fd_out = process.take_streams()
        try:
            os.set_blocking(fd_in, False)
            os.set_blocking(fd_out, False)
            payload(self.local, sys.implementation.cache_tag)  # is made while the host starts; most have our Python
            start = await read_marker(fd_in, expected(marker), process.exited, self._shell_output)
            if start.on_terminal:
                raise on_terminal(self.host)
            if start.version < OLDEST_PYTHON:
                start = await self._search_python(fd_in, fd_out, start, marker)
            if start.rejoined:
                await self._rejoin(fd_in, fd_out, start)
                return
            self._check_python(start)
        except BaseException:
            os.close(fd_in)
            os.close(fd_out)
            raise
        await self._start_agent(fd_in, fd_out, start)

    async def _search_python(self, fd_in: int, fd_out: int, start: StartMarker, marker: str) -> StartMarker:
        """Have another interpreter started instead of one that is missing or too old; return what it says."""
        return start

    def _check_python(self, start: StartMarker) -> None:
        if start.version < OLDEST_PYTHON:
            text = ".".join(map(str, start.version))
            oldest = ".".join(map(str, OLDEST_PYTHON))
            raise InvalidRuntimeError(
                self.host,
                "python",
                f"the host's Python is {text}, but {oldest} or newer is needed",
                f'install a newer one there, or name the path of one with python="/path/to/python{oldest}"',
            )

    async def _start_agent(self, fd_in: int, fd_out: int, start: StartMarker) -> None:
        assert self._process is not None
        link = AgentLink(self.host, fd_in, fd_out, lambda error: self._ended(link, error), start.rest)
        link.start_agent(self.local, start.tag)
        try:
            info = AgentInfo.parse(await link.started)
        except ValueError as error:
            link.lost("given up")
            raise InvalidRuntimeError(self.host, "protocol", str(error)) from None
        except ConnectionLostError:
            status = await self._process.exited if self._process.exited.done() else None
            raise StartError("the agent did not start", status) from None
        except BaseException:
            link.lost("given up")
            raise
        self._link, self._agent_info = link, info
        self.generation += 1

    async def _rejoin(self, fd_in: int, fd_out: int, start: StartMarker) -> None:
        """Go on with an agent that was there before."""
        raise StartError("no agent was found there", None)

    def _opened(self) -> None:
        self._become("open")
        link = self._link
        if link is not None and not link.is_attached:
            self._ended(link, None)  # it has ended before anybody waited for that

    # --- ending --------------------------------------------------------------------------------
    def _ended(self, link: AgentLink, error: Exception | None) -> None:
        """Handle the end of the agent's streams."""
        if link is not self._link:
            link.lost(str(error) if error else "the agent on the host has ended")
        elif self.state in ("open", "interrupted"):
            self._become("interrupted", str(error) if error else "the host closed it")
            self._gone = asyncio.get_running_loop().create_task(self._fail())
        elif self.state == "closed":
            link.lost("the agent on the host has ended")  # whoever waits for its last word: there will be none

    async def _fail(self) -> None:
        await self._lost(await self._last_words())

    async def _last_words(self) -> str:
        """End the process, which usually has ended, and return what it says about that."""
        assert self._process is not None
        await self._process.end()
        return last_words(self._process.errors) or "the agent on the host has ended"

    async def _lost(self, why: str) -> None:
        """Tell everyone who waits that nothing more will come, and why."""
        self._become("lost", why)
        if self._link is not None:
            self._link.lost(why)
        for tell in list(self.on_lost):
            tell(why)
        for call in self.at_close:
            call()
        await self._release()

    async def close(self) -> None:
        """End everything on the host, then the connection. Doing it again does nothing."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._gone is not None:
            await self._gone
            self._become("closed")
            return
        was_open = self.state in ("open", "interrupted")
        self._become("closed")
        for call in self.at_close:
            call()
        stopped = was_open and await self._stop()
        if was_open and not stopped:
            self._not_told()
        await self._hang_up(stopped)
        await self._release()

    async def _stop(self) -> bool:
        """Have the agent end; returns whether it says that it does."""
        link = self._link
        if link is None or not link.is_attached:
            return False
        try:
            stopping = asyncio.ensure_future(link.open_channel("stop", {}).result())
            return await self.wait_while_heard(stopping, _STOP_PATIENCE) and stopping.exception() is None
        except LazyclusterError:
            return False

    def _not_told(self) -> None:  # noqa: B027  (on this machine it sees that the manager has gone)
        """Say that something may be left on the host, and until when."""

    async def _hang_up(self, stopped: bool = False) -> None:
        """End the process, whether the agent has said that it ends or not."""
        if self._link is not None:
            self._link.lost("the connection was closed")
        if self._process is not None:
            await self._process.end(self._patience())

    def _patience(self) -> float:
        """Seconds that the process gets to end by itself before it is terminated."""
        return 2.0
