"""The agent's link to its manager: the streams, their loss and return, and the time after which it has ended."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import os
import time

from .session import FrameSession
from .ssh_session import SshSession, kills_at_logout
from .wire import TOTAL_SIZE, FrameError

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import signal
    from typing import Any, Callable, List, Optional

    from .server import Agent
    from .session import RequestChannel
else:
    import _signal as signal  # the module proper makes enumerations, for which it imports much

SILENCE_LIMIT = 300.0  # seconds without a heartbeat of the manager, after which it counts as ended
_NO_SSHD = "the agent finds no sshd above its session, so it cannot tell the manager's end from that of the link"
SECRET_SIZE = 16
KEPT, NOT_KEPT = b"K", b"N"
_HEAD_LIMIT = 15.0  # seconds within which who wants to rejoin must say who it is
_SOON = 0.1  # seconds within which the one end of a session's streams follows the other
_SSHD_LIMIT = 1.0  # seconds that sshd gets to end after its streams have
_LOOK_EVERY = 0.02


class ManagerLink:
    """Keeps the one session with the manager.

    The end of the streams alone does not tell why. While sshd has its connection the manager has ended, since ssh,
    which has seen the end of its input, passed that on; without, the link is lost, and the manager may come back.

    Args:
        agent: The agent.
        local: Whether the manager is this agent's parent, and no network between.

    Attributes:
        session: The session, once it has begun.
        grace: For how many seconds the manager may be away.
    """

    def __init__(self, agent: Agent, local: bool) -> None:
        self.session: Optional[FrameSession] = None
        self._agent = agent
        self._local = local
        self._ssh_session: Optional[SshSession] = None
        self._heard = time.monotonic()
        self._secret = b""
        self.grace = 0.0
        self._limit = 10.0
        self._attempts = 0
        self._alone = False
        self._timer: Any = None
        if not local:
            self._look()

    def begin(self, connection: socket.socket, fds: List[int]) -> FrameSession:
        """Begin the session on the streams of the manager that has brought the agent."""
        self._ssh_session = SshSession(connection)
        self._heard = time.monotonic()
        self.session = FrameSession(self._agent)
        self.session.attach(fds[0], fds[1])
        return self.session

    def agree(self, channel: RequestChannel) -> None:
        """Handle the request `session`: the manager says by what it will be known, and for how long it may be away."""
        params = channel.params
        refusal = "" if self._ssh_session is not None and self._ssh_session.up else _NO_SSHD
        if not refusal:
            refusal = kills_at_logout()
        if not refusal and params["grace"] > 0:
            self._secret = bytes.fromhex(params["id"])
            self.grace = max(float(params["grace"]), float(params["silence"]))
            self._limit = float(params["silence"])
            if self.session is not None:
                self.session.retain()
            self._timer.cancel()
            self._look()
        channel.result(grace=self.grace, refusal=refusal)

    def go_alone(self) -> None:
        """Do not depend on a manager any more: neither its silence nor its end matters."""
        self._alone = True
        if self._timer is not None:
            self._timer.cancel()

    def heard(self) -> None:
        """Note that the manager is alive."""
        self._heard = time.monotonic()
        if self.session is not None and self.session.silent:
            self.session.silent = False

    def _look(self) -> None:
        quiet = time.monotonic() - self._heard
        if quiet >= (self.grace or SILENCE_LIMIT - 1.0):
            self._agent.end()
            return
        session = self.session
        if self.grace and quiet >= self._limit and session is not None and session.attached and not session.silent:
            session.fall_silent()
        self._timer = self._agent.loop.call_later(self._limit / 2 if self.grace else SILENCE_LIMIT, self._look)

    # --- loss ----------------------------------------------------------------------------------
    def streams_ended(self, session: FrameSession, error: Optional[Exception]) -> None:
        """Find out whether the manager has ended, or the link is lost."""
        session.mute()
        if self._alone:
            self._interrupted()
            return
        if self._local or not self.grace or isinstance(error, FrameError):
            self._agent.end()
            return
        line, since = self._ssh_session, time.monotonic()

        def judge() -> None:
            if line is not self._ssh_session or not session.attached:
                return  # the manager is back
            if line is None or line.cut:
                self._interrupted()
            elif session.out_is_broken() and time.monotonic() - since < _SSHD_LIMIT:
                # Where connections cannot be seen, both the end of sshd and that of the manager, while it is sent
                # something, look like this at first.
                self._agent.loop.call_later(_LOOK_EVERY, judge)
            else:
                self._agent.end()

        self._agent.loop.call_later(_SOON, judge)

    def _interrupted(self) -> None:
        if self.session is not None:
            self.session.detach()
        if self._ssh_session is not None:
            self._ssh_session.close()

    # --- return --------------------------------------------------------------------------------
    def rejoin(self, connection: socket.socket, fds: List[int]) -> None:
        """Take the streams of another ssh session, if they come from the manager."""
        loop = self._agent.loop
        head = bytearray()
        os.set_blocking(fds[0], False)

        def over() -> None:
            timer.cancel()
            loop.remove_reader(fds[0])

        def refuse() -> None:
            over()
            _refuse(connection, fds)

        def readable() -> None:
            try:
                data = os.read(fds[0], SECRET_SIZE + TOTAL_SIZE - len(head))
            except BlockingIOError:
                return
            except OSError:
                data = b""
            head.extend(data)
            if not data:
                refuse()
            elif len(head) == SECRET_SIZE + TOTAL_SIZE:
                over()
                self._replace(connection, fds, bytes(head[:SECRET_SIZE]), int.from_bytes(head[SECRET_SIZE:], "big"))

        timer = loop.call_later(_HEAD_LIMIT, refuse)
        loop.add_reader(fds[0], readable)

    def _replace(self, connection: socket.socket, fds: List[int], secret: bytes, total: int) -> None:
        from hmac import compare_digest

        session, old = self.session, self._ssh_session
        known = bool(self._secret) and compare_digest(secret, self._secret)
        if not known or session is None or self._agent.ending:
            _refuse(connection, fds)
            return
        self._heard = time.monotonic()
        self._attempts += 1
        attempt = self._attempts
        session.detach()  # from now on nothing more is received: how much it was is about to be told
        self._ssh_session = line = SshSession(connection)
        if old is not None:
            old.close()

        def attach() -> None:
            if attempt != self._attempts or self._agent.ending:
                _refuse(connection, fds)
                return
            assert session is not None
            try:
                session.rewind(total)
                try:
                    line.note(self._agent.directory)
                except OSError:
                    pass  # the disk is full: the guardian may not be able to end this ssh session after a crash
                os.write(fds[1], KEPT + session.received.to_bytes(TOTAL_SIZE, "big"))
            except (FrameError, OSError):
                _refuse(connection, fds)
                return
            session.attach(fds[0], fds[1])

        _end_of(old, self._agent.loop, attach)

    def close(self) -> None:
        """End the session, and what it came with."""
        if self.session is not None:
            self.session.close()
        if self._ssh_session is not None:
            self._ssh_session.close()


def _end_of(line: Optional[SshSession], loop: Any, then: Callable[[], Any]) -> None:
    """Call `then` when an sshd has ended that has lost its client: it may still hold ports that are wanted again."""
    began = time.monotonic()
    sent: List[int] = []

    def look() -> None:
        waited = time.monotonic() - began
        if line is None or not line.up or waited > 2 * _SSHD_LIMIT:
            then()
            return
        number = signal.SIGTERM if waited < _SSHD_LIMIT else signal.SIGKILL
        if number not in sent:
            sent.append(number)
            line.signal(number)
        loop.call_later(_LOOK_EVERY, look)

    look()


def _refuse(connection: socket.socket, fds: List[int]) -> None:
    try:
        os.write(fds[1], NOT_KEPT + bytes(TOTAL_SIZE))
    except OSError:
        pass  # it has ended itself
    for fd in fds:
        os.close(fd)
    connection.close()
