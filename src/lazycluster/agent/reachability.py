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
    from typing import Any, Deque, Dict, List, Optional, Tuple

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
_TICK = 0.1  # seconds after which all dials are looked at, whatever has happened
_MOST_CALLERS = 512  # connections at once that have not asked yet; those that are not ours are among them
_MOST_ANSWERED = 128  # connections at once that have been answered; whoever has asked has closed the older ones
_DIAL_LIMIT = 2.0  # seconds for one dial
_CALLER_LIMIT = 5.0  # seconds for a caller to ask; one who is late gives up before
_PAUSE = 0.1  # seconds until a listener tries again for which there were no descriptors
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
_NOT_YET = (errno.EAGAIN, errno.ENOTCONN)
_BROKEN = (errno.ECONNRESET, errno.EPIPE)  # of a connection that there was
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
    """Listens on one address and port, and tells those who know the key which host this is.

    Who has asked closes first: otherwise the port would be kept for a minute (TIME_WAIT). So connections that have been
    answered are put by, those of all listeners together.
    """

    def __init__(self, loop: Loop, key: _Key, answered: Deque[int], me: int, address: str, port: int) -> None:
        self._loop, self._key, self._answered = loop, key, answered
        self._body = _BODY.pack(me, _packed(address))
        self._callers: Dict[int, float] = {}  # who has not asked yet, and until when each may stay
        self._timer: Optional[Timer] = None
        self._socket = socket.socket(_family(address), socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((address, port))
            self._socket.listen(_MOST_CALLERS)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._watch()

    def _watch(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        while True:
            try:
                caller: int = self._socket._accept()[0]  # type: ignore[attr-defined]
            except BlockingIOError:
                return
            except OSError:  # no descriptors left
                if self._answered:
                    _close_all(self._answered)
                    continue
                self._loop.remove_reader(self._socket.fileno())  # those who wait, wait
                self._loop.call_later(_PAUSE, self._watch)
                return
            if len(self._callers) >= _MOST_CALLERS:
                os.close(caller)
                continue
            os.set_blocking(caller, False)
            if not self._has_asked(caller):  # with much to do, the question has come already
                self._take(caller)

    def _take(self, caller: int) -> None:
        self._callers[caller] = time.monotonic() + _CALLER_LIMIT
        if self._timer is None:
            self._timer = self._loop.call_later(_CALLER_LIMIT, self._drop_overdue)
        self._loop.add_reader(caller, lambda: self._asked(caller))

    def _asked(self, caller: int) -> None:
        self._forget(caller)
        if not self._has_asked(caller):
            os.close(caller)

    def _has_asked(self, caller: int) -> bool:
        """Answer a question, or have done with whoever says something else; returns False if nothing was said."""
        try:
            question = os.read(caller, _QUESTION_SIZE)
            is_ours = len(question) == _QUESTION_SIZE and self._key.is_question(question)
            if is_ours:
                os.write(caller, self._key.answer(question, self._body))
        except BlockingIOError:
            return False
        except OSError:
            is_ours = False
        if not is_ours:
            os.close(caller)
            return True
        self._answered.append(caller)
        if len(self._answered) > _MOST_ANSWERED:
            os.close(self._answered.popleft())
        return True

    def _forget(self, caller: int) -> None:
        self._loop.remove_reader(caller)
        del self._callers[caller]

    def _drop_overdue(self) -> None:
        now, self._timer = time.monotonic(), None
        for caller, due in list(self._callers.items()):
            if due > now:
                self._timer = self._loop.call_later(due - now, self._drop_overdue)
                return
            self._forget(caller)
            os.close(caller)

    def close(self) -> None:
        """Stop listening."""
        if self._timer is not None:
            self._timer.cancel()
        for caller in list(self._callers):
            self._forget(caller)
            os.close(caller)
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


def _close_all(fds: Deque[int]) -> None:
    while fds:
        os.close(fds.popleft())


# --- who asks ----------------------------------------------------------------------------------------
class _Dial:
    """A connection to one address and port, and the question who is there.

    Attributes:
        is_second: Whether it is another try.
        limit: After how many seconds it is given up.
        since: When it has begun, by the monotonic clock.
        young: Whether that is a moment ago.
        is_asked: Whether it waits for an answer; otherwise for the connection.
        is_over: Whether it is known what comes of it.
        reached: The address of the listener, as its own host knows it, if the right host has answered.
        problem: Why nothing is proven, "" if it is.
    """

    def __init__(self, key: _Key, peer: int, address: str, port: int, bare: bool, is_second: bool = False) -> None:
        self.peer, self.address, self.port = peer, address, port
        self.is_second, self.limit = is_second, _AGAIN_LIMIT if is_second else _DIAL_LIMIT
        self.since, self.young = 0.0, False
        self.is_asked = self.is_over = False
        self.reached = self.problem = ""
        self._key, self._bare = key, bare
        self._question = key.question(os.urandom(_NONCE))
        self._answer = b""
        self._socket: Optional[socket.socket] = None

    def begin(self) -> None:
        """Connect."""
        self.since = time.monotonic()
        try:
            self._socket = socket.socket(_family(self.address), socket.SOCK_STREAM)
            # It is closed by a reset, so that no port stays behind for a minute (TIME_WAIT).
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _BY_RESET)
            self._socket.setblocking(False)
            status = self._socket.connect_ex((self.address, self.port))
        except OSError as error:
            status = error.errno or errno.EINVAL
        if status in (0, errno.EINPROGRESS):
            self.look()  # to a host nearby, the connection is there already
        else:
            self._end(_why(status))

    def fileno(self) -> int:
        """Return the descriptor of a dial that is not over."""
        assert self._socket is not None
        return self._socket.fileno()

    def look(self) -> bool:
        """Go on as far as that is possible without waiting; returns whether it is over."""
        assert self._socket is not None
        try:
            if self.is_asked:
                self._hear(self._socket)
            elif self._bare:
                self._see(self._socket)
            else:
                self._socket.send(self._question)
                self.is_asked = True
        except OSError as error:
            if error.errno not in _NOT_YET:
                self._end(_OTHER_PROGRAM if self.is_asked else _why(error.errno))
        return self.is_over

    def _see(self, connection: socket.socket) -> None:
        """See whether a service of the cluster listens there, which asks for a certificate itself."""
        status = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            self._end(_why(status))
            return
        connection.getpeername()  # fails as long as nobody has answered
        self.reached = self.address
        self._end("")

    def _hear(self, connection: socket.socket) -> None:
        data = connection.recv(_ANSWER_SIZE - len(self._answer))
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
        self.close()
        self.problem = problem

    def give_up(self) -> None:
        """Do not wait any longer."""
        self._end(_NO_ANSWER)

    def again(self) -> _Dial:
        """Return another try."""
        return _Dial(self._key, self.peer, self.address, self.port, self._bare, is_second=True)

    def close(self) -> None:
        """Release what it holds; nothing comes of it any more."""
        self.is_over = True
        if self._socket is not None:
            self._socket.close()


def _why(status: Optional[int]) -> str:
    if status == errno.ECONNREFUSED:
        return "refused"
    if status == errno.ETIMEDOUT:
        return _NO_ANSWER
    if status in _BROKEN:
        return _OTHER_PROGRAM
    if status in _NO_ROUTE:
        return "unreachable"
    return explained(os.strerror(status or errno.EINVAL))


class _Participant:
    """Part of one host in a probe: it listens, dials when it is told whom, and reports the results."""

    def __init__(self, channel: RequestChannel) -> None:
        params = channel.params
        self._channel, self._loop = channel, channel.loop
        self._me = int(params["me"])
        self._key = _Key(params["key"])
        self._own = interface_addresses()
        self._listeners: List[_Listener] = []
        self._callers: Deque[int] = deque()  # connections of others that have been answered
        self._waiting: Deque[_Dial] = deque()
        self._open: Dict[_Dial, None] = {}
        self._young = 0
        self._watched = -1  # the descriptor of the newest dial
        self._began = self._answered = 0.0  # when the dials began, and when one was answered last
        self._failed: List[List[Any]] = []
        self._reached: Dict[Tuple[int, str], str] = {}
        self._deadline: Optional[Timer] = None
        self._tick: Optional[Timer] = None
        channel.on_control = self._dial_all
        channel.on_abandon = self._close
        self._timer = self._loop.call_later(_LIFETIME, self._overdue)
        self._listen(params["ports"], params.get("address") or "")

    def _listen(self, ports: List[int], stated: str) -> None:
        here = [stated] if stated in self._own or (stated and not self._own) else self._own
        taken, problem = [], ""
        for address in here:
            for port in ports:
                try:
                    self._listeners.append(_Listener(self._loop, self._key, self._callers, self._me, address, port))
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

    def _dial_all(self, message: Dict[str, Any]) -> None:
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
                    self._waiting.append(_Dial(self._key, peer, address, port, bare))
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
        while self._waiting:
            dial = self._waiting.popleft()
            self._failed.append([dial.peer, dial.address, dial.port, "not tried"])
        for dial in self._open:
            dial.limit, dial.is_second = 0.0, True
        self._go_on()

    def _go_on(self) -> None:
        """Look at all dials, and begin others.

        The loop watches the newest one alone: when that is answered, most of the others are. So a host that dials many
        wakes up once for many answers.
        """
        self._unwatch()
        now = time.monotonic()
        for dial in list(self._open):
            if not dial.look() and now - dial.since >= dial.limit:
                dial.give_up()
            self._look_back(dial, now)
        while self._waiting and len(self._open) < _MOST_OPEN and self._young < _MOST_YOUNG:
            self._begin(self._waiting.popleft())
        if self._open:
            self._watch(next(reversed(self._open)))
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            reached = [[peer, address, bound] for (peer, address), bound in self._reached.items() if bound != address]
            self._channel.event(state="dialed", failed=self._failed, translated=reached)
            self._failed, self._reached = [], {}

    def _begin(self, dial: _Dial) -> None:
        self._open[dial] = None
        dial.young = True
        self._young += 1
        dial.begin()
        self._look_back(dial, dial.since)

    def _look_back(self, dial: _Dial, now: float) -> None:
        """See to what has become of a dial."""
        if dial.young and (dial.is_over or now - dial.since >= _YOUNG):
            dial.young = False
            self._young -= 1
        if not dial.is_over:
            return
        del self._open[dial]
        if dial.problem != _NO_ANSWER:
            self._answered = now
        if dial.problem in (_NO_ANSWER, _OTHER_PROGRAM) and not dial.is_second:
            self._waiting.append(dial.again())  # where very many dial at once, a packet is lost easily
        elif dial.problem:
            self._failed.append([dial.peer, dial.address, dial.port, dial.problem])
        else:
            self._reached[dial.peer, dial.address] = dial.reached

    def _watch(self, dial: _Dial) -> None:
        self._watched = dial.fileno()
        (self._loop.add_reader if dial.is_asked else self._loop.add_writer)(self._watched, self._go_on)
        if self._tick is None:
            self._tick = self._loop.call_later(_TICK, self._look_again)

    def _unwatch(self) -> None:
        if self._watched >= 0:
            self._loop.remove_reader(self._watched)
            self._loop.remove_writer(self._watched)
            self._watched = -1

    def _look_again(self) -> None:
        self._tick = None
        self._go_on()

    def _overdue(self) -> None:
        self._close()
        self._channel.result()

    def _close(self) -> None:
        self._timer.cancel()
        for timer in (self._deadline, self._tick):
            if timer is not None:
                timer.cancel()
        self._unwatch()
        self._waiting.clear()
        for dial in self._open:
            dial.close()
        for listener in self._listeners:
            listener.close()
        _close_all(self._callers)
        self._open.clear()
        self._listeners.clear()


def reach(channel: RequestChannel) -> None:
    """Handle the request `reach`: prove to other hosts that they reach this one, and find out which it reaches.

    It listens on the `ports` of its own addresses (of the one `address` if that was stated and is its own), and says so
    in the event "listening", with its addresses. Told to `dial` others, it says in the event "dialed" what `failed`:
    [host, address, port, why], and which addresses were `translated` on the way: [host, address, as that host knows
    it]. All that ends when the manager drops the request.

    Who answers is told by a secret `key` of the probe, which only the hosts of the group have: a port that answers
    otherwise belongs to somebody else's machine.
    """
    _Participant(channel)
