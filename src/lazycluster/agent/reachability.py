"""Probe of which hosts reach each other: a listener that answers keyed challenges, and dials to those of others."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import errno
import os
import struct
import time
from _operator import _compare_digest as compare_digest  # hmac and hashlib would load all of OpenSSL

from .interfaces import interface_addresses
from .processes import explained

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from hashlib import blake2s
    from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

    from .loop import Loop, Timer
    from .session import RequestChannel
else:
    from _collections import deque

    try:
        from _blake2 import blake2s
    except ImportError:
        from hashlib import blake2s

_MOST_OPEN = 64  # dials at once
_MOST_YOUNG = 32  # of these, dials that have begun a moment ago: more would only wait for each other
_YOUNG = 0.5  # seconds
_TICK = 0.1  # seconds from one look at the ages of dials to the next
_MOST_CALLERS = 512  # connections at once that have not asked yet; those that are not ours are among them
_MOST_ANSWERED = 128  # connections at once that have been answered; whoever has asked has closed the older ones
_DIAL_LIMIT = 2.0  # seconds for one dial
_CALLER_LIMIT = 5.0  # seconds for a caller to ask; one who is late gives up before
_AGAIN_LIMIT = 1.0  # seconds for one that was not answered, the second time
_ROUND_LIMIT = 6.0  # seconds for all dials together; then they go on only while there are answers, each within
_STALL_LIMIT = 1.0  # seconds
_LONGEST_ROUND = 20.0  # seconds for all dials, however many are answered
_LIFETIME = 60.0  # seconds, after which the listeners close whatever the manager does
_NONCE, _MAC = 16, 16  # bytes
_BODY = struct.Struct(">I16s")  # of an answer: which host, and the address that was reached
_BY_RESET = struct.pack("ii", 1, 0)  # for SO_LINGER
_NO_ANSWER = "no answer"
_OTHER_PROGRAM = "other program"
_NOT_CONNECTED = (errno.EAGAIN, errno.ENOTCONN)
_NO_ROUTE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES)


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _packed(address: str) -> bytes:
    return socket.inet_pton(_family(address), address).rjust(16, b"\0")


def _unpacked(data: bytes, like: str) -> str:
    return socket.inet_ntop(_family(like), data if ":" in like else data[12:])


# --- who answers -------------------------------------------------------------------------------------
class _Key:
    """The secret of one probe, which the hosts have from the manager."""

    def __init__(self, digits: str) -> None:
        self._key = bytes.fromhex(digits)

    def question(self, nonce: bytes) -> bytes:
        """Return what a host says first: nobody else is answered."""
        return nonce + self._mac(b"question", nonce)

    def is_question(self, data: bytes) -> bool:
        """Tell whether one who knows the key has said this."""
        return compare_digest(data, self.question(data[:_NONCE]))

    def answer(self, question: bytes, body: bytes) -> bytes:
        """Return what proves to whoever has asked which host has answered."""
        return body + self._mac(b"answer", question[:_NONCE] + body)

    def _mac(self, what: bytes, data: bytes) -> bytes:
        return blake2s(what + data, digest_size=_MAC, key=self._key).digest()


_QUESTION_SIZE, _ANSWER_SIZE = _NONCE + _MAC, _BODY.size + _MAC


class _Listener:
    """Listens on one address and port, and tells those who know the key which host this is."""

    def __init__(self, loop: "Loop", key: _Key, me: int, address: str, port: int) -> None:
        self._loop, self._key = loop, key
        self._body = _BODY.pack(me, _packed(address))
        self._callers: "Dict[socket.socket, float]" = {}  # who has not asked yet, and until when each may stay
        self._answered: "Deque[socket.socket]" = deque()
        self._timer: "Optional[Timer]" = None
        self._socket = socket.socket(_family(address), socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((address, port))
            self._socket.listen(_MOST_CALLERS)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        while True:
            try:
                caller = self._accepted()
            except OSError:
                return
            if len(self._callers) >= _MOST_CALLERS:
                caller.close()
                continue
            self._take(caller)

    def _accepted(self) -> socket.socket:
        fd = self._socket._accept()[0]  # type: ignore[attr-defined]
        return socket.socket(self._socket.family, socket.SOCK_STREAM, 0, fd)

    def _take(self, caller: socket.socket) -> None:
        caller.setblocking(False)
        if self._has_asked(caller):  # with much to do, the question has come already
            return
        self._callers[caller] = time.monotonic() + _CALLER_LIMIT
        if self._timer is None:
            self._timer = self._loop.call_later(_CALLER_LIMIT, self._drop_overdue)
        self._loop.add_reader(caller.fileno(), lambda: self._asked(caller))

    def _asked(self, caller: socket.socket) -> None:
        self._forget(caller)
        if not self._has_asked(caller):
            caller.close()

    def _has_asked(self, caller: socket.socket) -> bool:
        """Answer a question, or have done with whoever says something else; returns False if nothing was said."""
        try:
            question = caller.recv(_QUESTION_SIZE)
            if len(question) == _QUESTION_SIZE and self._key.is_question(question):
                caller.send(self._key.answer(question, self._body))
                # Who has asked closes first: otherwise the port would be kept for a minute (TIME_WAIT).
                self._answered.append(caller)
                if len(self._answered) > _MOST_ANSWERED:
                    self._answered.popleft().close()
                return True
        except BlockingIOError:
            return False
        except OSError:
            pass
        caller.close()
        return True

    def _forget(self, caller: socket.socket) -> None:
        self._loop.remove_reader(caller.fileno())
        del self._callers[caller]

    def _drop_overdue(self) -> None:
        now, self._timer = time.monotonic(), None
        for caller, due in list(self._callers.items()):
            if due > now:
                self._timer = self._loop.call_later(due - now, self._drop_overdue)
                return
            self._forget(caller)
            caller.close()

    def close(self) -> None:
        """Stop listening."""
        if self._timer is not None:
            self._timer.cancel()
        for caller in list(self._callers):
            self._forget(caller)
            caller.close()
        while self._answered:
            self._answered.popleft().close()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


# --- who asks ----------------------------------------------------------------------------------------
class _Dial:
    """A connection to one address and port, and the question who is there.

    Attributes:
        limit: After how many seconds it is given up.
        since: When it has begun, by the monotonic clock.
        young: Whether that is a moment ago.
        reached: The address of the listener, as its own host knows it, if the right host has answered.
        problem: Why nothing is proven, "" if it is.
    """

    def __init__(
        self, loop: "Loop", key: _Key, peer: int, address: str, port: int, bare: bool, limit: float = _DIAL_LIMIT
    ) -> None:
        self.peer, self.address, self.port, self.limit = peer, address, port, limit
        self.since, self.young = 0.0, False
        self.reached = self.problem = ""
        self._loop, self._key, self._bare = loop, key, bare
        self._question = key.question(os.urandom(_NONCE))
        self._answer = b""
        self._is_connected = self._is_over = False
        self._socket: "Optional[socket.socket]" = None

    def begin(self, on_end: "Callable[[_Dial], Any]") -> None:
        """Connect; `on_end` is called once it is known what comes of that."""
        self._on_end = on_end
        self.since = time.monotonic()
        try:
            self._socket = socket.socket(_family(self.address), socket.SOCK_STREAM)
            # It is closed by a reset, so that no port stays behind for a minute (TIME_WAIT).
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _BY_RESET)
            self._socket.setblocking(False)
            status = self._socket.connect_ex((self.address, self.port))
        except OSError as error:
            status = error.errno or errno.EINVAL
        if status not in (0, errno.EINPROGRESS) or self._socket is None:
            self._loop.call_soon(lambda: self._end(_why(status)))
        elif self._bare:
            self._loop.add_writer(self._socket.fileno(), self._connected)
        else:
            self._ask()  # to a host nearby, the connection is there already

    def _ask(self) -> None:
        assert self._socket is not None
        try:
            self._socket.send(self._question)
        except OSError as error:
            if error.errno in _NOT_CONNECTED and not self._is_connected:
                self._loop.add_writer(self._socket.fileno(), self._connected)
            else:
                why = _why(error.errno)
                self._loop.call_soon(lambda: self._end(why))
            return
        self._loop.add_reader(self._socket.fileno(), self._answered)

    def _connected(self) -> None:
        assert self._socket is not None
        self._loop.remove_writer(self._socket.fileno())
        status = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._is_connected = True
        if status:
            self._end(_why(status))
        elif self._bare:  # a service of the cluster listens there, which asks for a certificate
            self.reached = self.address
            self._end("")
        else:
            self._ask()

    def _answered(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_ANSWER_SIZE - len(self._answer))
        except OSError:
            data = b""
        self._answer += data
        if data and len(self._answer) < _ANSWER_SIZE:
            return
        body = self._answer[: _BODY.size]
        if not compare_digest(self._answer, self._key.answer(self._question, body)):
            self._end(_OTHER_PROGRAM)
            return
        who, reached = _BODY.unpack(body)
        if who != self.peer:
            self._end("host {}".format(who))
            return
        self.reached = _unpacked(reached, self.address)
        self._end("")

    def _end(self, problem: str) -> None:
        if self._is_over:
            return
        self.close()
        self.problem = problem
        self._on_end(self)

    def give_up(self) -> None:
        """Do not wait any longer."""
        self._end(_NO_ANSWER)

    def again(self) -> "_Dial":
        """Return another try."""
        return _Dial(self._loop, self._key, self.peer, self.address, self.port, self._bare, _AGAIN_LIMIT)

    def close(self) -> None:
        """Release what it holds; nothing comes of it any more."""
        self._is_over = True
        if self._socket is not None and self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()


def _why(status: "Optional[int]") -> str:
    if status == errno.ECONNREFUSED:
        return "refused"
    if status in (errno.ETIMEDOUT, errno.ECONNRESET):
        return _NO_ANSWER
    if status in _NO_ROUTE:
        return "unreachable"
    return explained(os.strerror(status or errno.EINVAL))


class _Participant:
    """Part of one host in a probe: it listens, dials when it is told whom, and reports the results."""

    def __init__(self, channel: "RequestChannel") -> None:
        params = channel.params
        self._channel, self._loop = channel, channel.loop
        self._me = int(params["me"])
        self._key = _Key(params["key"])
        self._own = interface_addresses()
        self._listeners: "List[_Listener]" = []
        self._waiting: "Deque[_Dial]" = deque()
        self._open: "Dict[_Dial, None]" = {}
        self._young = 0
        self._is_late = False
        self._began = self._answered = 0.0  # when the dials began, and when one was answered last
        self._failed: "List[List[Any]]" = []
        self._reached: "Dict[Tuple[int, str], str]" = {}
        self._deadline: "Optional[Timer]" = None
        self._tick: "Optional[Timer]" = None
        channel.on_control = self._dial_all
        channel.on_abandon = self._close
        self._timer = self._loop.call_later(_LIFETIME, self._overdue)
        self._listen(params["ports"], params.get("address") or "")

    def _listen(self, ports: "List[int]", stated: str) -> None:
        here = [stated] if stated in self._own else self._own
        taken, problem = [], ""
        for address in here:
            for port in ports:
                try:
                    self._listeners.append(_Listener(self._loop, self._key, self._me, address, port))
                except OSError as error:
                    if error.errno in (errno.EADDRINUSE, errno.EACCES):
                        taken.append(port)
                    else:
                        problem = "{}: {}".format(address, explained(error.strerror))
        self._channel.event(
            state="listening",
            addresses=[stated] if stated else self._own,
            own=self._own,
            taken=sorted(set(taken)),
            problem=problem,
        )

    def _dial_all(self, message: "Dict[str, Any]") -> None:
        """Dial as told: [host, address, ports where its listener is, ports of services that run], ..."""
        # Each begins with the host behind itself: otherwise all would dial the first one at once.
        for peer, address, ports, running in sorted(
            message["dial"], key=lambda entry: (entry[0] <= self._me, entry[0])
        ):
            if peer == self._me:
                continue
            for port, bare in [*((port, False) for port in ports), *((port, True) for port in running)]:
                if address in self._own:
                    self._failed.append([peer, address, port, "own"])
                else:
                    self._waiting.append(_Dial(self._loop, self._key, peer, address, port, bare))
        self._is_late = False
        self._began = self._answered = time.monotonic()
        self._deadline = self._loop.call_later(_ROUND_LIMIT, self._late)
        self._go_on()

    def _late(self) -> None:
        """Give up what is not over, too many have not answered; or say that there are still answers."""
        now = time.monotonic()
        left = min(self._answered + _STALL_LIMIT, self._began + _LONGEST_ROUND) - now
        if left > 0:
            self._channel.event(state="dialing")
            self._deadline = self._loop.call_later(left, self._late)
            return
        self._is_late = True
        while self._waiting:
            dial = self._waiting.popleft()
            self._failed.append([dial.peer, dial.address, dial.port, "not tried"])
        for dial in list(self._open):
            dial.give_up()

    def _go_on(self) -> None:
        while self._waiting and len(self._open) < _MOST_OPEN and self._young < _MOST_YOUNG:
            self._begin(self._waiting.popleft())
        if not self._open and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            reached = [[peer, address, bound] for (peer, address), bound in self._reached.items() if bound != address]
            self._channel.event(state="dialed", failed=self._failed, translated=reached)
            self._failed, self._reached = [], {}

    def _begin(self, dial: _Dial) -> None:
        self._open[dial] = None
        dial.young = True
        self._young += 1
        dial.begin(self._ended)
        if self._tick is None:
            self._tick = self._loop.call_later(_TICK, self._look_at_ages)

    def _look_at_ages(self) -> None:
        now, self._tick = time.monotonic(), None
        for dial in list(self._open):
            if dial.young and now - dial.since >= _YOUNG:
                dial.young = False
                self._young -= 1
            if now - dial.since >= dial.limit:
                dial.give_up()
        self._go_on()
        if self._open and self._tick is None:
            self._tick = self._loop.call_later(_TICK, self._look_at_ages)

    def _ended(self, dial: _Dial) -> None:
        self._open.pop(dial, None)
        if dial.young:
            dial.young = False
            self._young -= 1
        if dial.problem != _NO_ANSWER:
            self._answered = time.monotonic()
        if dial.problem in (_NO_ANSWER, _OTHER_PROGRAM) and dial.limit == _DIAL_LIMIT and not self._is_late:
            self._waiting.append(dial.again())  # where very many dial at once, a packet is lost easily
        elif dial.problem:
            self._failed.append([dial.peer, dial.address, dial.port, dial.problem])
        else:
            self._reached[dial.peer, dial.address] = dial.reached
        self._go_on()

    def _overdue(self) -> None:
        self._close()
        self._channel.result()

    def _close(self) -> None:
        self._timer.cancel()
        for timer in (self._deadline, self._tick):
            if timer is not None:
                timer.cancel()
        self._waiting.clear()
        for dial in self._open:
            dial.close()
        for listener in self._listeners:
            listener.close()
        self._open.clear()
        self._listeners.clear()


def reach(channel: "RequestChannel") -> None:
    """Handle the request `reach`: prove to other hosts that they reach this one, and find out which it reaches.

    It listens on the `ports` of its own addresses (of the one `address` if that was stated and is its own), and says so
    in the event "listening", with its addresses. Told to `dial` others, it says in the event "dialed" what `failed`:
    [host, address, port, why], and which addresses were `translated` on the way: [host, address, as that host knows
    it]. All that ends when the manager drops the request.

    Who answers is told by a secret `key` of the probe, which only the hosts of the group have: a port that answers
    otherwise belongs to somebody else's machine.
    """
    _Participant(channel)
