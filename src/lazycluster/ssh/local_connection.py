"""Agents on the manager's own machine: for a runtime without ssh, and the keeper."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys

from lazycluster.agent.deletion import remove_tree
from lazycluster.agent.directories import SOCKET
from lazycluster.agent.restart_policy import RestartPolicy
from lazycluster.core import forks
from lazycluster.core.limits import limit_hint, limit_hint_in
from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError

from .agent_program import new_marker, stub
from .connection import Connection
from .errors import no_room_here, no_room_in
from .link import AgentLink
from .process import WatchedProcess
from .start_marker import StartError

_DEADLINE = 20.0  # seconds for an agent to start


def hand_over(stream: socket.socket, purpose: bytes, path: str) -> None:
    """Give a stream, both ways of it, to the process of this machine that listens on a unix socket.

    Args:
        stream: The stream; it stays open here.
        purpose: What that process is told of it.
        path: Where it listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as receiver:
        receiver.connect(path)
        socket.send_fds(receiver, [purpose], [stream.fileno(), stream.fileno()])


class LocalConnection(Connection):
    """An agent as a plain subprocess of the manager.

    Args:
        host: The name that it goes by.
        python: The interpreter that runs the agent; the manager's own by default.
    """

    local = True

    def __init__(self, host: str = "localhost", python: str | None = None) -> None:
        super().__init__(host)
        self._python = python or sys.executable

    async def open(self) -> None:
        """Start the agent."""
        self._become("connecting")
        try:
            await self._start()
        except BaseException:
            self._become("closed")
            raise
        self._opened()

    async def _start(self) -> None:
        marker = new_marker()
        try:
            process = WatchedProcess([self._python, "-ISc", stub(marker)])
            self._process = process
            await asyncio.wait_for(self._bring_up(process, marker), _DEADLINE)
        except BaseException as error:
            await self._hang_up()
            if isinstance(error, (StartError, asyncio.TimeoutError, OSError)):
                said = self._process.errors if self._process else str(error)
                if places := no_room_in(said):
                    raise no_room_here(places) from None
                hint = limit_hint(error) or limit_hint_in(said)
                reason, shown = ("manager", said.strip().rpartition("\n")[2]) if hint else ("python", said)
                raise InvalidRuntimeError(self.host, reason, f"no agent can be started: {shown}", hint) from None
            raise

    async def start_another_agent(self) -> AgentLink:
        """Start it as a daemon."""
        self.check()
        marker = new_marker()
        process = WatchedProcess([self.agent_info.executable, "-ISc", stub(marker)])
        fd_in, fd_out = process.take_streams()
        return await self._begin(fd_in, fd_out, marker, process.exited)

    async def open_copy_stream(self) -> socket.socket:
        """Return a stream to a new process that copies files."""
        self.check()
        await self._prepare_copies()
        ours, theirs = socket.socketpair()
        forks.close_in_children(ours.fileno(), theirs.fileno())
        with theirs:
            hand_over(theirs, b"bulk", os.path.join(self.agent_info.directory, SOCKET))
        return ours


logger = logging.getLogger("lazycluster")

_MOST = 5  # that may be killed within minutes


class Keeper(LocalConnection):
    """The connection to the keeper, whichever it is at the time.

    One that is killed takes along what runs under it. Meanwhile the connection is interrupted; then it leads to the
    next one, which has been told what `on_renewal` tells.
    """

    def __init__(self) -> None:
        super().__init__("localhost")
        self._agents = RestartPolicy(_MOST)

    def _ended(self, link: AgentLink, error: Exception | None) -> None:
        if self._gone is None:
            super()._ended(link, error)
        else:
            link.lost("the next keeper has ended, too")  # whoever replaces it sees that

    async def _fail(self) -> None:
        why = await self._last_words()
        while (delay := self._agents.next()) is not None:
            logger.warning("the keeper on this machine was lost, and is replaced (%s)", why)
            assert self._link is not None
            self._link.lost(f"the keeper on this machine was lost ({why})")
            remove_tree(self.agent_info.directory)
            await asyncio.sleep(delay)
            try:
                await self._start()
                for renew in list(self.on_renewal):
                    await renew()
            except LazyclusterError as error:
                why = str(error)
            else:
                self._gone = None
                self._opened()
                return
        logger.error("there is no keeper any more: if this process is killed, something may be left: %s", why)
        await self._lost(f"the keeper on this machine was lost too often ({why})")

    async def _close(self) -> None:
        if self._gone is not None and self.state == "interrupted":
            self._gone.cancel()
            await asyncio.wait([self._gone])
            self._gone = None
        await super()._close()
