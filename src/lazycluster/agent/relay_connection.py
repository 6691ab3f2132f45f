"""A connection that a relay carries, at one of its two ends: bytes of a socket as messages, and the other way round."""

from __future__ import annotations

import socket
import struct

from .wire import CREDIT, HEADER, INPUT, INPUT_END, MAX_PAYLOAD, RESULT, FrameError, Outbox, frame

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Dict, Protocol

    from .loop import Loop

    class ConnectionEnd(Protocol):
        """What carries connections."""

        loop: Loop
        connections: Dict[int, RelayedConnection]
        congested: bool

        def send(self, *parts: bytes) -> None:
            """Send to the other end."""


WINDOW = 1024 * 1024  # bytes of a connection that may be under way one way: who reads slowly holds up nobody else
COUNT = struct.Struct("!I")
_CREDIT_UNIT = WINDOW // 4


class RelayedConnection:
    """One connection that is carried: a socket here, and its counterpart at the other end.

    Args:
        end: The end of the relay that it is at.
        number: What both ends call it.
        sock: The socket here.
        connecting: Whether it is still to be seen if the socket can be connected.
    """

    def __init__(self, end: ConnectionEnd, number: int, sock: socket.socket, connecting: bool) -> None:
        self._end, self._number, self._socket = end, number, sock
        self._fd = sock.fileno()
        self._connecting = connecting
        self._credit = WINDOW  # bytes that we may send
        self._ahead = 0  # bytes that were sent to us and not credited yet
        self._written = 0  # bytes that will be credited soon
        self._queue = Outbox()
        self._said_end = self._heard_end = self._shut = False
        self._deaf = False  # whether our side takes nothing any more
        self._closing = False  # whether the other end has closed it: what is queued is delivered, then it is over
        self._reading = self._writing = False
        self.update()

    # --- from here to there --------------------------------------------------------------------
    def _readable(self) -> None:
        try:
            data = self._socket.recv(min(self._credit, MAX_PAYLOAD))
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        if data:
            self._credit -= len(data)
            self._end.send(HEADER.pack(len(data), self._number, INPUT), data)
        else:
            self._said_end = True
            self._end.send(frame(self._number, INPUT_END))
            self._maybe_over()
        self.update()

    # --- from there to here --------------------------------------------------------------------
    def told(self, kind: int, payload: bytes) -> None:
        """Take a message of the other end."""
        if kind == INPUT:
            self._data(payload)
        elif kind == INPUT_END:
            self._heard_end = True
            if not self._connecting:
                self._flush()
        elif kind == CREDIT:  # it has delivered some bytes
            self._credit += COUNT.unpack(payload)[0]
            self.update()
        elif kind == RESULT:
            self._closed()

    def _data(self, payload: bytes) -> None:
        self._ahead += len(payload)
        if self._ahead > WINDOW:
            raise FrameError("more bytes came than were asked for")
        if self._deaf:
            self._delivered(len(payload))
            return
        self._queue.put(payload)
        if not self._connecting:
            self._flush()

    def _closed(self) -> None:
        self._closing = True
        if self._connecting:
            self._drop()
        else:
            self._flush()

    def _writable(self) -> None:
        if self._connecting:
            if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._close()
                return
            self._connecting = False
        self._flush()

    def _flush(self) -> None:
        before = self._queue.size
        try:
            self._queue.write(self._fd)
        except OSError:
            # It takes nothing any more, but may still have something to say: as with ssh, the ways end one by one.
            self._queue.clear()
            self._deaf = True
        self._delivered(before - self._queue.size)
        if self._queue.size == 0:
            if self._closing:
                self._drop()
                return
            if self._heard_end and not self._shut:
                self._shut = True
                try:
                    self._socket.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it has gone already
            self._maybe_over()
        self.update()

    def _delivered(self, count: int) -> None:
        self._written += count
        if self._written >= _CREDIT_UNIT:
            self._ahead -= self._written
            self._end.send(frame(self._number, CREDIT, COUNT.pack(self._written)))
            self._written = 0

    # --- the end -------------------------------------------------------------------------------
    def _maybe_over(self) -> None:
        if self._said_end and self._shut:
            self._drop()
        elif self._said_end and self._deaf:
            self._close()

    def _close(self) -> None:
        """End it, and tell the other end."""
        if self._fd >= 0:
            self._end.send(frame(self._number, RESULT))
        self._drop()

    def _drop(self) -> None:
        if self._fd >= 0:
            self._closing = True
            self._said_end = True
            self._queue.clear()
            self._connecting = False
            self.update()
            self._fd = -1
            self._socket.close()
            self._end.connections.pop(self._number, None)

    def update(self) -> None:
        """Watch the socket for what is wanted of it now."""
        if self._fd < 0:
            return
        free = not (self._connecting or self._said_end or self._closing or self._end.congested)
        reading, writing = free and self._credit > 0, self._connecting or self._queue.size > 0
        loop = self._end.loop
        if reading != self._reading:
            self._reading = reading
            loop.add_reader(self._fd, self._readable) if reading else loop.remove_reader(self._fd)
        if writing != self._writing:
            self._writing = writing
            loop.add_writer(self._fd, self._writable) if writing else loop.remove_writer(self._fd)
