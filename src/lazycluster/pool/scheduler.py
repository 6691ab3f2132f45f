"""Who gets what: chunks wait in one line, and go to the hosts as these have room. Lives on the loop's thread."""

from __future__ import annotations

import asyncio
import logging
import signal as signals
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

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

from .chunks import Chunk, Failure
from .host_pool import HostPool, PoolPlan
from .results import initializer_error
from .shared_objects import SharedObjects

if TYPE_CHECKING:
    from lazycluster.tasks.context import Context


__all__ = ["Scheduler"]

_logger = logging.getLogger("lazycluster")

Again = Callable[[], Awaitable["Context | None"]]

_MOST_RETURNS = 5  # of a host within minutes
MOST_DEATHS = 3  # workers or hosts that may die under a call before it is given up


class Scheduler:
    """Gives chunks to the workers of some hosts.

    Args:
        contexts: The hosts, and how functions are run on each.
        plans: What the workers are like, per host.
        blobs: What several calls need.
        again: For each host what returns how functions are run there once it is back, None if it is not coming back.

    Attributes:
        error: Why nothing can be run any more, None while it can.
    """

    def __init__(
        self, contexts: Sequence[Context], plans: Sequence[PoolPlan], blobs: SharedObjects, again: Sequence[Again]
    ) -> None:
        self.blobs = blobs
        self.error: BaseException | None = None
        self._crews: list[HostPool] = []
        self._contexts, self._plans, self._again = contexts, plans, again
        self._returns = [RestartPolicy(_MOST_RETURNS) for _ in contexts]
        self._inbox: deque[Chunk] = deque()
        self._cancels: deque[Chunk] = deque()
        self._releases: deque[int] = deque()
        self._pending: deque[Chunk] = deque()
        self._lock = threading.Lock()
        self._scheduled = False
        self._sweeping = False
        self._dealing = False
        self._loop = event_loop.get_loop()
        self._runs: list[asyncio.Task[None]] = []
        self._lost: dict[str, str] = {}
        self._returning = 0  # hosts that were lost and are waited for
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
        self._poke()

    def cancel(self, chunks: Iterable[Chunk]) -> None:
        """Have chunks forgotten, and ended where they run; nothing more is heard of them."""
        for chunk in chunks:
            chunk.cancelled = True
            self._cancels.append(chunk)
        self._poke()

    def release(self, blobs: Iterable[int]) -> None:
        """Note that blobs have one user less each; not before what was submitted and cancelled until now is handled."""
        self._releases.extend(blobs)
        self._poke()

    def settle(self, chunk: Chunk, failure: Failure) -> None:
        """Settle a chunk, after what was submitted and cancelled until now is handled."""
        self._loop.call_soon_threadsafe(chunk.sink.settle, chunk, failure)

    def sweep(self) -> None:
        """Drop what waits and is not wanted any more."""
        self._sweeping = True
        self._poke()

    def _poke(self) -> None:
        if not self._scheduled:
            try:
                self._scheduled = True
                self._loop.call_soon_threadsafe(self._poked)
            except BaseException:  # Ctrl-C: else nobody would ever poke again
                self._scheduled = False
                raise

    # --- on the loop ---------------------------------------------------------------------------
    def _start(self, imports: Sequence[str]) -> None:
        if self._closed or self._crews:
            return
        self._crews = [HostPool(self, context, plan) for context, plan in zip(self._contexts, self._plans, strict=True)]
        self._runs = [asyncio.ensure_future(crew.run(imports)) for crew in self._crews]

    def _poked(self) -> None:
        self._scheduled = False  # first: what comes from now on pokes again
        while self._inbox:
            self._pending.append(self._inbox.popleft())
        while self._cancels:
            chunk = self._cancels.popleft()
            for crew in self._crews:
                crew.cancel(chunk)
        if self._sweeping:
            self._sweeping = False
            self._pending = deque(chunk for chunk in self._pending if chunk.sink.wanted(chunk))
        while self._releases:
            self.blobs.release(self._releases.popleft())
        self._deal()

    def deal_soon(self) -> None:
        """Deal after all that is to be handled in this round of the loop."""
        if not self._dealing:
            self._dealing = True
            self._loop.call_soon(self._deal)

    def _deal(self) -> None:
        self._dealing = False
        if self.error is not None:
            self._fail_pending(self.error)
            return
        crews = [crew for crew in self._crews if crew.room > 0]
        held = []
        while self._pending and crews:
            chunk = self._pending.popleft()
            able = [crew for crew in crews if not crew.has_suspect] if chunk.suspect else crews
            if not able:
                held.append(chunk)
                continue
            if chunk.cancelled or not chunk.sink.begins(chunk):
                continue
            # The one that has the least to do for its size; not where the call has done harm already, if possible.
            crew = min(able, key=lambda crew: (crew.host in chunk.touched, len(crew.in_flight) / crew.workers))
            crew.give(chunk)
            if crew.room <= 0:
                crews.remove(crew)
        if not self._pending:
            self._balance()
        self._pending.extendleft(reversed(held))
        dropped, self.blobs.dropped = self.blobs.dropped, []
        for crew in self._crews:
            for blob in dropped:
                crew.drop(blob)
            crew.flush()

    def _balance(self) -> None:
        """Have hosts whose workers are busy give back what they have in stock while others have nothing to do."""
        idle = sum(crew.idle for crew in self._crews)
        for crew in sorted(self._crews, key=lambda crew: crew.stock, reverse=True):
            count = min(idle, crew.stock)
            if not count:
                return
            idle -= count
            crew.ask_back(count)

    def has_others(self, crew: HostPool) -> bool:
        """Tell whether others can run what a crew has."""
        return any(other is not crew and not other.over and not other.away for other in self._crews)

    # --- what crews tell -----------------------------------------------------------------------
    def returned(self, chunks: list[Chunk]) -> None:
        """Take chunks back that were not begun, or whose worker was ended for another's sake."""
        self._pending.extendleft(reversed([chunk for chunk in chunks if not chunk.cancelled]))
        self.deal_soon()

    def died(self, crew: HostPool, chunk: Chunk, index: int, fields: dict[str, Any]) -> None:
        """Have a call tried again that a worker died under, and those beside it."""
        index = min(max(index, chunk.first), chunk.first + chunk.count - 1)
        before = chunk.part(chunk.first, index - chunk.first)
        after = chunk.part(index + 1, chunk.first + chunk.count - index - 1)
        guilty = self._blamed(chunk.part(index, 1), crew.host)
        again = [part for part in (before, after) if part.count]
        name = guilty.sink.name(guilty, index)
        _logger.warning("%s: a worker has %s under %s", crew.host, _how(fields), name)
        if guilty.deaths >= MOST_DEATHS:
            guilty.sink.settle(guilty, Failure(_given_up(guilty, name, crew.host, fields)))
        else:
            again.insert(1 if before.count else 0, guilty)
        self.returned(again)

    @staticmethod
    def _blamed(chunk: Chunk, host: str) -> Chunk:
        chunk.deaths += 1
        chunk.touched = (*chunk.touched, host)
        return chunk

    def unfit(self, crew: HostPool, told: list[bytes]) -> None:
        """Give up: workers cannot be initialised."""
        cause = initializer_error(told, crew.host)
        error = BrokenPoolError(f"{crew.host}: the workers cannot be used, their initializer has failed: {cause}")
        error.__cause__ = cause
        self._break(error)

    def lost(self, crew: HostPool, error: LazyclusterError) -> None:
        """Have what a host had run by the others."""
        if self._closed:
            return
        others = [other.host for other in self._crews if not other.over]
        if isinstance(error, AgentError) and error.kind == "gpu":
            self._without_gpus.append(str(error))
            if others:
                _logger.warning("left out: %s", error)
                return
            error = AgentError(crew.host, "gpu", "no host has GPUs for calls:\n  " + "\n  ".join(self._without_gpus))
        returns = self._returns[self._crews.index(crew)]
        if not isinstance(error, ConnectionLostError) and not (others and returns.count):
            self._break(error)
            return
        self._lost[crew.host] = str(error).partition("\n")[0]
        chunks = crew.take_all()
        # Any may have been begun: what a worker answered at last is not known here, nor what it began then.
        again = [part for chunk in chunks for part in self._with_doubts(self._blamed(chunk, crew.host))]
        delay = returns.next() if crew.may_come_back else None
        if delay is not None:
            self._returning += 1
            self._runs.append(asyncio.ensure_future(self._take_back(crew, delay)))
        if others or self._returning:
            where = "elsewhere" if others else "when a host is back"
            _logger.warning("%s: %d calls are run %s: %s", crew.host, len(again), where, error)
        self.returned(again)
        self._check_hosts(crew.host)

    def _with_doubts(self, chunk: Chunk) -> list[Chunk]:
        """Return what is to be run again of a chunk that hosts were lost under; its last chance is a call's own."""
        if chunk.deaths >= MOST_DEATHS:
            name = chunk.sink.name(chunk, chunk.first)
            chunk.sink.settle(chunk, Failure(_given_up(chunk, name, chunk.touched[-1], None)))
            return []
        chunk.suspect = chunk.deaths == MOST_DEATHS - 1
        return chunk.calls() if chunk.suspect else [chunk]

    def _check_hosts(self, host: str) -> None:
        """Give up if no host is left, after one has gone."""
        if self._returning or self._closed or self.error is not None or any(not crew.over for crew in self._crews):
            return
        reasons = "\n".join(f"  {reason}" for reason in self._lost.values())
        self._break(
            HostsLostError(
                f"no host is left to run calls on:\n{reasons}\n  Next step: see that the hosts are up, connect anew",
                hosts=list(self._lost),
                host=host,
            )
        )

    async def _take_back(self, crew: HostPool, delay: float) -> None:
        """Have a host take part again whose agent was lost, once it is back."""
        index = self._crews.index(crew)
        try:
            await asyncio.sleep(delay)
            context = await self._again[index]()
            if context is None or self._closed or self.error is not None:
                return
            _logger.info("%s: is back, and takes part again", crew.host)
            self._lost.pop(crew.host, None)
            self._crews[index] = crew = HostPool(self, context, self._plans[index])
        finally:
            self._returning -= 1
            self._check_hosts(crew.host)
        await crew.run(())

    def _break(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        for crew in self._crews:
            self._pending.extend(crew.take_all())
            if not crew.over:
                asyncio.ensure_future(crew.close(kill=True))  # noqa: RUF006  (it is waited for in `close`)
        self._fail_pending(self.error)

    def _fail_pending(self, error: BaseException) -> None:
        while self._pending:
            chunk = self._pending.popleft()
            if not chunk.cancelled and chunk.sink.begins(chunk):
                chunk.sink.settle(chunk, Failure(error))

    # --- the end -------------------------------------------------------------------------------
    async def close(self, kill: bool) -> None:
        """End the workers.

        Args:
            kill: Whatever they do; what was not answered is settled as cancelled by who asks for this.
        """
        self._closed = True
        await asyncio.gather(*(crew.close(kill) for crew in self._crews))
        for run in self._runs:
            if not run.done():
                run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)


def _how(fields: dict[str, Any]) -> str:
    number = fields.get("signal")
    if number:
        hint = ": the host may have run out of memory" if number == signals.SIGKILL else ""
        return f"been ended by {signal_name(number)}{hint}"
    status = fields.get("exit")
    return "ended" if status is None else f"ended with exit status {status}"


def _given_up(chunk: Chunk, name: str, host: str, fields: dict[str, Any] | None) -> WorkerLostError:
    others = chunk.touched[:-1]
    if fields is None:
        text = f"{host}: the host was lost"
        pid = status = None
        output = ""
    else:
        text = f"{host}: the worker process {fields.get('pid')} has {_how(fields)}"
        pid, output = fields.get("pid"), str(fields.get("output", ""))
        status = -fields["signal"] if fields.get("signal") else fields.get("exit")
    text += f" while it ran {name}"
    if others:
        text += f", which had been tried {len(others)} times before with the same end, on {', '.join(others)}"
    if output.strip():
        lines = "\n".join(f"    {line}" for line in output.strip().splitlines()[-20:])
        text += f"\n  The end of what the workers of {host} printed:\n{lines}"
    text += "\n  Next step: see what the call needs (memory, for the most part), or run it alone with call()"
    return WorkerLostError(text, call=name, host=host, hosts=chunk.touched, pid=pid, exit_status=status, output=output)
