"""Further sessions on a host's connection: for copies, relays and agents beside the first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from lazycluster.agent.stream import StreamClosedError
from lazycluster.core import forks
from lazycluster.exceptions import printable

from .agent_program import NO_AGENT, expected
from .mux import Mux, MuxSession
from .process import ErrorTail
from .start_marker import StartError, skip_to_marker

_LAST_LINES = 4
_END_LIMIT = 3.0  # seconds for the end of a session that has closed its output


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


class ExtraSession:
    """A command on the host, on the connection of a master; see `open_session`.

    It must be held as long as it lasts.

    Attributes:
        stream: Its standard input and output, blocking.
        ended: Is done with its exit status when it has ended and its error output has been read.
    """

    def __init__(self, stream: socket.socket, ended: asyncio.Task[int], errors: ErrorTail) -> None:
        self.stream = stream
        self.ended = ended
        self._errors = errors

    @property
    def printed(self) -> str:
        """The last lines that it printed to standard error."""
        lines = [line.strip() for line in self._errors.text.splitlines()]
        return "\n".join([printable(line) for line in lines if line][-_LAST_LINES:])

    async def started(self, marker: str) -> None:
        """Wait until the host's login shell has done its part, and what was to be started says so.

        Raises:
            SessionError: It does not.
        """
        try:
            await skip_to_marker(self.stream, expected(marker))
        except BaseException as error:
            self.stream.close()
            if isinstance(error, (StartError, OSError)):
                raise await self._failure(str(error)) from error
            raise

    async def _failure(self, said: str) -> SessionError:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.ended), _END_LIMIT)
        printed = self.printed
        if NO_AGENT in printed:
            return NoAgentError(
                "the further session that it needs does not find the agent: sessions on this host have a /tmp, or "
                "processes, of their own, or the agent's directory was removed",
                "have all sessions of the user on the host see the same /tmp, /var/tmp, /dev/shm or home directory",
            )
        shown = "\n".join(filter(None, [printable(said.strip()), printed])) or "nothing"
        return SessionError(f"the further session that it needs did not start, and printed: {shown}")


class NoAgentError(SessionError):
    """A further session does not find the agent."""


class SessionRefusedError(SessionError):
    """The host grants no further session; when one of those that there are has ended, it may."""


async def open_session(mux: Mux, command: str) -> ExtraSession:
    """Run a command in a further session.

    Args:
        mux: The master.
        command: For the login shell on the host.

    Raises:
        MuxError: If there is no further session.
    """
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    forks.close_in_children(ours.fileno(), theirs.fileno(), write)
    try:
        with theirs:
            session = await mux.new_session(command, theirs.fileno(), theirs.fileno(), write)
    except BaseException:
        ours.close()
        os.close(read)
        raise
    finally:
        os.close(write)
    errors = ErrorTail(read)
    return ExtraSession(ours, asyncio.ensure_future(_end(session, errors)), errors)


async def _end(session: MuxSession, errors: ErrorTail) -> int:
    try:
        return await session.wait()
    finally:
        errors.close()
