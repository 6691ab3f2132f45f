"""Scheduler of a pool over hosts: chunks wait in one queue, and go to the hosts as these have capacity.

Lives on the event loop's thread, but for the methods that say so.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import signal as signals
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lazycluster.agent.restart_policy import RestartPolicy
from lazycluster.core import event_loop
from lazycluster.core.words import signal_name
from lazycluster.exceptions import (
    AgentError,
    BrokenPoolError,
    ConnectionLostError,
    HostsLostError,
    LazyclusterError,
    WorkerLostError,
)

from .blob_store import BlobStore
from .chunks import Chunk, Failure, initializer_error
from .remote_pool import PoolOptions, RemotePool

if TYPE_CHECKING:
    from lazycluster.tasks.context import Context


__all__ = ["ChunkScheduler"]

_logger = logging.getLogger("lazycluster")

ContextWhenBack = Callable[[], Awaitable["Context | None"]]

_MAX_REJOINS = 5  # of a host within minutes
_LINES_SHOWN = 20  # of what workers have printed
MAX_DEATHS = 3  # workers or hosts that may die under a call before it is given up


class _Free(NamedTuple):
    """A pool that takes more chunks: the least of several is the one that has the least to do for its size."""

    load: float
    order: int
    pool: RemotePool


def _taken(chunk: Chunk, free: list[_Free], able: list[_Free]) -> tuple[RemotePool, int]:
    """Take the pool for a chunk out of the heap; if possible not one that the call has taken down before."""
    if not chunk.suspect and not chunk.tried_on:  # as nearly always: to look at all hosts for each chunk takes long
        one = heapq.heappop(free)
    else:
        one = min(able, key=lambda one: (one.pool.host in chunk.tried_on, *one[:2]))
        free.remove(one)
        heapq.heapify(free)
    return one.pool, one.order


class ChunkScheduler:
    """Assigns chunks to the workers of some hosts.

    Args:
        contexts: The hosts, and how functions are run on each.
        options: What the workers are like, per host.
        blobs: What several calls need.
        when_back: For each host what returns how functions are run there once it is back, None if it is not coming.

    Attributes:
        error: Why nothing can be run any more, None while it can.
    """

    def __init__(
        self,
        contexts: Sequence[Context],
        options: Sequence[PoolOptions],
        blobs: BlobStore,
        when_back: Sequence[ContextWhenBack],
    ) -> None:
        self.blobs = blobs
        self.error: BaseException | None = None
        self._pools: list[RemotePool] = []
        self._contexts, self._options, self._contexts_when_back = contexts, options, when_back
        self._rejoin_policies = [RestartPolicy(_MAX_REJOINS) for _ in contexts]
        self._inbox: deque[Chunk] = deque()
        self._cancels: deque[Chunk] = deque()
        self._releases: deque[int] = deque()
        self._pending: deque[Chunk] = deque()
        self._wake_scheduled = False
        self._drop_requested = False
        self._dispatch_scheduled = False
        self._loop = event_loop.get_loop()
        self._runs: list[asyncio.Task[None]] = []
        self._lost: dict[str, str] = {}
        self._rejoining = 0  # hosts that were lost and are waited for
        self._without_gpus: list[str] = []
        self._closed = False

    # --- from any thread -----------------------------------------------------------------------
    def start(self, imports: Sequence[str], fresh: bool) -> None:
        """Start workers on all hosts, without waiting.

        Args:
            imports: The installed modules that the first calls need.
            fresh: Whether nothing may be imported before these.
        """
        self._loop.call_soon_threadsafe(self._start, () if fresh else imports)

    def submit(self, chunk: Chunk) -> None:
        """Have a chunk run."""
        self._inbox.append(chunk)
        self._wake()

    def cancel(self, chunks: Iterable[Chunk]) -> None:
        """Have chunks forgotten, and ended where they run; nothing more is heard of them."""
        for chunk in chunks:
            chunk.cancelled = True
            self._cancels.append(chunk)
        self._wake()

    def release(self, blobs: Iterable[int]) -> None:
        """Note that blobs have one user less each; not before what was submitted and cancelled until now is handled."""
        self._releases.extend(blobs)
        self._wake()

    def settle(self, chunk: Chunk, failure: Failure) -> None:
        """Settle a chunk, after what was submitted and cancelled until now is handled."""
        self._loop.call_soon_threadsafe(chunk.sink.settle, chunk, failure)

    def drop_unwanted(self) -> None:
        """Drop what waits and is not wanted any more."""
        self._drop_requested = True
        self._wake()

    def _wake(self) -> None:
        if not self._wake_scheduled:
            try:
                self._wake_scheduled = True
                self._loop.call_soon_threadsafe(self._on_wake)
            except BaseException:  # Ctrl-C: else nothing would ever wake it again
                self._wake_scheduled = False
                raise

    # --- on the loop ---------------------------------------------------------------------------
    def _start(self, imports: Sequence[str]) -> None:
        if self._closed or self._pools:
            return
        self._pools = [
            RemotePool(self, context, option) for context, option in zip(self._contexts, self._options, strict=True)
        ]
        self._runs = [asyncio.ensure_future(pool.run(imports)) for pool in self._pools]

    def _on_wake(self) -> None:
        self._wake_scheduled = False  # first: what comes from now on wakes it again
        while self._inbox:
            self._pending.append(self._inbox.popleft())
        while self._cancels:
            chunk = self._cancels.popleft()
            for pool in self._pools:
                pool.cancel(chunk)
        if self._drop_requested:
            self._drop_requested = False
            self._pending = deque(chunk for chunk in self._pending if chunk.sink.is_wanted(chunk))
        while self._releases:
            self.blobs.release(self._releases.popleft())
        self._dispatch()

    def dispatch_soon(self) -> None:
        """Assign chunks after all that is to be handled in this round of the loop."""
        if not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_scheduled = False
        if self.error is not None:
            self._fail_pending(self.error)
            return
        free = [_Free(pool.load, index, pool) for index, pool in enumerate(self._pools) if pool.capacity > 0]
        heapq.heapify(free)
        held = []
        while self._pending and free:
            chunk = self._pending.popleft()
            able = [one for one in free if not one.pool.has_suspect] if chunk.suspect else free
            if not able:
                held.append(chunk)
                continue
            if chunk.cancelled or not chunk.sink.mark_started(chunk):
                continue
            pool, index = _taken(chunk, free, able)
            pool.assign(chunk)
            if pool.capacity > 0:
                heapq.heappush(free, _Free(pool.load, index, pool))
        if not self._pending:
            self._balance()
        self._pending.extendleft(reversed(held))
        dropped, self.blobs.dropped = self.blobs.dropped, []
        for pool in self._pools:
            for blob in dropped:
                pool.drop(blob)
            pool.flush()

    def _balance(self) -> None:
        """Have hosts whose workers are busy give back chunks that wait there while others have nothing to do."""
        idle = sum(pool.idle_workers for pool in self._pools)
        for pool in sorted(self._pools, key=lambda pool: pool.stealable, reverse=True):
            count = min(idle, pool.stealable)
            if not count:
                return
            idle -= count
            pool.steal(count)

    def has_others(self, pool: RemotePool) -> bool:
        """Tell whether other pools can run what this one has."""
        return any(other is not pool and not other.over and not other.away for other in self._pools)

    # --- callbacks of the pools ----------------------------------------------------------------
    def requeue(self, chunks: list[Chunk]) -> None:
        """Take chunks back that were not begun, or whose worker was ended for another's sake."""
        self._pending.extendleft(reversed([chunk for chunk in chunks if not chunk.cancelled]))
        self.dispatch_soon()

    def worker_died(self, pool: RemotePool, chunk: Chunk, index: int, fields: dict[str, Any]) -> None:
        """Have a call tried again that a worker died under, and those beside it."""
        index = min(max(index, chunk.first), chunk.first + chunk.count - 1)
        before = chunk.part(chunk.first, index - chunk.first)
        after = chunk.part(index + 1, chunk.first + chunk.count - index - 1)
        blamed = self._count_death(chunk.part(index, 1), pool.host)
        again = [part for part in (before, after) if part.count]
        name = blamed.sink.call_name(blamed, index)
        _logger.warning("%s: a worker has %s under %s", pool.host, _exit_text(fields), name)
        if blamed.deaths >= MAX_DEATHS:
            blamed.sink.settle(blamed, Failure(_worker_lost_error(blamed, name, pool.host, fields)))
        else:
            again.insert(1 if before.count else 0, blamed)
        self.requeue(again)

    @staticmethod
    def _count_death(chunk: Chunk, host: str) -> Chunk:
        chunk.deaths += 1
        chunk.tried_on = (*chunk.tried_on, host)
        return chunk

    def initializer_failed(self, pool: RemotePool, parts: list[bytes]) -> None:
        """Give up: workers cannot be initialised."""
        cause = initializer_error(parts, pool.host)
        why = str(cause) if isinstance(cause, LazyclusterError) else _error_text(cause)
        error = BrokenPoolError(f"{pool.host}: the workers cannot be used, their initializer has failed: {why}")
        error.__cause__ = cause
        self._break(error)

    def pool_lost(self, pool: RemotePool, error: LazyclusterError) -> None:
        """Have what a host had run by the others."""
        if self._closed:
            return
        others = [other.host for other in self._pools if not other.over]
        if isinstance(error, AgentError) and error.kind == "gpu":
            self._without_gpus.append(str(error))
            if others:
                _logger.warning("left out: %s", error)
                return
            error = AgentError(pool.host, "gpu", "no host has GPUs for calls:\n  " + "\n  ".join(self._without_gpus))
        if isinstance(error, AgentError) and error.kind == "worker":
            error = _broken_start(error, bool(self._options[self._pools.index(pool)].initializer))
        policy = self._rejoin_policies[self._pools.index(pool)]
        if not isinstance(error, ConnectionLostError) and not (others and policy.count):
            self._break(error)
            return
        self._lost[pool.host] = str(error).partition("\n")[0]
        chunks = pool.take_all()
        # Any may have been begun: what a worker answered at last is not known here, nor what it began then.
        again = [part for chunk in chunks for part in self._retries(self._count_death(chunk, pool.host))]
        delay = policy.next() if pool.may_come_back else None
        if delay is not None:
            self._rejoining += 1
            self._runs.append(asyncio.ensure_future(self._rejoin(pool, delay)))
        if others or self._rejoining:
            where = "elsewhere" if others else "when a host is back"
            _logger.warning("%s: %d calls are run %s: %s", pool.host, len(again), where, error)
        self.requeue(again)
        self._check_hosts(pool.host)

    def _retries(self, chunk: Chunk) -> list[Chunk]:
        """Return the chunks to run again after a host was lost under one; at the last chance each call is its own."""
        if chunk.deaths >= MAX_DEATHS:
            name = chunk.sink.call_name(chunk, chunk.first)
            chunk.sink.settle(chunk, Failure(_worker_lost_error(chunk, name, chunk.tried_on[-1], None)))
            return []
        chunk.suspect = chunk.deaths == MAX_DEATHS - 1
        return chunk.calls() if chunk.suspect else [chunk]

    def _check_hosts(self, host: str) -> None:
        """Give up if no host is left, after one was lost."""
        if self._rejoining or self._closed or self.error is not None or any(not pool.over for pool in self._pools):
            return
        reasons = "\n".join(f"  {reason}" for reason in self._lost.values())
        self._break(
            HostsLostError(
                f"no host is left to run calls on:\n{reasons}\n  Next step: check that they are up, connect again",
                hosts=list(self._lost),
                host=host,
            )
        )

    async def _rejoin(self, pool: RemotePool, delay: float) -> None:
        """Use a host again whose agent was lost, once it is back."""
        index = self._pools.index(pool)
        try:
            await asyncio.sleep(delay)
            context = await self._contexts_when_back[index]()
            if context is None or self._closed or self.error is not None:
                return
            _logger.info("%s: is back, and takes part again", pool.host)
            self._lost.pop(pool.host, None)
            self._pools[index] = pool = RemotePool(self, context, self._options[index])
        finally:
            self._rejoining -= 1
            self._check_hosts(pool.host)
        await pool.run(())

    def _break(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        for pool in self._pools:
            self._pending.extend(pool.take_all())
            if not pool.over:
                asyncio.ensure_future(pool.close(kill=True))  # noqa: RUF006  (it is waited for in `close`)
        self._fail_pending(self.error)

    def _fail_pending(self, error: BaseException) -> None:
        while self._pending:
            chunk = self._pending.popleft()
            if not chunk.cancelled and chunk.sink.mark_started(chunk):
                chunk.sink.settle(chunk, Failure(error))

    # --- the end -------------------------------------------------------------------------------
    async def close(self, kill: bool) -> None:
        """End the workers.

        Args:
            kill: Whatever they do; what was not answered is settled as cancelled by who asks for this.
        """
        self._closed = True
        await asyncio.gather(*(pool.close(kill) for pool in self._pools))
        for run in self._runs:
            if not run.done():
                run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)


def _error_text(error: BaseException) -> str:
    """Return an error as the last line of its traceback shows it."""
    if isinstance(error, SystemExit):
        return f"it has called sys.exit({'' if error.code is None else repr(error.code)})"
    return "".join(traceback.format_exception_only(type(error), error)).strip()


def _broken_start(error: AgentError, initialized: bool) -> BrokenPoolError:
    """Return the error of workers that end before they are ready."""
    when = "in their initializer" if initialized else "before they can do anything"
    text = f"{error.host}: the workers have {_exit_text(error.evidence)} {when}"
    lines = str(error.evidence.get("output", "")).strip().splitlines()[-_LINES_SHOWN:]
    if lines:
        text += "\n  The end of what they printed:\n" + "\n".join(f"    {line}" for line in lines)
    broken = BrokenPoolError(text)
    broken.__cause__ = error
    return broken


def _exit_text(fields: Mapping[str, Any]) -> str:
    number = fields.get("signal")
    if number:
        hint = ": the host may have run out of memory" if number == signals.SIGKILL else ""
        return f"been ended by {signal_name(number)}{hint}"
    status = fields.get("exit")
    return "ended" if status is None else f"ended with exit status {status}"


def _worker_lost_error(chunk: Chunk, name: str, host: str, fields: dict[str, Any] | None) -> WorkerLostError:
    others = chunk.tried_on[:-1]
    if fields is None:
        text = f"{host}: the host was lost"
        pid = status = None
        output = ""
    else:
        text = f"{host}: the worker process {fields.get('pid')} has {_exit_text(fields)}"
        pid, output = fields.get("pid"), str(fields.get("output", ""))
        status = -fields["signal"] if fields.get("signal") else fields.get("exit")
    text += f" while it ran {name}"
    if others:
        text += f", which had been tried {len(others)} times before with the same end, on {', '.join(others)}"
    if output.strip():
        lines = "\n".join(f"    {line}" for line in output.strip().splitlines()[-_LINES_SHOWN:])
        text += f"\n  The end of what the workers of {host} printed:\n{lines}"
    text += "\n  Next step: see what the call needs (memory, for the most part), or run it alone with call()"
    return WorkerLostError(text, call=name, host=host, hosts=chunk.tried_on, pid=pid, exit_status=status, output=output)
