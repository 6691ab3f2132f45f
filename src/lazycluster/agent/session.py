"""One connection of a manager to the agent: frames in and out, and the channels that they belong to."""

from __future__ import annotations

import errno
import os

from . import wire

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional, Protocol

    from .loop import Loop

    class Owner(Protocol):
        """What a session needs of the agent."""

        loop: Loop
        directory: str
        identity: str

        def handle(self, channel: "Channel") -> None:
            """Start the work that a request asks for."""

        def heard(self) -> None:
            """Note that the manager is alive."""

        def session_ended(self, session: "Session", error: Optional[Exception]) -> None:
            """Handle the end of the manager's stream."""


_READ_SIZE = 256 * 1024
_HIGH_WATER = 1024 * 1024  # bytes queued for the manager above which sources are not read
_LOW_WATER = 256 * 1024


def _nothing(*_: Any) -> None:
    pass


class Channel:
    """The agent's side of one request.

    A handler assigns `on_input`, `on_input_end`, `on_control`, `on_drain` and `on_abandon` as it needs them, and ends
    the channel with one call of `result` or `fail`; what is sent after that is dropped.

    Attributes:
        params: What the manager asked for.
        loop: The agent's reactor.
        agent: The agent.
    """

    def __init__(self, session: "Session", number: int, params: Dict[str, Any]) -> None:
        self.params = params
        self.agent: "Owner" = session.agent
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
        """Whether more may be sent now; if not, stop reading the source until `on_drain` is called."""
        return self._session.queued < _HIGH_WATER

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

    def _finish(self, message: Dict[str, Any]) -> None:
        if self.open:
            self._session.send(wire.json_frame(self._number, wire.RESULT, message))
            self.open = False
            self._session.channels.pop(self._number, None)


class Session:
    """The streams to and from one manager."""

    def __init__(self, agent: "Owner", fd_in: int, fd_out: int) -> None:
        self.agent = agent
        self.channels: Dict[int, Channel] = {}
        self._in, self._out = fd_in, fd_out
        self._decoder = wire.Decoder()
        self._outbox = wire.Outbox()
        self._writing = False
        self._closed = False
        os.set_blocking(fd_in, False)
        os.set_blocking(fd_out, False)
        agent.loop.add_reader(fd_in, self._readable)

    # --- out -----------------------------------------------------------------------------------
    @property
    def queued(self) -> int:
        """The bytes that wait for the manager to take them."""
        return self._outbox.size

    def send(self, data: bytes) -> None:
        """Queue a frame and write what can be written at once."""
        if self._closed:
            return
        self._outbox.put(data)
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        try:
            self._outbox.write(self._out)
        except OSError as error:
            self._lost(error)
            return
        waiting = self._outbox.size > 0
        if waiting != self._writing:
            self._writing = waiting
            if waiting:
                self.agent.loop.add_writer(self._out, self._drain)
            else:
                self.agent.loop.remove_writer(self._out)

    def _drain(self) -> None:
        before = self.queued
        self._flush()
        if before >= _LOW_WATER > self.queued and not self._closed:
            for channel in list(self.channels.values()):
                channel.on_drain()

    # --- in ------------------------------------------------------------------------------------
    def _readable(self) -> None:
        try:
            data = os.read(self._in, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
            return
        if not data:
            self._lost(None)
            return
        self.agent.heard()
        try:
            for number, kind, payload in self._decoder.feed(data):
                self._dispatch(number, kind, payload)
        except wire.ProtocolError as error:
            self._lost(error)

    def _dispatch(self, number: int, kind: int, payload: bytes) -> None:
        if kind == wire.REQUEST:
            channel = Channel(self, number, wire.loads(payload))
            self.channels[number] = channel
            self.agent.handle(channel)
            return
        known = self.channels.get(number)
        if known is None:
            return  # it ended while this was on its way
        if kind == wire.INPUT:
            known.on_input(payload)
        elif kind == wire.INPUT_END:
            known.on_input_end()
        elif kind == wire.CONTROL:
            self._control(number, known, wire.loads(payload))

    def _control(self, number: int, channel: Channel, message: Dict[str, Any]) -> None:
        if message.get("abandon"):
            channel.open = False
            self.channels.pop(number, None)
            channel.on_abandon()
        else:
            channel.on_control(message)

    # --- end -----------------------------------------------------------------------------------
    def _lost(self, error: Optional[Exception]) -> None:
        self.close()
        self.agent.session_ended(self, error)

    def flush_and_close(self) -> None:
        """Write what is queued, waiting for the reader, then close."""
        if not self._closed:
            os.set_blocking(self._out, True)
            self._flush()
        self.close()

    def close(self) -> None:
        """Close the streams and tell the open channels that nobody listens any more."""
        if self._closed:
            return
        self._closed = True
        loop = self.agent.loop
        loop.remove_reader(self._in)
        if self._writing:
            loop.remove_writer(self._out)
        for fd in {self._in, self._out}:
            try:
                os.close(fd)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
        self._outbox.clear()
        for channel in list(self.channels.values()):
            channel.open = False
            channel.on_abandon()
        self.channels.clear()
