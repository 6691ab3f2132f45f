"""Tunnels through the agent, for hosts whose sshd carries none.

A relay has two ends, which are alike: a process on the host and one on the manager's machine, each forked from the
agent there. A stream connects them, the standard input and output of a further ssh session. An end listens on ports
of its loopback interface, and connects to ports there: only to those that it was told of, so that whoever has taken
over one side reaches nothing else on the other.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct

from . import descriptors
from .loop import Loop
from .wire import CREDIT, HEADER, INPUT, INPUT_END, MAX_PAYLOAD, REQUEST, RESULT, Decoder, FrameError, Outbox, frame

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, Tuple

    from .session import RequestChannel

WINDOW = 1024 * 1024  # bytes of a connection that may be under way one way: who reads slowly holds up nobody else
COUNT = struct.Struct("!I")
_CREDIT_UNIT = WINDOW // 4
LOOPBACK = "127.0.0.1"
_HIGH_WATER, _LOW_WATER = 2 * 1024 * 1024, 512 * 1024  # bytes that wait for the stream
_STREAM_LIMIT = 60.0  # seconds for the stream to come
_READ_SIZE = 256 * 1024
_BACKLOG = 128
_PAUSE = 0.1  # seconds without new connections when there are no descriptors left


class RelayedConnection:
    """One connection that is carried: a socket here, and its counterpart at the other end.

    Args:
        end: The end of the relay that it is at.
        number: What both ends call it.
        sock: The socket here.
        connecting: Whether it is still to be seen if the socket can be connected.
    """

    def __init__(self, end: RelayEnd, number: int, sock: socket.socket, connecting: bool) -> None:
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
        self._reading = False
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
                    pass  # it is closed already
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
        loop.watch_writer(self._fd, self._writable if writing else None)


class RelayEnd:
    """One end of a relay.

    Args:
        loop: Its reactor.
        stream: The descriptors of the stream to the other end: read, and write.
        control: What the agent says comes here, in lines of JSON; it is answered in such lines.
        first: Which of the two it is: they number their connections differently.
    """

    def __init__(self, loop: Loop, stream: Tuple[int, int], control: socket.socket, first: bool) -> None:
        self.loop = loop
        self.connections: Dict[int, RelayedConnection] = {}
        self.congested = False
        self._in, self._out = stream
        self._control = control
        self._lines = b""
        self._next = 1 if first else 2
        self._parity = 0 if first else 1  # of the numbers that the other end gives
        self._decoder = Decoder(COUNT.size)
        self._outbox = Outbox()
        self._writing = False
        self._listeners: Dict[int, socket.socket] = {}
        self._targets: Dict[int, int] = {}
        for fd in {self._in, self._out, control.fileno()}:
            os.set_blocking(fd, False)
        loop.add_reader(self._in, self._readable)
        loop.add_reader(control.fileno(), self._told)
        self._tell(ready=True)

    # --- the stream ----------------------------------------------------------------------------
    def send(self, *parts: bytes) -> None:
        """Send to the other end; stop reading sockets when it takes too little."""
        self._outbox.put(*parts)
        if not self._writing:
            self._write()
        if self._outbox.size > _HIGH_WATER and not self.congested:
            self._congest(True)

    def _write(self) -> None:
        try:
            self._outbox.write(self._out)
        except OSError:
            self.loop.stop()  # the other end has closed it
            return
        self._writing = self._outbox.size > 0
        self.loop.watch_writer(self._out, self._write if self._writing else None)
        if self.congested and self._outbox.size < _LOW_WATER:
            self._congest(False)

    def _congest(self, congested: bool) -> None:
        self.congested = congested
        for connection in list(self.connections.values()):
            connection.update()

    def _readable(self) -> None:
        try:
            data = os.read(self._in, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.loop.stop()
            return
        for number, kind, payload in self._decoder.feed(data):
            connection = self.connections.get(number)
            if kind == REQUEST:
                self._connect(number, payload)
            elif connection is not None:  # else it ended here just now
                connection.told(kind, payload)

    # --- connections ---------------------------------------------------------------------------
    def _connect(self, number: int, payload: bytes) -> None:
        """Connect to the target of a tunnel, as the other end wants."""
        port = self._targets.get(COUNT.unpack(payload)[0])
        if number % 2 != self._parity or number in self.connections:
            raise FrameError("a connection has the number of another")
        try:
            if port is None:
                raise OSError("no such tunnel")
            sock = _tcp_socket()
            status = sock.connect_ex((LOOPBACK, port))
            if status not in (0, errno.EINPROGRESS):
                sock.close()
                raise OSError(status, "refused")
        except OSError:
            self.send(frame(number, RESULT))
            return
        # Whether it is refused is told when it becomes writable.
        self.connections[number] = RelayedConnection(self, number, sock, status != 0)

    def _accept(self, tunnel: int) -> None:
        listener = self._listeners[tunnel]
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors left: those who wait, wait
            self.loop.remove_reader(listener.fileno())
            self.loop.call_later(_PAUSE, lambda: self._watch(tunnel))
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number, self._next = self._next, self._next + 2
        self.send(frame(number, REQUEST, COUNT.pack(tunnel)))
        self.connections[number] = RelayedConnection(self, number, sock, False)

    def _watch(self, tunnel: int) -> None:
        if tunnel in self._listeners:
            self.loop.add_reader(self._listeners[tunnel].fileno(), lambda: self._accept(tunnel))

    # --- what the agent says -------------------------------------------------------------------
    def _told(self) -> None:
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.loop.stop()
            return
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "target" in message:
                self._targets[message["target"]] = message["port"]
                self._tell(done=message["target"])
            elif "listen" in message:
                self._listen(message["listen"], message["port"])
            else:
                self._forget(message["close"])

    def _listen(self, tunnel: int, port: int) -> None:
        listener = _tcp_socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            self._tell(done=tunnel, errno=error.errno, message=error.strerror or str(error))
            return
        self._listeners[tunnel] = listener
        self._watch(tunnel)
        self._tell(done=tunnel)

    def _forget(self, tunnel: int) -> None:
        """Take no more connections of a tunnel; those that there are go on."""
        self._targets.pop(tunnel, None)
        listener = self._listeners.pop(tunnel, None)
        if listener is not None:
            self.loop.remove_reader(listener.fileno())
            listener.close()
        self._tell(done=tunnel)

    def _tell(self, **message: Any) -> None:
        try:
            self._control.send(json.dumps(message).encode("ascii") + b"\n")
        except OSError:
            self.loop.stop()  # the agent has ended, or does not listen


def _tcp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


# --- the process ----------------------------------------------------------------------------------
def _serve(listener: socket.socket, path: str, control: socket.socket, first: bool) -> None:
    """Be the process of an end: wait for the stream, then carry."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.setsid()
    kept = sorted({0, 1, 2, listener.fileno(), control.fileno()})
    for low, high in zip(kept, [*kept[1:], 65536]):
        os.closerange(low + 1, high)
    listener.settimeout(_STREAM_LIMIT)
    giver, _ = listener.accept()  # held: the session on the host ends when this is closed
    listener.close()
    os.unlink(path)
    giver.settimeout(_STREAM_LIMIT)
    _, fds = descriptors.receive(giver, 2)
    loop = Loop()
    RelayEnd(loop, (fds[0], fds[-1]), control, first)
    loop.run()


class _Process:
    """The agent's hold on the process of an end."""

    def __init__(self, channel: RequestChannel) -> None:
        self._channel = channel
        self._lines = b""
        path = os.path.join(channel.agent.directory, "relay-{}.sock".format(os.urandom(4).hex()))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            listener.listen(1)
            self._control, theirs = socket.socketpair()
            try:
                self._pid = os.fork()
            except OSError:
                self._control.close()
                theirs.close()
                os.unlink(path)
                raise
        except OSError:
            listener.close()
            raise
        if self._pid == 0:
            status = 1
            try:
                _serve(listener, path, theirs, bool(channel.params.get("first")))
                status = 0
            except (OSError, FrameError, struct.error):
                pass  # the stream did not come, or what came is none of ours: the end of it is all there is to say
            finally:
                os._exit(status)
        listener.close()
        theirs.close()
        self._control.setblocking(False)
        channel.loop.add_reader(self._control.fileno(), self._readable)
        channel.loop.on_exit(self._pid, self._ended)
        channel.on_control = self._on_control
        channel.on_abandon = self._kill
        channel.event(socket=path)

    def _readable(self) -> None:
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._channel.loop.remove_reader(self._control.fileno())
            return
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            self._channel.event(**json.loads(line))

    def _on_control(self, message: Dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode("ascii") + b"\n")
        except OSError:  # it does not listen
            self._kill()

    def _kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)  # it holds nothing but sockets

    def _ended(self, status: int) -> None:
        self._pid = 0
        if self._control.fileno() >= 0:
            self._readable()
            self._channel.loop.remove_reader(self._control.fileno())
            self._control.close()
        self._channel.result(status=status)


def relay(channel: RequestChannel) -> None:
    """Handle the request `relay`: be one end of a relay, the `first` or the other, as long as the channel is open.

    The event `socket` tells where its stream is awaited: as two descriptors that are sent over that socket. Then, with
    the event `ready`, it takes messages: {"listen": tunnel, "port": port}, {"target": tunnel, "port": port} and
    {"close": tunnel}, each of which is answered by the event `done` with the tunnel, and `errno` if that failed.
    """
    _Process(channel)
