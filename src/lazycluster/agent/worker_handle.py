"""One worker of a pool, as the agent sees it."""

from __future__ import annotations

import socket

from . import descriptors
from .commands import outcome
from .forked_call import LINGER
from .pool_protocol import ANSWER, NEED, READY, SLOT, SLOT_SIZE, UNFIT, WORKER
from .processes import ProcessTree, Pump, Termination, start_time
from .wire import MAX_PAYLOAD

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Tuple

    from .pools import WorkerPool
    from .zygotes import Interpreter

_READ_SIZE = MAX_PAYLOAD - WORKER.size


class WorkerHandle:
    """A worker: its process, and the socket on which it answers.

    Args:
        pool: Its pool.
        number: Its number, which no other worker of the pool ever has.
        slot: Its place on the board.

    Attributes:
        pid: Its process, 0 until it is known.
        started: When that started.
        ready: Whether it has said that it can be used.
        ending: Whether it is being ended on purpose.
    """

    def __init__(self, pool: WorkerPool, number: int, slot: int) -> None:
        self.slot = slot
        self.pid = 0
        self.started: Optional[int] = None
        self.ready = False
        self.ending = False
        self._pool, self._tag = pool, WORKER.pack(number)
        self._loop = pool.channel.loop
        self._head = b""
        self._left = 0  # bytes of the present answer that are to come
        self._number = 0  # the chunk that it is about
        self._over = False
        self._tree = ProcessTree()
        self._status: Optional[Dict[str, Any]] = None
        self._own, self._theirs = socket.socketpair()
        self._own.setblocking(False)
        self._answers = Pump(pool.channel, self._own.fileno(), self._take, self._said_all, _READ_SIZE)

    def start(self, interpreter: Interpreter, message: Dict[str, Any], fds: List[int]) -> None:
        """Have it forked; the descriptors are closed on our side."""
        handed = [*fds[:2], self._theirs.detach(), *fds[2:]]
        interpreter.fork(message, handed, False, self._report)

    def chunk(self) -> Tuple[int, int]:
        """Return the number of the chunk that it took last, and which call of it is being run."""
        number, index = SLOT.unpack_from(self._pool.board, self.slot * SLOT_SIZE)
        return number, index

    # --- what it says --------------------------------------------------------------------------
    def resume(self) -> None:
        """Read on."""
        self._answers.resume()

    def _take(self, data: bytes) -> None:
        self._pool.channel.output(self._tag + data)
        self._parse(self._head + data if self._head else data)

    def _said_all(self) -> None:
        self._own.detach()  # it has been closed
        if self._status is not None:
            self._finish()

    def _parse(self, data: bytes) -> None:
        """Find out what the answers are about; their contents are the manager's."""
        self._head = b""
        position, end = 0, len(data)
        while position < end:
            if self._left:
                step = min(self._left, end - position)
                position += step
                self._left -= step
            elif end - position < ANSWER.size:
                self._head = data[position:]
                return
            else:
                kind, number, _, self._left = ANSWER.unpack_from(data, position)
                position += ANSWER.size
                self._number = 0
                if kind == NEED:
                    self._pool.give(self, number)
                elif kind == READY:
                    self.ready = True
                    self._pool.is_ready()
                elif kind != UNFIT:
                    self._number = number
            if not self._left and self._number:
                self._pool.finished(self._number)
                self._number = 0

    def send(self, data: bytes, fds: List[int]) -> None:
        """Send it something; it takes one such message at a time."""
        try:
            descriptors.send(self._own, fds, data)
        except OSError:
            pass  # it has just died

    # --- its end -------------------------------------------------------------------------------
    def _report(self, said: Dict[str, Any]) -> None:
        if "status" not in said:
            self.pid = said["pid"]
            self.started = start_time(self.pid)
            self._tree.add(self.pid, self.started)
            if self.ending:
                self._begin_ending()
            return
        fields: Dict[str, Any] = {"exit": None, "signal": None}
        if said["status"] is not None:
            fields = dict(outcome(said["status"]))
        self._status = dict(fields, pid=self.pid, failed=said.get("failed", ""))
        self.pid = self.pid or -1
        # What it answered before it died still counts; a child of it may hold the socket open.
        self._loop.call_later(LINGER, self._finish)

    def _finish(self) -> None:
        if self._over:
            return
        self._answers.drain()
        if not self._over:
            fields = self._status or {}
            self.close()
            self._pool.worker_ended(self, fields)

    def end(self) -> None:
        """End its process and all that this started."""
        if not self.ending:
            self.ending = True
            self._begin_ending()

    def _begin_ending(self) -> None:
        if self.pid > 0:
            Termination(self._loop, self._tree.living, lambda: None)

    def close(self) -> None:
        """Let go of its socket."""
        if not self._over:
            self._over = True
            self._answers.close()
            self._own.detach()
