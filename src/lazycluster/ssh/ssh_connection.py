"""The connection to a host over ssh: one OpenSSH client process, a multiplexing master that runs the agent.

Where its link drops, another process takes its place: to the agent that waits on the host, or to a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import logging
import os
import random
import secrets
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lazycluster.agent import wire
from lazycluster.agent.directories import SOCKET
from lazycluster.agent.manager_link import KEPT, SECRET_SIZE, SILENCE_LIMIT
from lazycluster.core import event_loop, forks
from lazycluster.core.limits import limit_hint
from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError, LazyclusterError, NoAnswerError, printable

from . import logins, workspace
from .agent_program import (
    bulk_command,
    choosing_command,
    expected,
    new_marker,
    rejoining_stub,
    remote_command,
    shell_payload,
    stub,
)
from .agent_replies import AgentInfo
from .channel import Channel
from .circumstances import circumstances
from .config import Settings, ssh_argv, ssh_version
from .connect_limit import limiter
from .connection import Connection
from .errors import classify, is_retryable, no_room_in, no_room_there
from .extra_sessions import ExtraSession, NoAgentError, SessionRefusedError, open_session
from .link import AgentLink
from .mux import Forward, Mux, MuxError
from .process import WatchedProcess
from .python_search import PythonSearch
from .start_marker import StartError, StartMarker, read_marker, read_some, shown, write_all

ATTEMPTS = 6
_START_MARGIN = 15.0  # at most so many seconds beyond the time-out, for the login shell and Python on a loaded host
_ASK_LIMIT = 180.0  # seconds for a person to answer ssh's questions
_SESSION_LIMIT = 30.0  # seconds for a further session to start on a connection that works
_LOOK_EVERY = 0.1  # seconds

_PORTS_LIMIT = 5.0  # seconds within which ports can be had again that the link had before it dropped
_PORTS_DELAY = 0.2  # seconds

_BEATS = 4  # heartbeats in the time within which their absence is to be noticed
_HANGS = 3  # times that span without a word: then the ssh process is taken for stuck, and ended
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0  # seconds between attempts
_CONNECT_TIMEOUTS = (4.0, 4.0, 8.0)  # seconds for the first attempts; what comes back answers soon
_RETURN_PATIENCE = 3.0  # seconds for a link that is down when it is closed
_LEAST_QUIET = 2.0  # seconds
# Reasons that do not pass with time. That ssh ends without a word is none: it has connected before.
_FINAL = ("auth", "host_key", "config")
_REFUSAL_SHOWN = 500  # characters
_REPLY_SIZE = len(KEPT) + wire.TOTAL_SIZE
_MORE_SESSIONS = "have MaxSessions in the host's sshd_config set to 4 or more (10 is the default)"
_PLAIN_SEARCH = PythonSearch()
_numbers = itertools.count(1)
logger = logging.getLogger("lazycluster")


async def client_version() -> tuple[int, int]:
    """Return the version of the ssh client.

    Raises:
        InvalidRuntimeError: If this machine has no usable one: then it is of no use to try one host after another.
    """
    return ssh_version() if ssh_version.cache_info().currsize else await event_loop.in_thread(ssh_version)


class SshConnection(Connection):
    """The connection to a host over ssh.

    When its link drops, the agent keeps what runs for a grace period, and this tries to reach it again. Then both
    sides go on where the bytes end that the other has: nobody who uses the connection notices more than a delay.

    Args:
        host: The host, as `ssh` takes it.
        connection_kwargs: See `Settings`.
        python: The path of the interpreter that runs the agent. If it is not given, that is the ``python3`` on the
            host's PATH.
        search: How another one is found where that is missing or too old.
        ask: Whether a person may be asked on the terminal for passwords and the like.

    Attributes:
        settings: How the host is reached, and for how long one waits for it.
        grace: For how many seconds the agent waits for us; 0 if it does not.
        refusal: Why it does not, though it should.

    Raises:
        ValueError, TypeError: If the host or the settings are not valid.
    """

    def __init__(
        self,
        host: str,
        connection_kwargs: Mapping[str, Any] | None = None,
        *,
        python: str | None = None,
        search: PythonSearch = _PLAIN_SEARCH,
        ask: bool = False,
    ) -> None:
        self.settings = Settings.parse(host, connection_kwargs)
        super().__init__(self.settings.host)
        self.grace = 0.0
        self.refusal = ""
        self._python = python
        self._search = search
        self._ask = ask
        self._space: workspace.Workspace | None = None
        self._name = ""
        self._mux: Mux | None = None
        self._failures = 0
        self._forwards: dict[Any, Forward] = {}  # while the link is down
        self._sessions: set[asyncio.Task[int]] = set()
        self._session_problem = -1.0, ""  # what the further session printed that failed last, and when
        self._further: list[str] = []  # where the agent listens beside its own directory
        self._secret = b""
        self._agreeing: asyncio.Task[None] | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._last_beat = 0.0
        self._dropped = asyncio.Event()  # since it was last tried to bring the link back
        self._prepared = 0  # the generation that all of `on_renewal` has been done for

    @property
    def mux(self) -> Mux:
        """The control socket of the ssh process."""
        self.check()
        if self._mux is None:
            raise ConnectionLostError(self.host, f"the link is interrupted: {self.why}")
        return self._mux

    # --- connecting -------------------------------------------------------------------------------
    async def open(self) -> None:
        """Connect, trying again when the host or its jump host drops the handshake because it has too many."""
        self._become("connecting")
        try:
            self._space = await workspace.acquire()
            for attempt in range(ATTEMPTS):
                try:
                    await self._attempt(self.settings.timeout)
                    break
                except InvalidRuntimeError as error:
                    if not is_retryable(error) or attempt == ATTEMPTS - 1:
                        raise
                await asyncio.sleep(random.uniform(0.5, 1.0) * 0.25 * 2**attempt)
        except BaseException as error:
            self._become("closed")
            await self._release()
            if isinstance(error, OSError):
                hint = limit_hint(error)
                raise InvalidRuntimeError(self.host, "manager" if hint else "ssh", str(error), hint) from None
            raise
        self._opened()

    async def _attempt(self, timeout: float) -> None:
        space = self._space
        assert space is not None
        self._name = f"{next(_numbers)}"
        control = os.path.join(space.directory, self._name)
        marker = new_marker()
        version = await client_version()
        settings = replace(self.settings, timeout=timeout)
        log = f"{control}.log"
        argv = ssh_argv(settings, control, self._command(marker), version, ask=self._ask, log=log)
        space.prompter.register(self._name, settings, self._ask)
        deadline = timeout + min(2 * timeout, _START_MARGIN)
        process: WatchedProcess | None = None
        try:
            async with limiter(settings) as slot:
                self._process = process = WatchedProcess(argv, space.prompter.env(self._name), log)
                space.watch(process.pid)
                slot.started(process, self.silent)
                space.prompter.started(self._name, process.pid)
                bringing_up = asyncio.ensure_future(self._bring_up(process, marker))
                if self._ask:
                    await _logged_in(control, bringing_up)
                await asyncio.wait_for(bringing_up, deadline)
        except BaseException as error:
            if process is not None:
                try:
                    if self.state == "connecting":  # the agent may be there already, and would wait for our return
                        await self._stop()
                finally:
                    process.signal(signal.SIGTERM)
                    await process.end()
            try:
                failure = await self._failure(error, process)
            finally:
                self._forget_attempt()
            if failure is not None:
                raise failure from None
            raise
        self._mux = Mux(control)

    def _command(self, marker: str) -> str:
        program, before = self._program(marker), self._agent_info
        if self._python is not None:
            return remote_command(self._python, program)
        return choosing_command(marker, program, before.executable if before is not None else "")

    def _program(self, marker: str) -> str:
        if self._agent_info is None:
            return stub(marker)
        return rejoining_stub(marker, self._sockets, self._agent_info.pid)

    async def _search_python(self, fd_in: int, fd_out: int, start: StartMarker, marker: str) -> StartMarker:
        if self._python is not None:
            return start
        assert self._process is not None
        script = self._search.script(self._program(marker))
        for sent in ([shell_payload(marker)] if start.version else []) + [script]:
            await write_all(fd_out, sent)
            self._shell_output[:] = start.rest
            start = await read_marker(fd_in, expected(marker), self._process.exited, self._shell_output)
        return start

    def _forget_attempt(self) -> None:
        if self._space is not None and self._name:
            if self._process is not None:
                self._space.unwatch(self._process.pid)
            self._space.prompter.forget(self._name)
            for name in (self._name, f"{self._name}.log"):
                with contextlib.suppress(OSError):
                    Path(self._space.directory, name).unlink()

    async def _failure(self, error: BaseException, process: WatchedProcess | None) -> InvalidRuntimeError | None:
        if process is None:
            return None
        assert self._space is not None
        asked = self._space.prompter.asked(self._name)
        answered = self._space.prompter.answered(self._name)
        if isinstance(error, StartError):
            phase, output, status = "noise" if error.is_too_much else "ended", error.output, error.status
        elif isinstance(error, asyncio.TimeoutError):
            phase, output, status = "timeout", shown(self._shell_output), None
        else:
            return None
        self._failures += 1
        way = ssh_argv(self.settings, os.path.join(self._space.directory, "none"), "true", ssh_version())
        return classify(
            self.settings,
            process.errors,
            status,
            asked=asked,
            answered=answered,
            output=output,
            phase=phase,
            logged_in=process.is_logged_in,
            python=self._python or "python3",
            heard=process.heard,
            known=await circumstances(way, process.errors, asked, self._failures == 1),
        )

    # --- further sessions -------------------------------------------------------------------------
    async def open_copy_stream(self) -> socket.socket:
        """Return a stream to a new process that copies files: a further session on the same connection.

        Raises:
            ConnectionLostError: There is no such session.
            SessionError: It does not reach the agent.
        """
        try:
            return await self._copy_stream()
        except NoAgentError:
            if len(self._sockets) > 1:
                raise
        self._further = (await self.request("listen"))["sockets"]
        return await self._copy_stream()

    async def _copy_stream(self) -> socket.socket:
        await self._prepare_copies()
        marker = new_marker()
        agent = self.agent_info
        try:
            session = await self._session(bulk_command(agent.executable, marker, self._sockets, agent.pid))
        except MuxError as error:
            if not error.refused:
                raise ConnectionLostError(self.host, f"no further session: {error}") from None
            raise SessionRefusedError(f"it needs a further ssh session: {error}", _MORE_SESSIONS) from None
        try:
            await asyncio.wait_for(session.started(marker), _SESSION_LIMIT)
        except asyncio.TimeoutError:
            raise NoAnswerError(self.host, "a further session for copying files", _SESSION_LIMIT) from None
        return session.stream

    @property
    def _sockets(self) -> list[str]:
        """The sockets at which the agent listens."""
        return [os.path.join(self.agent_info.directory, SOCKET), *self._further]

    async def _session(self, command: str) -> ExtraSession:
        """Open a further session; it is held until the command on the host ends, as it does when our end is closed."""
        session = await open_session(self.mux, command)
        self._sessions.add(session.ended)
        session.ended.add_done_callback(lambda ended: self._session_ended(session, ended))
        return session

    def _session_ended(self, session: ExtraSession, ended: asyncio.Task[int]) -> None:
        self._sessions.discard(ended)
        if not ended.cancelled() and ended.result() and session.printed:
            text = f"its session ended with exit status {ended.result()}, and printed: {session.printed}"
            self._session_problem = asyncio.get_running_loop().time(), text

    def problem_since(self, moment: float) -> str:
        """Return what went wrong since then with the agent or a further session, in the loop's time; "" if nothing."""
        when, text = self._session_problem
        return super().problem_since(moment) or (text if when >= moment else "")

    async def start_another_agent(self) -> AgentLink:
        """Start it in a further session on the same connection."""
        await self.wait_until_open()
        marker = new_marker()
        try:
            session = await self._session(remote_command(self.agent_info.executable, stub(marker)))
        except MuxError as error:
            raise ConnectionLostError(self.host, f"no further session: {error}") from None
        ours_out = os.dup(session.stream.fileno())
        forks.close_in_children(ours_out)
        try:
            return await self._begin(session.stream.detach(), ours_out, marker, session.ended)
        except ConnectionLostError as error:
            if places := no_room_in(session.printed):
                raise no_room_there(self.settings, places) from None
            if session.printed:
                raise ConnectionLostError(self.host, f"{error.detail}\n{session.printed}") from None
            raise

    # --- the agreement about the grace period -----------------------------------------------------
    async def _start_agent(self, fd_in: int, fd_out: int, start: StartMarker) -> None:
        self._further = []
        before, link = self._agent_info, self._link
        await super()._start_agent(fd_in, fd_out, start)
        if before is not None and link is not None:
            link.lost(self._what_became_of(before))
        self.grace, self.refusal = 0.0, ""
        if self.settings.grace > 0:
            assert self._link is not None
            self._secret = secrets.token_bytes(SECRET_SIZE)
            self._link.begin_retaining()
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
            link.stop_retaining()
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
        why = "it was killed, or nobody came back to it in time"
        return f"the agent on the host has ended, and with it what ran there ({why})"

    # --- heartbeat --------------------------------------------------------------------------------
    def _opened(self) -> None:
        self._prepared = self.generation
        super()._opened()
        self._start_heartbeat()

    def _start_heartbeat(self) -> None:
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
        link.send_heartbeat()
        quiet = now - link.heard
        if quiet > _HANGS * self.settings.link_timeout:
            link.detach()
            self._ended(link, TimeoutError(f"nothing was heard for {quiet:.0f} s"))
            return
        if quiet >= self.settings.link_timeout - every and self.state == "open":
            self._given_up = link.heard
            self._interrupted(f"nothing was heard from its agent for {quiet:.0f} s")
        elif quiet < self.settings.link_timeout - every and self.state == "interrupted" and not self._is_reconnecting:
            logger.info("%s: it answers again", self.host)
            self._become("open")
        self._heartbeat = loop.call_later(every, self._beat)

    def _interrupted(self, why: str) -> None:
        if self.state == "open":
            self.interruptions += 1
            logger.warning("%s: the link is interrupted: %s", self.host, why)
        self._become("interrupted", why)

    # --- reconnecting -----------------------------------------------------------------------------
    @property
    def _is_reconnecting(self) -> bool:
        return self._reconnecting is not None and not self._reconnecting.done()

    def _ended(self, link: AgentLink, error: Exception | None) -> None:
        if link is not self._link:
            super()._ended(link, error)
            return
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._dropped.set()
        if self._is_reconnecting:
            return  # the link has dropped again before it was back for good: whoever tries sees that
        if self.grace and not isinstance(error, wire.FrameError) and self.state in ("open", "interrupted"):
            self._reconnecting = asyncio.ensure_future(self._stay_connected())
        else:
            super()._ended(link, error)

    async def _stay_connected(self) -> None:
        # Whoever is told that the link is back may be the first to see that it is not.
        while self._link is not None and not self._link.is_attached and self.state != "lost":
            await self._reconnect()

    async def _reconnect(self) -> None:
        loop = asyncio.get_running_loop()
        why, since = await self._last_words(), loop.time()
        patience = self.settings.grace if self.settings.reconnect is None else self.settings.reconnect
        self._interrupted(f"{why}; it is tried again for {patience:g} s")
        try:
            since = await self._reach_with_logins(patience)
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

    async def _reach_with_logins(self, patience: float) -> float:
        """Reach the host again, in a process that outlives its login perhaps only when somebody has logged in anew.

        Args:
            patience: Seconds for which it is tried each time.

        Returns:
            The loop's time at which the last time began.
        """
        while True:
            since = asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._reach_again(), patience)
                return since
            except InvalidRuntimeError as error:
                if error.reason != "auth" or not await logins.renewed(self.host, str(error)):
                    raise

    async def _reach_again(self) -> None:
        assert self._process is not None
        delay, timeouts = _FIRST_DELAY, [*_CONNECT_TIMEOUTS]
        while True:
            if self._link is not None:
                self._link.detach()
            await self._process.end()  # it may have reached the host, and have been of no use after all
            await self._release_process()
            self._dropped.clear()
            try:
                limit = timeouts.pop(0) if timeouts else self.settings.timeout
                await self._attempt(min(limit, self.settings.timeout))
                await self._reopen_forwards()
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
            self._start_heartbeat()
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

    async def _rejoin(self, fd_in: int, fd_out: int, start: StartMarker) -> None:
        link = self._link
        assert link is not None
        link.detach()
        os.write(fd_out, self._secret + link.received.to_bytes(wire.TOTAL_SIZE, "big"))
        reply = await _read(fd_in, start.rest, _REPLY_SIZE)
        if not reply.startswith(KEPT) or len(reply) < _REPLY_SIZE:
            # It is about to end, as its directory tells the next attempt.
            raise StartError("the agent on the host does not wait for this manager any more", None)
        link.rewind(int.from_bytes(reply[len(KEPT) : _REPLY_SIZE], "big"))
        link.attach(fd_in, fd_out, reply[_REPLY_SIZE:])

    # --- forwarded ports --------------------------------------------------------------------------
    async def _reopen_forwards(self) -> None:
        """Open the ports again that were forwarded."""
        assert self._mux is not None and self._link is not None
        deadline = asyncio.get_running_loop().time() + _PORTS_LIMIT
        while wanted := list(self._forwards.values()):
            if not self._link.is_attached:
                raise ConnectionLostError(self.host, "the link dropped again before its ports were back")
            failed: list[tuple[Forward, MuxError]] = []
            for forward, result in zip(wanted, await self._mux.open_forwards(wanted), strict=True):
                if isinstance(result, MuxError):
                    failed.append((forward, result))
                elif self._forwards.pop(forward.key, None) is None:  # it was closed meanwhile
                    await self._mux.close_forwards([forward])
            if asyncio.get_running_loop().time() > deadline:
                for forward, error in failed:
                    if not error.refused:  # nobody has said that it cannot be had: the next attempt asks again
                        raise ConnectionLostError(self.host, str(error)) from None
                    self._forward_lost(forward, error)
            if failed:
                await asyncio.sleep(_PORTS_DELAY)

    def _forward_lost(self, forward: Forward, error: MuxError) -> None:
        self._forwards.pop(forward.key, None)
        logger.error(
            "%s: %s is not forwarded any more, since another program has taken it while the link was down, or the "
            "host's sshd forbids it: %s",
            self.host,
            forward,
            error,
        )
        for tell in list(self.on_port_lost):
            tell(forward)

    def forget_forwards(self, forwards: Iterable[Forward]) -> None:
        """Do not open these ports again when the link is back."""
        for forward in forwards:
            self._forwards.pop(forward.key, None)

    # --- end --------------------------------------------------------------------------------------
    async def _close(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._reconnecting is not None and not self._reconnecting.done():
            await asyncio.wait([self._reconnecting], timeout=_RETURN_PATIENCE)
            if not self._reconnecting.done():
                self._reconnecting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._reconnecting
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

    async def _release_process(self) -> None:
        self._forget_attempt()
        for task in self._sessions:
            task.cancel()
        if self._mux is not None:
            self._forwards.update({forward.key: forward for forward in self._mux.forwards})
            with contextlib.suppress(Exception):
                await self._mux.aclose()
            self._mux = None

    async def _release(self) -> None:
        await self._release_process()
        space, self._space = self._space, None
        if space is not None:
            await space.release()

    async def _hang_up(self, stopped: bool = False) -> None:
        if self._process is not None and self._agent_info is not None and (stopped or not self.answers):
            # It would wait for forwarded connections that are still open, or for a host that says nothing. The agent
            # has ended; or what it was told is with the system already, which goes on trying to send it.
            self._process.signal(signal.SIGTERM)
        await super()._hang_up(stopped)


async def _logged_in(control: str, work: asyncio.Future[None]) -> None:
    """Wait until ssh has logged in, for as long as a person may need to answer its questions, or until work is done."""
    end = asyncio.get_running_loop().time() + _ASK_LIMIT
    try:
        while not Path(control).exists() and not work.done():
            if asyncio.get_running_loop().time() > end:
                raise asyncio.TimeoutError
            await asyncio.wait([work], timeout=_LOOK_EVERY)
    except BaseException:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        raise


async def _read(fd: int, early: bytes, size: int) -> bytes:
    """Read at least `size` bytes from a non-blocking descriptor, fewer at its end."""
    data = bytearray(early)
    while len(data) < size and (part := await read_some(fd)):
        data += part
    return bytes(data)
