"""The connection to a host over ssh: one OpenSSH client process, a multiplexing master that runs the agent."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import random
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lazycluster.agent.directories import SOCKET
from lazycluster.core import event_loop, forks
from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError, NoAnswerError

from . import workspace
from .agent_program import bulk_command, new_marker, rejoin_command, remote_command
from .config import Settings, ssh_argv, ssh_version
from .connect_limit import limiter
from .errors import circumstances, classify, is_retryable, no_room_in, no_room_there
from .extra_sessions import FurtherSession, NoAgentError, open_session
from .link import AgentLink
from .mux import Forward, Mux, MuxError
from .process import WatchedProcess
from .reconnect import ReconnectingConnection
from .start_marker import StartError, StartMarker, shown

ATTEMPTS = 6
_START_MARGIN = 15.0  # at most so many seconds beyond the time-out, for the login shell and Python on a loaded host
_ASK_LIMIT = 180.0  # seconds for a person to answer ssh's questions
_SESSION_LIMIT = 30.0  # seconds for a further session to start on a connection that works
_LOOK_EVERY = 0.1

_PORTS_LIMIT = 5.0  # seconds within which ports can be had again that the link had before it dropped
_PORTS_DELAY = 0.2

_MORE_FILES = "allow this process more open files (ulimit -n): each host takes seven"
_numbers = itertools.count(1)
logger = logging.getLogger("lazycluster")


class SshConnection(ReconnectingConnection):
    """The connection to a host over ssh.

    Args:
        host: The host, as `ssh` takes it.
        connection_kwargs: See `Settings`.
        python: The interpreter that runs the agent, as the host's login shell finds it.
        ask: Whether a person may be asked on the terminal for passwords and the like.

    Raises:
        ValueError, TypeError: If the host or the settings are not valid.
    """

    def __init__(
        self,
        host: str,
        connection_kwargs: Mapping[str, Any] | None = None,
        *,
        python: str | None = None,
        ask: bool = False,
    ) -> None:
        super().__init__(Settings.parse(host, connection_kwargs))
        self._python = python or "python3"
        self._ask = ask
        self._space: workspace.Workspace | None = None
        self._mux: Mux | None = None
        self._forwards: dict[Any, Forward] = {}  # while the link is down
        self._name = ""
        self._sessions: set[asyncio.Task[int]] = set()
        self._session_problem = -1.0, ""  # what the further session printed that failed last, and when
        self._further: list[str] = []  # where the agent listens beside its own directory

    @property
    def mux(self) -> Mux:
        """The control socket of the ssh process."""
        self.check()
        if self._mux is None:
            raise ConnectionLostError(self.host, f"the link is interrupted: {self.why}")
        return self._mux

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
                hint = _MORE_FILES if error.errno in (errno.EMFILE, errno.ENFILE) else ""
                raise InvalidRuntimeError(self.host, "ssh", str(error), hint) from None
            raise
        self._opened()

    async def _attempt(self, timeout: float) -> None:
        space = self._space
        assert space is not None
        self._name = f"{next(_numbers)}"
        control = os.path.join(space.directory, self._name)
        marker = new_marker()
        version = ssh_version() if ssh_version.cache_info().currsize else await event_loop.in_thread(ssh_version)
        settings = replace(self.settings, timeout=timeout)
        log = f"{control}.log"
        argv = ssh_argv(settings, control, self._command(marker), version, ask=self._ask, log=log)
        space.prompter.register(self._name, settings, self._ask)
        deadline = timeout + min(2 * timeout, _START_MARGIN)
        process: WatchedProcess | None = None
        try:
            async with limiter(settings):
                self._process = process = WatchedProcess(argv, space.prompter.env(self._name), log)
                space.watch(process.pid)
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
        if self._agent_info is None:
            return remote_command(self._python, marker)
        return rejoin_command(self._python, marker, self._sockets, self.agent_info.pid)

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
            phase, output, status = "ended", error.output, error.status
        elif isinstance(error, asyncio.TimeoutError):
            phase, output, status = "timeout", shown(self._noise), None
        else:
            return None
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
            python=self._python,
            heard=process.heard,
            known=await circumstances(way, process.errors, asked),
        )

    async def bulk(self) -> socket.socket:
        """Return a stream to a new process that copies files: a further session on the same connection.

        Raises:
            ConnectionLostError: There is no such session.
            SessionError: It does not reach the agent.
        """
        try:
            return await self._bulk()
        except NoAgentError:
            if len(self._sockets) > 1:
                raise
        self._further = (await self.request("listen"))["sockets"]
        return await self._bulk()

    async def _bulk(self) -> socket.socket:
        marker = new_marker()
        agent = self.agent_info
        session = await self._session(bulk_command(agent.executable, marker, self._sockets, agent.pid))
        try:
            await asyncio.wait_for(session.started(marker), _SESSION_LIMIT)
        except asyncio.TimeoutError:
            raise NoAnswerError(self.host, "a further session for copying files", _SESSION_LIMIT) from None
        return session.stream

    @property
    def _sockets(self) -> list[str]:
        """The sockets at which the agent listens."""
        return [os.path.join(self.agent_info.directory, SOCKET), *self._further]

    async def _session(self, command: str) -> FurtherSession:
        """Open a further session; it is held until the command on the host ends, as it does when our end is closed."""
        try:
            session = await open_session(self.mux, command)
        except MuxError as error:
            raise ConnectionLostError(self.host, f"no further session: {error}") from None
        self._sessions.add(session.ended)
        session.ended.add_done_callback(lambda ended: self._session_ended(session, ended))
        return session

    def _session_ended(self, session: FurtherSession, ended: asyncio.Task[int]) -> None:
        self._sessions.discard(ended)
        if not ended.cancelled() and ended.result() and session.printed:
            text = f"its session ended with exit status {ended.result()}, and printed: {session.printed}"
            self._session_problem = asyncio.get_running_loop().time(), text

    def problem_since(self, moment: float) -> str:
        """Return what went wrong since then with the agent or a further session, in the loop's time; "" if nothing."""
        when, text = self._session_problem
        return super().problem_since(moment) or (text if when >= moment else "")

    async def another_agent(self) -> AgentLink:
        """Start it in a further session on the same connection."""
        await self.reached()
        marker = new_marker()
        session = await self._session(remote_command(self.agent_info.executable, marker))
        ours_out = os.dup(session.stream.fileno())
        forks.not_for_children(ours_out)
        try:
            return await self._begin(session.stream.detach(), ours_out, marker, session.ended)
        except ConnectionLostError as error:
            if places := no_room_in(session.printed):
                raise no_room_there(self.settings, places) from None
            if session.printed:
                raise ConnectionLostError(self.host, f"{error.detail}\n{session.printed}") from None
            raise

    async def _start_agent(self, fd_in: int, fd_out: int, mark: StartMarker) -> None:
        self._further = []
        await super()._start_agent(fd_in, fd_out, mark)

    async def _let_go(self) -> None:
        self._forget_attempt()
        for task in self._sessions:
            task.cancel()
        if self._mux is not None:
            self._forwards.update({forward.key: forward for forward in self._mux.forwards})
            with contextlib.suppress(Exception):
                await self._mux.aclose()
            self._mux = None

    async def _restore(self) -> None:
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
                    self._give_up(forward, error)
            if failed:
                await asyncio.sleep(_PORTS_DELAY)

    def _give_up(self, forward: Forward, error: MuxError) -> None:
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

    async def _release(self) -> None:
        await self._let_go()
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
