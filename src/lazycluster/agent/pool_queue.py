"""The queue of a pool: a socket that all its workers take from, and what does not fit into it yet."""

from __future__ import annotations

import os
import socket
from collections import deque

from . import descriptors
from .pool_protocol import RECORD, SMALL

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Callable, Deque, Dict, Iterable, List, Tuple

    from .loop import Loop

    Waiting = Tuple[int, bytes, int]  # number, record, descriptor of what is too large for the queue or -1


class PoolQueue:
    """Chunks that are to be run.

    Args:
        loop: The reactor.
        on_room: Is called when there is room for more of what waits.

    Attributes:
        sent: The numbers of those in the socket or being run, in that order; whoever knows that one is over removes it.
    """

    def __init__(self, loop: Loop, on_room: Callable[[], None]) -> None:
        self.sent: Dict[int, None] = {}
        self._loop, self._on_room = loop, on_room
        self._waiting: Deque[Waiting] = deque()  # not in the socket yet
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._closed = False

    def __len__(self) -> int:
        return len(self.sent) + len(self._waiting)

    def fileno(self) -> int:
        """Return the descriptor that workers take from."""
        return self._theirs.fileno()

    def add(self, number: int, record: bytes, fd: int = -1) -> None:
        """Take a chunk, at the end; `push` sends it."""
        self._waiting.append((number, record, fd))

    def push(self) -> None:
        """Send what waits as far as there is room."""
        try:
            while self._waiting and not self._closed:
                number, record, fd = self._waiting[0]
                descriptors.send(self._ours, [fd] if fd >= 0 else [], record)
                if fd >= 0:
                    os.close(fd)
                self._waiting.popleft()
                self.sent[number] = None
        except BlockingIOError:
            pass
        if not self._closed:
            self._loop.watch_writer(self._ours.fileno(), self._on_room if self._waiting else None)

    # --- what nobody has taken -----------------------------------------------------------------
    def take_back(self) -> None:
        """Empty the socket; what workers have taken is not in it any more."""
        self._waiting.extendleft(reversed(self._received()))

    def _received(self) -> List[Waiting]:
        found: List[Waiting] = []
        while True:
            try:
                record, fds = descriptors.receive(self._theirs, 1, RECORD.size + SMALL, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            if not record:
                return found
            number = RECORD.unpack_from(record)[2]
            self.sent.pop(number, None)
            found.append((number, record, fds[0] if fds else -1))

    def give_up(self, count: int) -> List[int]:
        """Forget up to so many that nobody has taken, the last ones first; returns their numbers."""
        self.take_back()
        kept = max(0, len(self._waiting) - count)
        waiting = list(self._waiting)
        self._waiting = deque(waiting[:kept])
        return self._dropped(waiting[kept:])

    def drop(self, number: int) -> None:
        """Forget one, if nobody has taken it."""
        self.take_back()
        waiting, self._waiting = self._waiting, deque()
        for item in waiting:
            if item[0] == number:
                self._dropped([item])
            else:
                self._waiting.append(item)

    @staticmethod
    def _dropped(items: Iterable[Waiting]) -> List[int]:
        numbers = []
        for number, _, fd in items:
            numbers.append(number)
            if fd >= 0:
                os.close(fd)
        return numbers

    # --- the end -------------------------------------------------------------------------------
    def end(self) -> None:
        """Send no more: who takes the next one learns that there is none."""
        if not self._closed:
            self._loop.watch_writer(self._ours.fileno(), None)
            self._closed = True
            self._ours.close()

    def close(self) -> None:
        """Let go of everything."""
        self.end()
        self._dropped(self._waiting)
        self._waiting.clear()
        self._theirs.close()
