"""Pool of worker processes on one host, as the manager sees it: calls go in, results and lines come out.

Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazycluster.agent.pool_protocol import (
    ANSWER,
    BACK,
    BLOB,
    BROKEN,
    CANCEL,
    DROP,
    MIXED,
    RECORD,
    RETURNED,
    UNFIT,
    WORKER,
)  # fmt: skip
from lazycluster.core import memory_pressure
from lazycluster.exceptions import AgentError, ConnectionLostError, LazyclusterError
from lazycluster.output.lines import Lines
from lazycluster.ssh.agent_replies import check_shape
from lazycluster.tasks.functions import library_for, resolve_auto

from .chunks import Chunk, ChunkResult, Failure

if TYPE_CHECKING:
    from lazycluster.ssh.channel import Channel
    from lazycluster.tasks.context import Context

    from .blob_store import Blob
    from .scheduler import ChunkScheduler

__all__ = ["PoolOptions", "RemotePool", "ResultDecoder", "worker_lines"]

_logger = logging.getLogger("lazycluster")

LOOKAHEAD = 0.025  # seconds of work that wait on a host, so that its workers need not wait for the link
_WORTH_MOVING = 2 * LOOKAHEAD  # seconds that a chunk must take to be moved from one host to another
_MAX_AHEAD = 1024  # chunks
_BYTES_AHEAD = 32 * 1024 * 1024  # of arguments, or of results to come, beyond what the workers need at once
_MAX_JOINED = 128 * 1024  # bytes up to which messages are sent as one
_SMOOTHING = 0.2  # weight of the newest chunk in the moving averages
AWAY_LIMIT = 5.0  # seconds after which calls of a host that cannot be reached are run elsewhere
_CLOSE_LIMIT = 15.0  # seconds that a host gets to end its workers

# What makes no sense is an error before anything is done: else a chunk could be let go of, and be nowhere.
_READY = {"workers": int}
_DIED = {"number": int, "at": int, "innocent": bool, "died": {"signal": (int, type(None))}}
_BACK = {"back": [int]}


@dataclass(frozen=True)
class PoolOptions:
    """Settings of the workers on one host.

    Attributes:
        workers: How many, None for as many as the host has cores.
        initializer: What each calls first.
        debug: Whether what they print is printed here.
        gpus: What each has of the host's GPUs, as the agent's request `pool` takes it; None if it needs none.
    """

    workers: int | None
    initializer: Blob | None
    debug: bool
    gpus: dict[str, Any] | None = None


class RemotePool:
    """The workers of one host.

    Args:
        scheduler: Assigns the chunks.
        context: The host, and how functions are run there.
        options: What the workers are like.

    Attributes:
        host: The host.
        workers: How many there are; 0 until that is known.
        in_flight: The chunks that the host has, by number, in the order in which they were given.
        duration: Seconds that a chunk takes, None until one has been answered.
        stealing: Whether it was asked to give chunks back.
        over: Whether it has ended.
        away: Whether its host cannot be reached at the moment, but may come back.
    """

    def __init__(self, scheduler: ChunkScheduler, context: Context, options: PoolOptions) -> None:
        self.host = context.host
        self.workers = 0
        self.in_flight: dict[int, Chunk] = {}
        self.duration: float | None = None
        self.stealing = False
        self.over = False
        self.away = False
        self._reassigned: list[int] = []  # chunks that were given to others while it was away
        self._away_timer: asyncio.TimerHandle | None = None
        self._scheduler, self._context, self._options = scheduler, context, options
        self._next = 1
        self._channel: Channel | None = None
        self._streams: dict[int, ResultDecoder] = {}
        self._out: list[bytes] = []
        self._flushed = asyncio.Event()
        self._closing = False
        self._sent_blobs: set[int] = set()
        self._bytes = 0
        self._result_size = 0.0
        self._ended = asyncio.Event()
        self._lines = worker_lines(context.host, options.debug)

    # --- start and end -------------------------------------------------------------------------
    async def run(self, imports: Sequence[str]) -> None:
        """Have workers on the host until it is closed; `imports` are the modules that they will need first."""
        error: LazyclusterError | None = None
        sender: asyncio.Task[None] | None = None
        forget: Callable[[], None] = lambda: None  # noqa: E731
        try:
            self._channel = await self._open(imports)
            forget = self._context.connection.on_state(self._on_state)
            sender = asyncio.ensure_future(self._send())
            await self._channel.result()
            if not self._closing:
                error = ConnectionLostError(self.host, "its workers were ended")
        except LazyclusterError as caught:
            error = caught
        except Exception as caught:  # a fault of ours must not let anybody wait for ever
            _logger.exception("%s: the pool has failed", self.host)
            error = AgentError(self.host, "internal", f"{type(caught).__name__}: {caught}")
        finally:
            self.over = True
            self._ended.set()
            forget()
            if self._away_timer is not None:
                self._away_timer.cancel()
            if sender is not None:
                sender.cancel()
        if error is not None and not self._closing:
            self._scheduler.pool_lost(self, error)

    async def _open(self, imports: Sequence[str]) -> Channel:
        context, options = await self._context.prepared(), self._options
        python = context.python
        if python == "auto":
            python = await resolve_auto(context.connection, context.env)
        params = {
            "python": python,
            "env": dict(context.env),
            "cwd": context.cwd,
            "task": secrets.token_hex(16),
            "name": "pool",
            "workers": options.workers,
            "gpus": options.gpus,
            "imports": list(imports),
            "initializer": options.initializer.number if options.initializer else 0,
            "version": list(sys.version_info[:3]),
            **library_for(context.connection),
        }
        return context.connection.channel(
            "pool", params, stdout=self._lines.feed, output=self._output, event=self._event
        )

    async def close(self, kill: bool) -> None:
        """End the workers.

        Args:
            kill: Whatever they do; else they are idle, and run their exit handlers.
        """
        self._closing = True
        channel = self._channel
        if channel is not None and not self.over:
            try:
                if not self.workers:
                    channel.close()  # it has not begun
                elif kill:
                    channel.control(signal="END")
                else:
                    await channel.send_end()
                ended = asyncio.ensure_future(self._ended.wait())
                if not await self._context.connection.wait_while_heard(ended, _CLOSE_LIMIT):
                    channel.close()
            except LazyclusterError:
                pass  # the host has gone, and all with it
        self._lines.end()

    # --- chunks to the host --------------------------------------------------------------------
    @property
    def capacity(self) -> int:
        """Number of chunks that it should be given now."""
        if self.over or self.away or not self.workers:
            return 0
        return self._chunk_limit() - len(self.in_flight)

    @property
    def load(self) -> float:
        """Number of chunks that it has for each of its workers."""
        return len(self.in_flight) / self.workers

    @property
    def has_suspect(self) -> bool:
        """True if it has a call that may be the one that hosts were lost by."""
        return any(chunk.suspect for chunk in self.in_flight.values())

    @property
    def may_come_back(self) -> bool:
        """True if its host may be there again soon, with another agent."""
        return self._context.connection.state in ("open", "interrupted")

    @property
    def idle_workers(self) -> int:
        """Number of workers that have nothing to do."""
        return 0 if self.over or self.away else max(0, self.workers - len(self.in_flight))

    @property
    def stealable(self) -> int:
        """Number of chunks, not begun as far as is known, that are worth moving to other hosts."""
        short = self.duration is not None and self.duration < _WORTH_MOVING
        if self.over or self.away or self.stealing or short:
            return 0
        return max(0, len(self.in_flight) - self.workers)

    def _chunk_limit(self) -> int:
        workers = self.workers
        if self.duration is None:
            ahead = workers
        else:
            ahead = min(_MAX_AHEAD, math.ceil(workers * LOOKAHEAD / max(self.duration, 1e-5)))
        large = self._bytes > _BYTES_AHEAD or self._result_size * (workers + ahead) > _BYTES_AHEAD
        return workers if large else workers + ahead

    def assign(self, chunk: Chunk) -> None:
        """Give the host a chunk; it is sent with the next `flush`."""
        chunk.number = number = self._next
        self._next += 1
        packed = chunk.packed
        self._bytes += packed.size
        if self._options.initializer is not None:
            self._send_blob(self._options.initializer.number)
        self._send_blob(chunk.blob)
        for blob in chunk.shared:
            self._send_blob(blob)
        self.in_flight[number] = chunk
        self._out.append(RECORD.pack(packed.kind, chunk.blob, number, chunk.first, chunk.count, packed.size))
        self._out.extend(packed.parts)

    def _send_blob(self, blob: int) -> None:
        if blob and blob not in self._sent_blobs:
            self._sent_blobs.add(blob)
            packed = self._scheduler.blobs[blob].packed
            self._out.append(RECORD.pack(BLOB, blob, 0, 0, 0, packed.size))
            self._out.extend(packed.parts)

    def drop(self, blob: int) -> None:
        """Let the host forget a blob."""
        if blob in self._sent_blobs:
            self._sent_blobs.discard(blob)
            self._out.append(RECORD.pack(DROP, blob, 0, 0, 0, 0))

    def cancel(self, chunk: Chunk) -> None:
        """End a chunk; nothing will be heard of it."""
        if self.in_flight.get(chunk.number) is chunk:
            self._forget(chunk.number)
            self._out.append(RECORD.pack(CANCEL, 0, chunk.number, 0, 0, 0))

    def steal(self, count: int) -> None:
        """Ask for chunks back that were not begun."""
        self.stealing = True
        self._out.append(RECORD.pack(BACK, 0, 0, 0, count, 0))

    def flush(self) -> None:
        """Send what was given."""
        if self._out:
            self._flushed.set()

    async def _send(self) -> None:
        channel = self._channel
        assert channel is not None
        with contextlib.suppress(LazyclusterError):  # `run` learns of a lost host, too
            while True:
                await self._flushed.wait()
                self._flushed.clear()
                out, self._out = self._out, []
                if sum(map(len, out)) <= _MAX_JOINED:
                    await channel.send(b"".join(out))
                    continue
                for part in out:
                    await channel.send(part)

    def _forget(self, number: int) -> Chunk | None:
        chunk = self.in_flight.pop(number, None)
        if chunk is not None:
            self._bytes -= chunk.packed.size
        return chunk

    # --- a link that breaks and comes back -----------------------------------------------------
    def _on_state(self, state: str, why: str) -> None:
        if state == "interrupted":
            self.away = True
            self._start_away_timer()
        elif state == "open" and self.away:
            self.away = False
            if self._away_timer is not None:
                self._away_timer.cancel()
            self._out.extend(RECORD.pack(CANCEL, 0, number, 0, 0, 0) for number in self._reassigned)
            self._reassigned.clear()
            self.flush()
            self._scheduler.dispatch_soon()

    def _start_away_timer(self) -> None:
        self._away_timer = asyncio.get_running_loop().call_later(AWAY_LIMIT, self._on_away_limit)

    def _on_away_limit(self) -> None:
        if self.over or not self.away:
            return
        self._start_away_timer()
        if self.in_flight and self._scheduler.has_others(self):
            _logger.warning("%s: cannot be reached: %d calls are run elsewhere", self.host, len(self.in_flight))
            self._reassigned += self.in_flight
            self._scheduler.requeue(self.take_all())

    def take_all(self) -> list[Chunk]:
        """Return all chunks of the host, and forget them."""
        chunks = list(self.in_flight.values())
        self.in_flight.clear()
        self._bytes = 0
        return chunks

    # --- messages from the host ----------------------------------------------------------------
    def _event(self, message: dict[str, Any]) -> None:
        # What makes no sense is an error before anything is done: else a chunk could be let go of, and be nowhere.
        if message.get("ready"):
            check_shape(message, _READY)
            if message["workers"] < 1:
                raise ValueError("there are no workers")
            self.workers = message["workers"]
            self._scheduler.dispatch_soon()
        elif "died" in message:
            check_shape(message, _DIED)
            chunk = self._forget(message["number"])
            if chunk is not None and message["innocent"]:
                self._scheduler.requeue([chunk])
            elif chunk is not None:
                self._scheduler.worker_died(self, chunk, message["at"], message["died"])
        elif "back" in message:
            check_shape(message, _BACK)
            self.stealing = False
            found = [self._forget(number) for number in message["back"]]
            self._scheduler.requeue([chunk for chunk in found if chunk is not None])
        elif "pid" not in message:  # of what looks for another interpreter
            raise ValueError("unknown event")

    def _output(self, data: bytes) -> None:
        number = WORKER.unpack_from(data)[0]
        stream = self._streams.get(number)
        if stream is None:
            stream = self._streams[number] = ResultDecoder(self._on_result, self._out_of_memory)
        stream.feed(data, WORKER.size)

    def _out_of_memory(self, number: int, error: MemoryError) -> None:
        chunk = self._forget(number)
        if chunk is not None:
            chunk.sink.settle(chunk, Failure(error))
            self._scheduler.dispatch_soon()

    def _on_result(self, kind: int, number: int, elapsed: float, parts: list[bytes], size: int) -> None:
        if not 0 <= elapsed < math.inf:
            raise ValueError(f"a chunk took {elapsed} s")
        if kind in (RETURNED, MIXED, BROKEN):
            chunk = self._forget(number)
            if chunk is None:
                return  # it is wanted no more
            before = self.duration
            self.duration = elapsed if before is None else before + _SMOOTHING * (elapsed - before)
            self._result_size += _SMOOTHING * (size - self._result_size)
            chunk.sink.settle(chunk, ChunkResult(kind, parts, size, self.host))
            self._scheduler.dispatch_soon()
        elif kind == UNFIT:
            self._scheduler.initializer_failed(self, parts)


class ResultDecoder:
    """Cuts the output of one worker into results.

    Args:
        on_result: Is called with each: kind, number of the chunk, seconds that it took, parts, their size.
        on_memory_error: Is called instead, with the number of the chunk and the error, if there was no memory for it.

    Attributes:
        held: How many bytes of the present result are kept.
    """

    def __init__(
        self,
        on_result: Callable[[int, int, float, list[bytes], int], None],
        on_memory_error: Callable[[int, MemoryError], None],
    ) -> None:
        self._on_result, self._on_memory_error = on_result, on_memory_error
        self._error: MemoryError | None = None  # why the present result is not kept
        self.held = 0
        memory_pressure.hold(self)
        self._rest = b""
        self._head: tuple[int, int, float, int] | None = None
        self._parts: list[bytes] = []
        self._left = 0

    def feed(self, data: bytes, position: int) -> None:
        """Take a piece."""
        if self._rest:
            data, position, self._rest = self._rest + data[position:], 0, b""
        end = len(data)
        while True:
            if self._head is None:
                if end - position < ANSWER.size:
                    self._rest = data[position:]
                    return
                self._head = ANSWER.unpack_from(data, position)
                self._left = self._head[3]
                position += ANSWER.size
            count = min(self._left, end - position)
            self._take(data, position, count)
            position += count
            self._left -= count
            if self._left:
                return
            kind, number, elapsed, size = self._head
            parts, error = self._parts, self._error
            self._parts, self._head, self._error, self.held = [], None, None, 0
            if error is not None:
                self._on_memory_error(number, error)
            else:
                self._on_result(kind, number, elapsed, parts, size)

    def _take(self, data: bytes, position: int, count: int) -> None:
        if self._error is not None:
            return
        try:
            self._parts.append(data[position : position + count])
            self.held += count
        except MemoryError:
            self.give_up(memory_pressure.no_room(self.held))

    def give_up(self, error: MemoryError) -> None:
        """Let go of the present result; what else comes of it is not kept."""
        self._parts.clear()
        self.held = 0
        self._error = error


def worker_lines(host: str, shown: bool) -> Lines:
    """Return the lines of what the workers of a host print: printed with the host's name, or logged."""
    return Lines(host, None if shown else functools.partial(_log, host))


def _log(host: str, lines: Sequence[str]) -> None:
    for line in lines:
        _logger.debug("%s: %s", host, line)
