"""A process that a zygote forks for a request: what goes in, what comes out, and its end."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct

from . import oom
from .commands import Feed, outcome
from .processes import ProcessTree, Pump, Termination, explained, pipe, start_time
from .wire import MAX_PAYLOAD

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

    from .session import RequestChannel
    from .zygotes import Interpreter

LINGER = 0.05  # seconds for which output is awaited that a process left to others when it ended
_HEAD = struct.Struct("!I")
_RESERVE = 64  # descriptors that are left to other requests, and to the next steps of this one


class CallAnswer:
    """Answer that a child of a zygote sends over its socket: a description, then as many bytes as that says.

    Attributes:
        description: The description, once it has come.
        count: How many bytes have come so far.
    """

    def __init__(self, channel: RequestChannel) -> None:
        self.description: Optional[Dict[str, Any]] = None
        self.count = 0
        self._channel = channel
        self._head = bytearray()
        self._left = 0

    @property
    def complete(self) -> bool:
        """True if all of it has come."""
        return self.description is not None and self._left == 0

    def feed(self, data: bytes) -> None:
        """Take a piece, and pass on what is for the manager."""
        self.count += len(data)
        if self.description is None:
            self._parse(data)
        else:
            self._relay(data)

    def _parse(self, data: bytes) -> None:
        self._head += data
        if len(self._head) < _HEAD.size:
            return
        end = _HEAD.size + _HEAD.unpack_from(self._head)[0]
        if len(self._head) >= end:
            description = json.loads(bytes(self._head[_HEAD.size : end]))
            self._left = description["size"]
            self.description = description
            self._relay(bytes(self._head[end:]))
            self._head.clear()

    def _relay(self, data: bytes) -> None:
        self._left -= len(data)
        if data:
            self._channel.output(data)


class ForkedCall:
    """A process that a zygote forks for a request.

    Args:
        channel: The request.
        interpreter: Where it is forked.
        message: What the child is told.
        on_done: Is called with the fields of the result when it is over.
    """

    def __init__(
        self,
        channel: RequestChannel,
        interpreter: Interpreter,
        message: Dict[str, Any],
        on_done: Callable[[Dict[str, Any]], Any],
    ) -> None:
        self._channel, self._interpreter, self._on_done = channel, interpreter, on_done
        self._queue = interpreter.queue
        self._message = message
        self._clock: Any = None
        self._killed_before = oom.note()
        self._task = message.get("task") or ""
        self._pid = 0
        self._failed = ""  # why it could not be forked
        self._tree = ProcessTree(self._task)
        self._status: Optional[int] = None
        self._exited = False  # whether the process has ended
        self._over = False
        self._wanted_end = False
        self._ending: Optional[Termination] = None
        self._linger: Any = None
        self._early: List[bytes] = []  # input that came before the process was there
        self._printed = 0
        self._seen = -1
        self._pumps: List[Pump] = []  # of both outputs and of the answer, once it is forked
        self._answer = CallAnswer(channel)
        self._feed: Optional[Feed] = None
        channel.on_input = self._early.append
        channel.on_control = lambda said: self.signal(str(said.get("signal", "END")))
        channel.on_abandon = self.end
        channel.on_drain = self._resume

    def start(self) -> None:
        """Have it forked, now or when there are descriptors for it."""
        if self._wanted_end:
            self._finish()
            return
        channel = self._channel
        try:
            out, their_out, err, their_err, ours, theirs, feed = _streams()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._queue.wait(self.start):
                return
            self._failed = error.strerror or str(error)  # no other end of a call will let it begin
            self._finish()
            return
        self._queue.running += 1
        self._pumps = [
            Pump(channel, out, self._stdout, self._maybe_over),
            Pump(channel, err, self._stderr, self._maybe_over),
            Pump(channel, ours.detach(), self._answer.feed, self._maybe_over, MAX_PAYLOAD),
        ]
        self._feed = Feed(channel, feed)
        for data in self._early:
            channel.on_input(data)
        self._early.clear()
        fresh = bool(channel.params.get("fresh"))
        self._interpreter.fork(self._message, [their_out, their_err, theirs.detach()], fresh, self._report)

    def _stdout(self, data: bytes) -> None:
        self._printed += len(data)
        self._channel.stdout(data)

    def _stderr(self, data: bytes) -> None:
        self._printed += len(data)
        self._channel.stderr(data)

    def _report(self, said: Dict[str, Any]) -> None:
        if "status" in said:
            self._failed = said.get("failed", "")
            self._exited = True
            self._status = said["status"]
            self._maybe_over()
            if not self._over:
                self._await_rest()
        else:
            self._pid = said["pid"]
            self._tree.add(self._pid, start_time(self._pid))
            self._channel.event(pid=self._pid)
            if self._message.get("limits"):
                from .limits import Clock

                self._clock = Clock(self._channel.loop, self._message["limits"], self.end)
            if self._wanted_end:
                self.end()

    def _resume(self) -> None:
        for pump in self._pumps:
            pump.resume()

    # --- the end -------------------------------------------------------------------------------
    def _maybe_over(self) -> None:
        if self._ending is not None:
            return  # a call that is being ended is over when nothing is left of it
        if not self._pumps or not all(pump.ended for pump in self._pumps):
            return
        if self._exited or self._answer.complete:
            self._finish()

    def _await_rest(self) -> None:
        """Wait for what the process wrote before it ended, though children of it may hold its streams open."""
        if self._over or self._ending is not None:
            return
        loop = self._channel.loop
        moved = self._printed + self._answer.count
        taken = self._channel.writable or not self._channel.open
        if moved == self._seen and taken:
            self._finish()
            return
        # While nothing is taken nothing moves; from then on it gets the whole time again.
        self._seen = moved if taken else -1
        self._linger = loop.call_later(LINGER, self._await_rest)

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        if self._linger is not None:
            self._linger.cancel()
        self._release()
        fields: Dict[str, Any] = {"exit": None, "signal": None}
        if self._status is not None:
            fields = outcome(self._status)
        elif self._wanted_end and not self._pid:
            fields["signal"] = int(signal.SIGTERM)
        if self._answer.complete:
            description = dict(self._answer.description or {})
            self._interpreter.note(description.pop("imported", ()))
            fields.update(description)
        elif self._failed:
            fields.update(status="failed", message="no process can be started on the host: " + explained(self._failed))
        else:
            fields["status"] = "exited" if fields["exit"] is not None else "killed"
            if fields["signal"] == signal.SIGKILL:
                fields.update(oom.evidence(self._killed_before))
        if self._clock is not None:
            self._clock.stop()
            if self._clock.over:
                fields["limit"] = "wall"
        self._on_done(fields)

    def _release(self) -> None:
        for pump in self._pumps:
            pump.close()
        if self._feed is not None:
            self._feed.close()
            self._queue.running -= 1
        self._queue.next()  # also if this one was never forked: it may have been the one whose turn it was

    # --- signals -------------------------------------------------------------------------------
    def signal(self, name: str) -> None:
        """Send a signal to the process group by name, or end the whole tree in stages for "END"."""
        if name == "END" or not self._pid:
            self.end()
        elif not self._exited:
            number = getattr(signal, "SIG" + name)
            try:
                os.killpg(self._pid, number)
            except ProcessLookupError:  # it was forked so recently that it has no group yet
                self.end()
            except PermissionError:
                pass

    def end(self) -> None:
        """End the process and all that it started."""
        self._wanted_end = True
        if self._queue.leave(self.start):
            self._finish()
        elif self._pid and self._ending is None and not self._over:
            self._ending = Termination(self._channel.loop, self._tree.living, self._ended)

    def _ended(self) -> None:
        self._ending = None
        if self._exited:
            self._finish()


def _streams() -> Any:
    """Return the ends of two pipes and of a socket pair: out, theirs, err, theirs, ours, theirs, ours once more."""
    fds: List[int] = []
    try:
        fds += pipe()
        fds += pipe()
        ours, theirs = socket.socketpair()
        fds.append(os.dup(ours.fileno()))  # two descriptors of one: what is written ends before what is read
        if max(fds) > os.sysconf("SC_OPEN_MAX") - _RESERVE:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    ours.setblocking(False)
    return (*fds[:4], ours, theirs, fds[4])
