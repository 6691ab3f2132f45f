"""Pools: worker processes that stay, and take calls from a queue that they have in common.

The queue is a socket that all workers read from: whoever is free takes the next chunk, and the agent is not asked.
What each has taken stands on a board that they share with the agent; so it is known what a worker that died was doing.
"""

from __future__ import annotations

import os

from . import gpus, host_info
from .commands import environment, marked_environment
from .functions import keep_library, with_interpreter
from .paths import meant
from .pool_protocol import BACK, BLOB, CANCEL, DROP, GIVEN, LARGE, MISSING, RECORD, SLOT, SLOT_SIZE, SMALL
from .pool_queue import PoolQueue
from .processes import TASK_MARKER, ProcessTree, Pump, Termination, explained, pipe
from .worker_handle import WorkerHandle

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Set

    from .session import RequestChannel
    from .zygotes import Interpreter

_THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_MOST_WORKERS = 4096
_MOST_FAILED_STARTS = 3  # workers in a row that end before they are ready, after which there is no point in more
_LEAVE_LIMIT = 5.0  # seconds that idle workers get to run their exit handlers
_FORK_WAIT = 0.02
_LOOK_AGAIN = 1.0
_TAIL = 4000


def nameless_file(name: str, directory: str) -> int:
    """Return the descriptor of a file that nobody else can find: in memory if possible."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        path = os.path.join(directory, "pool-" + os.urandom(8).hex())
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        return fd


class WorkerPool:
    """The workers of one pool on this host.

    Args:
        channel: The request.
        interpreter: Where they are forked.
        message: What each is told.
        most: How many there may be; each is started when it is needed.
        variables: What each has in its environment, by its place on the board; none if that is nothing.
        renew: Calls what it is given with another such interpreter, or fails the request and calls the second.
        at_end: Is called at the end.
    """

    def __init__(
        self,
        channel: RequestChannel,
        interpreter: Interpreter,
        message: Dict[str, Any],
        most: int,
        variables: List[Dict[str, str]],
        renew: Callable[[Callable[[Interpreter], Any], Callable[[], Any]], Any],
        at_end: Callable[[], Any],
    ) -> None:
        import mmap

        self.channel, self._interpreter, self._message, self._most = channel, interpreter, message, most
        self._variables, self._renew, self._at_end = variables, renew, at_end
        self._renewing = False
        self._workers: Dict[int, WorkerHandle] = {}  # by slot
        self._count = 0
        self._failed_starts = 0
        self._blobs: Dict[int, int] = {}
        self._cancelled: Set[int] = set()  # that may still run
        self._suspects: Set[int] = set()
        self._looking = False
        self._rest = b""
        self._filling: Optional[List[Any]] = None  # record, descriptor, bytes to come
        self._closing = False
        self._ending: Optional[Termination] = None
        self._processes = ProcessTree(message["task"])
        self._tail = bytearray()
        directory = channel.agent.directory
        self._board_fd = nameless_file("board", directory)
        os.ftruncate(self._board_fd, SLOT_SIZE * most)
        self.board = mmap.mmap(self._board_fd, 0)
        self._queue = PoolQueue(channel.loop, self._push)
        out, self._out = pipe()
        self._pump = Pump(channel, out, self._print, lambda: None)
        channel.on_input = self._input
        channel.on_input_end = self._close
        channel.on_control = lambda _: self.end()
        channel.on_abandon = self.end
        channel.on_drain = self._resume
        channel.event(ready=True, workers=most)  # they are started with the first calls

    def _over(self) -> bool:
        return self._closing or self._ending is not None

    def _print(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-_TAIL]
        self.channel.stdout(data)

    def _resume(self) -> None:
        self._pump.resume()
        for worker in list(self._workers.values()):
            worker.resume()

    # --- what the manager sends ----------------------------------------------------------------
    def _input(self, data: bytes) -> None:
        # At once: how much may be under way is the manager's concern, who knows how large each is.
        self.channel.consumed(len(data))
        if self._over():
            return
        try:
            self._take(self._rest + data if self._rest else data)
        except OSError as error:  # no memory or no descriptors for what is large
            self.fail("os", "what was sent cannot be kept: {}".format(error.strerror), errno=error.errno)

    def _take(self, data: bytes) -> None:
        view, position, end = memoryview(data), 0, len(data)
        while position < end:
            if self._filling is not None:
                position += self._fill(view[position:])
                continue
            if end - position < RECORD.size:
                break
            kind, blob, number, _, count, size = RECORD.unpack_from(data, position)
            stop = position + RECORD.size + size
            if kind == BLOB or size > SMALL:
                large = bytes(view[position : position + RECORD.size])
                self._filling = [large, nameless_file("pool", self.channel.agent.directory), size]
                position += RECORD.size
                continue
            if stop > end:
                break
            self._handle(kind, blob, number, count, bytes(view[position:stop]))
            position = stop
        self._rest = bytes(view[position:])
        self._push()

    def _handle(self, kind: int, blob: int, number: int, count: int, record: bytes) -> None:
        if kind == DROP:
            fd = self._blobs.pop(blob, -1)
            if fd >= 0:
                os.close(fd)
        elif kind == CANCEL:
            self._cancel(number)
        elif kind == BACK:
            self.channel.event(back=self._queue.give_up(count))
        else:
            self._queue.add(number, record)

    def _fill(self, view: memoryview) -> int:
        """Put bytes into a descriptor; returns how many."""
        record, fd, left = self._filling or (b"", -1, 0)
        part = view[:left]
        while part:
            part = part[os.write(fd, part) :]
        taken = min(left, len(view))
        if taken < left:
            self._filling = [record, fd, left - taken]
            return taken
        self._filling = None
        kind, blob, number, first, count, size = RECORD.unpack(record)
        if kind == BLOB:
            self._blobs[blob] = fd
        else:
            self._queue.add(number, RECORD.pack(kind | LARGE, blob, number, first, count, size), fd)
        return taken

    # --- the queue -----------------------------------------------------------------------------
    def _push(self) -> None:
        """Fill the queue as far as it goes, and have enough workers."""
        self._queue.push()
        self._start_workers()

    def _cancel(self, number: int) -> None:
        self._queue.drop(number)
        if number in self._queue.sent:
            self._cancelled.add(number)
            self._end_cancelled()

    def _end_cancelled(self) -> None:
        """End who runs what was cancelled; who has just taken it may not have noted that yet."""
        self._cancelled.intersection_update(self._queue.sent)
        for worker in list(self._workers.values()):
            if worker.chunk()[0] in self._cancelled:
                worker.end()
        if self._cancelled:
            self._look_later()

    # --- the workers ---------------------------------------------------------------------------
    def _start_workers(self) -> None:
        wanted = min(self._most, len(self._queue))
        if len(self._workers) < wanted and self._interpreter.ended and not self._over():
            self._replace_interpreter()
            return
        while len(self._workers) < wanted and not self._over():
            slot = next(slot for slot in range(self._most) if slot not in self._workers)
            SLOT.pack_into(self.board, slot * SLOT_SIZE, 0, 0)
            fds: List[int] = []
            try:
                for fd in (self._out, self._out, self._queue.fileno(), self._board_fd):
                    fds.append(os.dup(fd))
                self._count += 1
                worker = self._workers[slot] = WorkerHandle(self, self._count, slot)
            except OSError as error:
                for fd in fds:
                    os.close(fd)
                self._no_more(explained(error.strerror))
                return
            variables = self._variables[slot] if self._variables else {}
            worker.start(self._interpreter, dict(self._message, slot=slot, variables=variables), fds)

    def _replace_interpreter(self) -> None:
        """Go on with another one: this was ended, e.g. by a host that has run out of memory."""

        def go_on(interpreter: Interpreter) -> None:
            self._renewing = False
            self._interpreter = interpreter
            self._push()

        if not self._renewing:
            self._renewing = True
            self._renew(go_on, self.end)

    def _no_more(self, why: str) -> None:
        """Go on with the workers that there are, if there are any."""
        if not self._workers:
            self.fail("os", "no process can be started on the host: {}".format(why))
        self._most = max(1, len(self._workers))

    def finished(self, number: int) -> None:
        """Note that the answer to a chunk has come as a whole."""
        self._queue.sent.pop(number, None)
        self._suspects.discard(number)

    def is_ready(self) -> None:
        """Note that a worker can be used."""
        self._failed_starts = 0

    def give(self, worker: WorkerHandle, blob: int) -> None:
        """Hand a blob to a worker."""
        fd = self._blobs.get(blob, -1)
        if fd < 0:
            worker.send(GIVEN.pack(blob, MISSING), [])
        else:
            worker.send(GIVEN.pack(blob, os.fstat(fd).st_size), [fd])

    def worker_ended(self, worker: WorkerHandle, fields: Dict[str, Any]) -> None:
        """Handle the end of a worker."""
        self._workers.pop(worker.slot, None)
        number, index = worker.chunk()
        if self._ending is not None:
            return
        if self._closing:
            self._maybe_closed()
            return
        self._pump.drain()
        fields["output"] = self._tail.decode("utf-8", "replace")
        if number in self._queue.sent:
            del self._queue.sent[number]
            self.channel.event(died=fields, number=number, at=index, innocent=worker.ending)
        elif worker.ending:  # it may have gone on, and taken another one, before the signal came
            self._look_later()
        else:
            self._lost_worker(worker, fields)
        self._push()

    def _lost_worker(self, worker: WorkerHandle, fields: Dict[str, Any]) -> None:
        """Handle the end of a worker that had nothing to do, or had not yet said what."""
        if fields.get("failed"):
            self._no_more(explained(fields["failed"]))
            return
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MOST_FAILED_STARTS:
                self.fail("worker", "the workers end before they can do anything", **fields)
                return
        self._look_later()

    def _look_later(self) -> None:
        if not self._looking:
            self._looking = True
            self.channel.loop.call_later(_LOOK_AGAIN, self._look_for_lost)

    def _look_for_lost(self) -> None:
        """Find chunks that nobody has: their worker died after it took them, before it could note that.

        One that is missing twice is lost; once, it may just have been taken, or its answer be on its way.
        """
        self._looking = False
        if self._over():
            return
        if not self.channel.writable:
            self._look_later()
            return
        self._end_cancelled()
        self._queue.take_back()
        held = {worker.chunk()[0] for worker in self._workers.values()}
        missing = {number for number in self._queue.sent if number not in held}
        for number in missing & self._suspects:
            del self._queue.sent[number]
            self.channel.event(died={"exit": None, "signal": None, "pid": 0}, number=number, at=0, innocent=True)
        self._suspects = missing - self._suspects
        if self._suspects:
            self._look_later()
        self._push()

    # --- the end -------------------------------------------------------------------------------
    def fail(self, error: str, message: str, **evidence: Any) -> None:
        """End the pool with an error."""
        self.channel.fail(error, message, **evidence)
        self.end()

    def _close(self) -> None:
        """Let the workers leave: the manager has nothing more for them."""
        if self._over():
            return
        self._closing = True
        self._queue.end()
        self._maybe_closed()
        if self._closing and self._workers:
            self.channel.loop.call_later(_LEAVE_LIMIT, self.end)

    def _maybe_closed(self) -> None:
        if not self._workers:
            self.end()

    def end(self) -> None:
        """End the workers and all that they started."""
        if self._ending is not None:
            return
        self._queue.end()
        self._ending = Termination(self.channel.loop, self._tree, self._ended)

    def _tree(self) -> List[int]:
        for worker in self._workers.values():
            self._processes.add(worker.pid, worker.started)
        return self._processes.living()

    def _ended(self) -> None:
        if self._pump.ended:
            return
        if any(not worker.pid for worker in self._workers.values()):  # one that is just being forked
            self.channel.loop.call_later(_FORK_WAIT, lambda: Termination(self.channel.loop, self._tree, self._ended))
            return
        for worker in list(self._workers.values()):
            worker.close()
        self._workers.clear()
        self._pump.drain()
        self._pump.close()
        self._queue.close()
        filling = [self._filling[1]] if self._filling is not None else []
        for fd in [*filling, *self._blobs.values(), self._out, self._board_fd]:
            os.close(fd)
        self.board.close()
        self._at_end()
        self.channel.result()


# --- the request ----------------------------------------------------------------------------------
def pool(channel: RequestChannel) -> None:
    """Handle the request `pool`: see `pool_protocol` for what INPUT and OUTPUT are.

    With `gpus`, e.g. {"count": 1, "workers": 2, "idle": true}, there are as many workers as the host has shares of
    `count` GPUs, times `workers` that share one; each sees its own only.
    """
    keep_library(channel)
    most = channel.params.get("workers")
    if most is not None and (not isinstance(most, int) or not 0 < most <= _MOST_WORKERS):
        channel.fail("value", "a host can have 1 to {} workers, not {!r}".format(_MOST_WORKERS, most))
        return
    wanted = gpus.wanted(channel.params)
    if wanted is None:
        _begin(channel, most or host_info.cpu_cores(), [], 1)
        return
    together = max(1, int(channel.params["gpus"].get("workers") or 1))
    shares_wanted = None if most is None else -(-most // together)

    def given(shares: List[gpus.GpuShare], problem: str) -> None:
        if problem:
            channel.fail("gpu", problem)
        else:
            _begin(channel, min(most or _MOST_WORKERS, len(shares) * together), shares, together)

    host = channel.agent.shared(gpus.HostGpus)
    channel.on_abandon = host.take(environment(channel), "a pool", wanted[0], shares_wanted, wanted[1], given).cancel


def _begin(channel: RequestChannel, most: int, shares: List[gpus.GpuShare], together: int) -> None:
    params = channel.params
    task = params.get("task") or ""
    env = environment(channel)
    for name in _THREAD_LIMITS:
        env.setdefault(name, str(max(1, host_info.cpu_cores() // most)))
    message = {
        "kind": "pool",
        "cwd": meant(params.get("cwd") or "", "", env),
        "task": marked_environment(channel, {}, task).get(TASK_MARKER, ""),
        "name": params.get("name") or "",
        "initializer": params.get("initializer") or 0,
    }

    def release() -> None:
        for share in shares:
            share.release()

    def renew(then: Callable[[Interpreter], Any], failed: Callable[[], Any]) -> None:
        with_interpreter(channel, env, lambda interpreter: lambda: then(interpreter), failed)

    def begin(interpreter: Interpreter) -> None:
        try:
            if channel.open:
                variables = [shares[slot // together].variables for slot in range(most)] if shares else []
                WorkerPool(channel, interpreter, message, most, variables, renew, release)
                return
        except OSError as error:
            channel.fail("os", "no pool can be made: {}".format(error.strerror), errno=error.errno)
        release()

    channel.on_abandon = lambda: None
    renew(begin, release)
