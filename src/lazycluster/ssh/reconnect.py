"""A connection whose link is made anew when it drops: to the agent that waits on the host, or to a new one."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import datetime
import logging
import os
import random
import secrets

from lazycluster.agent import wire
from lazycluster.agent.manager_link import KEPT, SECRET_SIZE, SILENCE_LIMIT
from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError, printable

from .agent_replies import AgentInfo
from .channel import Channel
from .config import Settings
from .connection import Connection
from .link import AgentLink
from .start_marker import StartError, StartMarker

__all__ = ["ReconnectingConnection"]

logger = logging.getLogger("lazycluster")

_BEATS = 4  # heartbeats in the time within which their absence is to be noticed
_HANGS = 3  # times that span without a word: then the ssh process is taken for stuck, and ended
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0  # seconds between attempts
_CONNECT_TIMEOUTS = (4.0, 4.0, 8.0)  # seconds for the first attempts; what comes back answers soon
_RETURN_PATIENCE = 3.0  # seconds for a link that is down when it is closed
_LEAST_QUIET = 2.0
# Reasons that time does not cure. That ssh ends without a word is none: it has connected before.
_FINAL = ("auth", "host_key", "config")
_REFUSAL_SHOWN = 500
_REPLY_SIZE = len(KEPT) + wire.TOTAL_SIZE


class ReconnectingConnection(Connection, abc.ABC):
    """A connection over a network.

    When its link drops, the agent keeps what runs for a grace period, and this tries to reach it again. Then both
    sides go on where the bytes end that the other has: nobody who uses the connection notices more than a delay.

    Args:
        settings: How the host is reached, and for how long one waits for it.

    Attributes:
        grace: For how many seconds the agent waits for us; 0 if it does not.
        refusal: Why it does not, though it should.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.host)
        self.settings = settings
        self.grace = 0.0
        self.refusal = ""
        self._secret = b""
        self._agreeing: asyncio.Task[None] | None = None
        self._returning: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._last_beat = 0.0
        self._dropped = asyncio.Event()  # since it was last tried to bring the link back
        self._prepared = 0  # the generation that all of `on_renewal` has been done for

    @abc.abstractmethod
    async def _attempt(self, timeout: float) -> None:
        """Try once to reach the host: `_bring_up` is called with a process that does.

        Raises:
            InvalidRuntimeError: If that fails.
        """

    @abc.abstractmethod
    async def _let_go(self) -> None:
        """Let go of what belongs to the process that has ended."""

    @abc.abstractmethod
    async def _restore(self) -> None:
        """Have the new process do what the one before did."""

    # --- the agreement -------------------------------------------------------------------------
    async def _start_agent(self, fd_in: int, fd_out: int, mark: StartMarker) -> None:
        before, link = self._agent_info, self._link
        await super()._start_agent(fd_in, fd_out, mark)
        if before is not None and link is not None:
            link.lost(self._what_became_of(before))
        self.grace, self.refusal = 0.0, ""
        if self.settings.grace > 0:
            assert self._link is not None
            self._secret = secrets.token_bytes(SECRET_SIZE)
            self._link.begin()
            asked = {"id": self._secret.hex(), "grace": self.settings.grace, "silence": self.settings.link_timeout}
            channel = self._link.open_channel("session", asked)
            self._agreeing = asyncio.ensure_future(self._agree(self._link, channel))

    async def _agree(self, link: AgentLink, channel: Channel) -> None:
        try:
            answer = await channel.result()
        except LazyclusterError:
            return
        self.grace = min(float(answer["grace"]), max(self.settings.grace, self.settings.link_timeout))
        self.refusal = printable(str(answer.get("refusal"))[:_REFUSAL_SHOWN])
        if not self.grace:
            link.keep_nothing()
            logger.info("%s: what runs there ends with the link: %s", self.host, self.refusal)

    async def agreed(self) -> str:
        """Wait until it is agreed how long the agent waits for us; return why it does not, "" if it does."""
        if self._agreeing is not None:
            await asyncio.wait([self._agreeing])
        return self.refusal

    async def _last_words(self) -> str:
        why = await super()._last_words()
        return f"{why}; what ran there has ended with the link: {self.refusal}" if self.refusal else why

    def _what_became_of(self, before: AgentInfo) -> str:
        now = self.agent_info
        if (now.boot_id, now.booted) != (before.boot_id, before.booted):
            return "the host was restarted; what ran on it is lost"
        return f"the agent on the host has ended, and with it what ran there ({self._last_reason})"

    _last_reason = "it was killed, or nobody came back to it in time"

    # --- heartbeat -----------------------------------------------------------------------------
    def _opened(self) -> None:
        self._prepared = self.generation
        super()._opened()
        self._start_beating()

    def _start_beating(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._last_beat = asyncio.get_running_loop().time()
        self._beat()

    def _beat(self) -> None:
        link, loop = self._link, asyncio.get_running_loop()
        if link is None or not link.is_attached:
            return
        every, now = self.settings.link_timeout / _BEATS, loop.time()
        if now - self._last_beat > 2 * every or link.is_held:
            link.heard = now  # it was this process that slept, or does not listen
        self._last_beat = now
        link.beat()
        quiet = now - link.heard
        if quiet > _HANGS * self.settings.link_timeout:
            link.detach()
            self._ended(link, TimeoutError(f"nothing was heard for {quiet:.0f} s"))
            return
        if quiet >= self.settings.link_timeout - every and self.state == "open":
            self._given_up = link.heard
            self._interrupted(f"nothing was heard from its agent for {quiet:.0f} s")
        elif quiet < self.settings.link_timeout - every and self.state == "interrupted" and not self._is_returning:
            logger.info("%s: it answers again", self.host)
            self._become("open")
        self._heartbeat = loop.call_later(every, self._beat)

    def _interrupted(self, why: str) -> None:
        if self.state == "open":
            self.interruptions += 1
            logger.warning("%s: the link is interrupted: %s", self.host, why)
        self._become("interrupted", why)

    # --- loss and return -----------------------------------------------------------------------
    @property
    def _is_returning(self) -> bool:
        return self._returning is not None and not self._returning.done()

    def _ended(self, link: AgentLink, error: Exception | None) -> None:
        if link is not self._link:
            super()._ended(link, error)
            return
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._dropped.set()
        if self._is_returning:
            return  # the link has dropped again before it was back for good: whoever tries sees that
        if self.grace and not isinstance(error, wire.FrameError) and self.state in ("open", "interrupted"):
            self._returning = asyncio.ensure_future(self._return())
        else:
            super()._ended(link, error)

    async def _return(self) -> None:
        # Whoever is told that the link is back may be the first to see that it is not.
        while self._link is not None and not self._link.is_attached and self.state != "lost":
            await self._come_back()

    async def _come_back(self) -> None:
        loop = asyncio.get_running_loop()
        why, since = await self._last_words(), loop.time()
        patience = self.settings.grace if self.settings.reconnect is None else self.settings.reconnect
        self._interrupted(f"{why}; it is tried again for {patience:g} s")
        try:
            await asyncio.wait_for(self._try_again(), patience)
            await self._prepare(since + patience)
        except Exception as error:  # noqa: BLE001  (whatever it is, all that waits here must be told)
            detail = "" if isinstance(error, asyncio.TimeoutError) else f": {getattr(error, 'detail', error)}"
            told = f"{why}; and it could not be reached again within {loop.time() - since:.0f} s{detail}"
            logger.error("%s: the connection was lost: %s", self.host, told)
            await self._lost(told)
        else:
            if self._prepared == self.generation:
                logger.info("%s: the link is back after %.1f s", self.host, loop.time() - since)
                self._opened()

    async def _try_again(self) -> None:
        assert self._process is not None
        delay, timeouts = _FIRST_DELAY, [*_CONNECT_TIMEOUTS]
        while True:
            if self._link is not None:
                self._link.detach()
            await self._process.end()  # it may have reached the host, and have been of no use after all
            await self._let_go()
            self._dropped.clear()
            try:
                limit = timeouts.pop(0) if timeouts else self.settings.timeout
                await self._attempt(min(limit, self.settings.timeout))
                await self._restore()
                if self._link is not None and self._link.is_attached:
                    return
            except InvalidRuntimeError as error:
                if error.reason in _FINAL:
                    raise
                logger.debug("%s: still interrupted: %s", self.host, error)
            except (LazyclusterError, OSError) as error:
                logger.debug("%s: still interrupted: %s", self.host, error)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, _LONGEST_DELAY)

    async def _prepare(self, deadline: float) -> None:
        """Have a new agent prepared for what is to run there, however long it takes, unless the link drops again.

        Args:
            deadline: The loop's time after which it is not tried once more if it fails.
        """
        loop, delay = asyncio.get_running_loop(), _FIRST_DELAY
        if self._prepared != self.generation:
            self._start_beating()
        while self._prepared != self.generation and not self._dropped.is_set():
            generation = self.generation
            renewing, dropped = (asyncio.ensure_future(work) for work in (self._renew(), self._dropped.wait()))
            try:
                await asyncio.wait({renewing, dropped}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (renewing, dropped):
                    task.cancel()
                await asyncio.wait({renewing, dropped})
            error = None if renewing.cancelled() else renewing.exception()
            if error is None and not renewing.cancelled():
                self._prepared = generation
            elif error is not None and not self._dropped.is_set():
                if not isinstance(error, (LazyclusterError, OSError)) or loop.time() > deadline:
                    raise error
                logger.debug("%s: not prepared yet: %s", self.host, error)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._dropped.wait(), delay)
                delay = min(2 * delay, _LONGEST_DELAY)

    async def _renew(self) -> None:
        for renew in list(self.on_renewal):
            await renew()

    async def _take_up(self, fd_in: int, fd_out: int, mark: StartMarker) -> None:
        link = self._link
        assert link is not None
        link.detach()
        os.write(fd_out, self._secret + link.received.to_bytes(wire.TOTAL_SIZE, "big"))
        reply = await _read(fd_in, mark.rest, _REPLY_SIZE)
        if not reply.startswith(KEPT) or len(reply) < _REPLY_SIZE:
            # It is about to end, as its directory tells the next attempt.
            raise StartError("the agent on the host does not wait for this manager any more", None)
        link.rewind(int.from_bytes(reply[len(KEPT) : _REPLY_SIZE], "big"))
        link.attach(fd_in, fd_out, reply[_REPLY_SIZE:])

    # --- end -----------------------------------------------------------------------------------
    async def _close(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._returning is not None and not self._returning.done():
            await asyncio.wait([self._returning], timeout=_RETURN_PATIENCE)
            if not self._returning.done():
                self._returning.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._returning
        await super()._close()
        if self._heartbeat is not None:
            self._heartbeat.cancel()

    @property
    def _quiet(self) -> float:
        return max(_LEAST_QUIET, self.settings.link_timeout / 2)

    def _not_told(self) -> None:
        limit = max(self.grace, self.settings.link_timeout) if self.grace else SILENCE_LIMIT
        until = datetime.datetime.now() + datetime.timedelta(seconds=limit)
        why = "it has not ended everything in time" if self.answers else "it does not answer"
        logger.warning(
            "%s: %s, so something may be left there. The host ends it when it sees the end of the connection, at %s at "
            "the latest",
            self.host,
            why,
            f"{until:%H:%M:%S}",
        )


async def _read(fd: int, early: bytes, size: int) -> bytes:
    """Read at least `size` bytes from a non-blocking descriptor, fewer at its end."""
    loop = asyncio.get_running_loop()
    data = bytearray(early)
    while len(data) < size:
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            continue
        except OSError:
            part = b""
        if not part:
            break
        data += part
    return bytes(data)
