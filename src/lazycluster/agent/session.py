"""One connection of a manager to the agent: frames in and out, and the channels that they belong to."""

from __future__ import annotations

import errno
import os
import select
import time

from . import wire
from .processes import explained

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict

    from .loop import Loop
    from .server import Agent
    from .spool import Spool

_READ_SIZE = 256 * 1024
_HIGH_WATER = 1024 * 1024  # bytes queued for the manager above which sources are not read
_LOW_WATER = 256 * 1024
_IN_MEMORY = 4 * 1024 * 1024  # bytes that wait in memory while the manager cannot be reached; the rest goes to a file
_FLUSH_LIMIT = 2.0  # seconds that the manager gets to take what is left at the end


def _nothing(*_: Any) -> None:
    pass


class RequestChannel:
    """The agent's side of one request.

    A handler assigns `on_input`, `on_input_end`, `on_control`, `on_drain` and `on_abandon` as it needs them, and ends
    the channel with one call of `result` or `fail`; what is sent after that is dropped.

    Attributes:
        params: What the manager asked for.
        loop: The agent's reactor.
        agent: The agent.
    """

    def __init__(self, session: "FrameSession", number: int, params: Dict[str, Any]) -> None:
        self.params = params
        self.agent: "Agent" = session.agent
        self.loop: "Loop" = session.agent.loop
        self.open = True
        self.on_input: Callable[[bytes], Any] = _nothing
        self.on_input_end: Callable[[], Any] = _nothing
        self.on_control: Callable[[Dict[str, Any]], Any] = _nothing
        self.on_drain: Callable[[], Any] = _nothing
        self.on_abandon: Callable[[], Any] = _nothing
        self._session = session
        self._number = number
        self._consumed = 0

    @property
    def writable(self) -> bool:
        """True if more may be sent now; if not, stop reading the source until `on_drain` is called."""
        return self._session.writable

    def _send(self, kind: int, payload: bytes) -> None:
        if self.open:
            self._session.send(wire.frame(self._number, kind, payload))

    def stdout(self, data: bytes) -> None:
        """Send standard output of the work."""
        self._send(wire.STDOUT, data)

    def stderr(self, data: bytes) -> None:
        """Send standard error of the work."""
        self._send(wire.STDERR, data)

    def output(self, data: bytes) -> None:
        """Send a part of a binary result, at most `wire.MAX_PAYLOAD` bytes."""
        self._send(wire.OUTPUT, data)

    def event(self, **fields: Any) -> None:
        """Tell the manager something while the work goes on."""
        if self.open:
            self._session.send(wire.json_frame(self._number, wire.EVENT, fields))

    def consumed(self, count: int) -> None:
        """Allow the manager to send `count` more bytes of input."""
        self._consumed += count
        if self._consumed >= wire.CREDIT_UNIT and self.open:
            self._send(wire.CREDIT, self._consumed.to_bytes(4, "big"))
            self._consumed = 0

    def result(self, **fields: Any) -> None:
        """End the channel with success."""
        self._finish(dict(fields, ok=True))

    def fail(self, error: str, message: str, **evidence: Any) -> None:
        """End the channel with an error: its kind, a sentence, and whatever proves it."""
        self._finish(dict(evidence, ok=False, error=error, message=message))

    def attempt(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call one of the handler's functions; if the system refuses something, the request fails, and only it."""
        try:
            callback(*args)
        except OSError as error:
            text = explained(error.strerror or str(error))
            self.fail("os", "{}: {}".format(text, error.filename) if error.filename else text, errno=error.errno)
            if callback != self.on_abandon:
                self.attempt(self.on_abandon)

    def _finish(self, message: Dict[str, Any]) -> None:
        if self.open:
            self._session.send(wire.json_frame(self._number, wire.RESULT, message))
            self.open = False
            self._session.channels.pop(self._number, None)


class FrameSession:
    """Frames to and from one manager, over streams that may be replaced.

    Attributes:
        agent: Whose it is.
        channels: The open channels by their numbers.
        silent: Whether nobody seems to listen, though the streams are there.
    """

    def __init__(self, agent: "Agent") -> None:
        self.agent = agent
        self.channels: Dict[int, RequestChannel] = {}
        self.silent = False
        self._in = self._out = -1
        self._muted = False
        self._decoder = wire.Decoder()
        self._outbox = wire.Outbox()
        self._told = 0  # of how many bytes the manager knows that they have arrived
        self._writing = False
        self._closed = False

    # --- streams -------------------------------------------------------------------------------
    @property
    def attached(self) -> bool:
        """True if there are streams."""
        return self._in >= 0

    @property
    def received(self) -> int:
        """Bytes that have come from the manager."""
        return self._decoder.total

    def attach(self, fd_in: int, fd_out: int) -> None:
        """Go on with these streams, which this closes."""
        os.set_blocking(fd_in, False)
        os.set_blocking(fd_out, False)
        self._in, self._out = fd_in, fd_out
        self.silent = self._muted = False
        self.agent.loop.add_reader(fd_in, self._readable)
        self._flush()

    def retain(self) -> None:
        """From now on, retain what is sent until it has been acknowledged."""
        self._outbox.retains = True

    def rewind(self, total: int) -> None:
        """Have everything after the first `total` bytes sent again.

        Raises:
            FrameError: If that cannot be.
        """
        self._outbox.rewind(total)

    def detach(self) -> None:
        """Close the streams; what is sent waits for others."""
        if not self.attached:
            return
        self.mute()
        for fd in {self._in, self._out}:
            try:
                os.close(fd)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
        self._in = self._out = -1
        self._drained()

    def mute(self) -> None:
        """Neither read nor write any more; the streams stay open, to be looked at."""
        if not self._muted:
            self._muted = True
            self.agent.loop.remove_reader(self._in)
            if self._writing:
                self._writing = False
                self.agent.loop.remove_writer(self._out)

    def fall_silent(self) -> None:
        """Do not count on the manager taking anything soon."""
        self.silent = True
        self._drained()

    def out_is_broken(self) -> bool:
        """Return whether nobody can read what is sent."""
        poll = select.poll()
        poll.register(self._out, 0)
        return bool(poll.poll(0))

    # --- out -----------------------------------------------------------------------------------
    @property
    def writable(self) -> bool:
        """True if more should be sent now."""
        box = self._outbox
        if self.attached and not self.silent:
            return box.size < _HIGH_WATER and box.held < wire.HELD
        return box.size < _IN_MEMORY or not self._spool().full

    def _spool(self) -> "Spool":
        from .spool import Spool

        if self._outbox.spool is None:
            self._outbox.spool = Spool(self.agent.directory)
        return self._outbox.spool

    def send(self, data: bytes) -> None:
        """Queue a frame and write what can be written at once."""
        if self._closed:
            return
        self._outbox.put(data)
        if self.attached and not self._writing and not self._muted:
            self._flush()

    def _flush(self) -> None:
        try:
            self._outbox.write(self._out)
        except OSError as error:
            self.agent.streams_ended(self, error)
            return
        waiting = self._outbox.size > 0
        if waiting != self._writing:
            self._writing = waiting
            if waiting:
                self.agent.loop.add_writer(self._out, self._drain)
            else:
                self.agent.loop.remove_writer(self._out)

    def _drain(self) -> None:
        before = self._outbox.size
        self._flush()
        if before >= _LOW_WATER > self._outbox.size:
            self._drained()

    def _drained(self) -> None:
        if not self._closed:
            for channel in list(self.channels.values()):
                channel.attempt(channel.on_drain)

    # --- in ------------------------------------------------------------------------------------
    def _readable(self) -> None:
        try:
            data = os.read(self._in, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.agent.streams_ended(self, error)
            return
        if not data:
            self.agent.streams_ended(self, None)
            return
        self.agent.heard()
        try:
            for number, kind, payload in self._decoder.feed(data):
                self._dispatch(number, kind, payload)
        except wire.FrameError as error:
            self.agent.streams_ended(self, error)
            return
        if self._outbox.retains and self.received - self._told >= wire.ACK_UNIT:
            self._acknowledge()

    def _acknowledge(self) -> None:
        self._told = self.received
        self.send(wire.ack_frame(self._told))

    def _dispatch(self, number: int, kind: int, payload: bytes) -> None:
        if kind == wire.REQUEST:
            channel = RequestChannel(self, number, wire.loads(payload))
            self.channels[number] = channel
            self.agent.handle(channel)
            return
        if kind == wire.ACK:
            self._acknowledged(int.from_bytes(payload, "big"))
            return
        known = self.channels.get(number)
        if known is None:
            return  # it ended while this was on its way
        if kind == wire.INPUT:
            known.attempt(known.on_input, payload)
        elif kind == wire.INPUT_END:
            known.attempt(known.on_input_end)
        elif kind == wire.CONTROL:
            self._control(number, known, wire.loads(payload))

    def _acknowledged(self, total: int) -> None:
        before = self._outbox.held
        if self._outbox.retains:
            self._outbox.acknowledge(total)
        self._acknowledge()  # it is the manager's heartbeat, too
        if before >= wire.HELD > self._outbox.held:
            self._drained()

    def _control(self, number: int, channel: RequestChannel, message: Dict[str, Any]) -> None:
        if message.get("abandon"):
            channel.open = False
            self.channels.pop(number, None)
            channel.attempt(channel.on_abandon)
        else:
            channel.attempt(channel.on_control, message)

    # --- end -----------------------------------------------------------------------------------
    def flush_and_close(self) -> None:
        """Write what is queued, if the manager takes it soon, then close."""
        deadline = time.monotonic() + _FLUSH_LIMIT
        poll = select.poll()
        if self.attached:
            poll.register(self._out, select.POLLOUT)
        while self.attached and self._outbox.size and time.monotonic() < deadline:
            poll.poll(50)
            try:
                self._outbox.write(self._out)
            except OSError:
                break
        self.close()

    def close(self) -> None:
        """Close the streams and tell the open channels that nobody listens any more."""
        if self._closed:
            return
        self._closed = True
        self.detach()
        self._outbox.clear()
        for channel in list(self.channels.values()):
            channel.open = False
            channel.attempt(channel.on_abandon)
        self.channels.clear()
