"""The scheduler's part in changing the size of a cluster: retiring workers, and `adapt`."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.worker_launcher import ServiceWorkerLauncher, Worker
from lazycluster.core import event_loop
from lazycluster.core.suggestions import suggestion
from lazycluster.exceptions import LazyclusterError

if TYPE_CHECKING:
    from distributed import Status
    from distributed.deploy.adaptive import Adaptive

    from .cluster import DaskCluster
    from .engine import DaskEngine

__all__ = [
    "AdaptedCluster",
    "check_duration",
    "check_names",
    "checked_amount",
    "choose_to_retire",
    "idle_since",
    "retire",
    "scheduler_at",
]

logger = logging.getLogger("lazycluster")

_LONGEST_PAUSE = 60.0  # seconds between two attempts to start workers where that fails
_CLOSE_LIMIT = 5.0
_ANSWER_LIMIT = 30.0  # seconds for a scheduler that is busy
_LIMITS = ("minimum_cores", "maximum_cores", "minimum_memory", "maximum_memory")


@asynccontextmanager
async def scheduler_at(address: str, arguments: Mapping[str, Any]) -> AsyncIterator[Any]:
    """Have a scheduler to call.

    Args:
        address: Where it is.
        arguments: How one connects to it.

    Raises:
        ClusterError: If it does not answer.
    """
    from distributed.core import rpc

    scheduler = rpc(address, connection_args=arguments)
    try:
        yield scheduler
    except OSError as error:
        raise ClusterError(f"the scheduler does not answer: {error}") from None
    finally:
        await scheduler.close_rpc()


def access(dask: DaskEngine, port: int) -> tuple[str, dict[str, Any]]:
    """Return the scheduler's address, and how one connects to it; not before distributed was imported."""
    from .programs.tls import MemorySecurity

    return dask.access.address(port), MemorySecurity(**dask.access.security("client")).get_connection_args("client")


async def idle_since(dask: DaskEngine, port: int) -> float | None:
    """Return since when, in seconds since 1970, the scheduler has had no task to do; None if it has some.

    Raises:
        ClusterError: If it does not answer.
    """
    from distributed.protocol.pickle import dumps

    def question(dask_scheduler: Any) -> Any:  # in a function, so that it goes by value
        return dask_scheduler.check_idle()

    async def ask() -> Any:
        async with scheduler_at(*access(dask, port)) as scheduler:
            return await scheduler.run_function(function=dumps(question), args=dumps(()), kwargs=dumps({}), wait=True)

    try:
        answer = await asyncio.wait_for(ask(), _ANSWER_LIMIT)
    except (asyncio.TimeoutError, TimeoutError):
        raise ClusterError(f"the scheduler did not answer within {_ANSWER_LIMIT:g} s") from None
    if answer.get("status") != "OK":
        raise ClusterError(f"the scheduler does not tell whether it is idle: {answer.get('text', answer)}")
    since = answer["result"]
    return None if since is None else float(since)


async def retire(address: str, arguments: Mapping[str, Any], workers: Sequence[Worker]) -> dict[str, str]:
    """Have the scheduler retire workers: what they hold is copied to others first.

    Args:
        address: The scheduler's.
        arguments: How one connects to it.
        workers: Which; those that it does not know hold nothing.

    Returns:
        By name why a worker could not be retired.
    """
    addresses = {str(worker.service.detail.get("address")): worker for worker in workers}
    async with scheduler_at(address, arguments) as scheduler:
        known = [address for address in await scheduler.ncores() if address in addresses]
        if not known:
            return {}
        await scheduler.retire_workers(workers=known, close_workers=True, remove=True)
        left = await scheduler.ncores()
        held = await scheduler.has_what(workers=[address for address in known if address in left])
    return {
        addresses[address].name: f"{addresses[address].name}: it holds {len(keys)} results or actors that no other "
        "worker can take\n  Next step: gather or release them, keep more workers, or call cleanup()"
        for address, keys in held.items()
        if address in left
    }


async def choose_to_retire(
    address: str, arguments: Mapping[str, Any], workers: Sequence[Worker], count: int
) -> list[Worker] | None:
    """Return those of some workers that the scheduler can spare the best; None if it does not say."""
    by_name = {worker.name: worker for worker in workers}
    async with scheduler_at(address, arguments) as scheduler:
        names = await scheduler.workers_to_close(n=count, attribute="name")
    chosen = [by_name[str(name)] for name in names if str(name) in by_name]
    return chosen if len(chosen) == count else None


class _SchedulerCalls:
    """The scheduler, as somebody calls it who is to be ended without being cut short."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._under_way: set[asyncio.Future[Any]] = set()
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._scheduler, name)

        def counted(**arguments: Any) -> asyncio.Future[Any]:
            if self._ended:  # what goes on with it ends in silence, not with a warning of a connection that was closed
                raise asyncio.CancelledError
            future: asyncio.Future[Any] = asyncio.ensure_future(call(**arguments))
            self._under_way.add(future)
            future.add_done_callback(self._under_way.discard)
            return future

        return counted

    async def close(self) -> None:
        """Let what is under way end, have nothing more begin, and close the connections."""
        self._ended = True
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_CLOSE_LIMIT)
        await self._scheduler.close_rpc()


class AdaptedCluster:
    """A cluster as distributed's `Adaptive` sees it, on the event loop's thread.

    Attributes:
        strategy: The `Adaptive`.
        loop: The event loop, as tornado has it.
        scheduler_comm: The scheduler.
    """

    def __init__(self, cluster: DaskCluster, launcher: ServiceWorkerLauncher, scheduler: Any, loop: Any) -> None:
        self.strategy: Adaptive | None = None
        self.loop = loop
        self.scheduler_comm = _SchedulerCalls(scheduler)
        self._cluster, self._launcher = cluster, launcher
        self._failures = 0
        self._not_before = 0.0

    @classmethod
    async def begin(
        cls, cluster: DaskCluster, launcher: ServiceWorkerLauncher, address: str, arguments: Mapping[str, Any]
    ) -> AdaptedCluster:
        """Return one that can be used."""
        from distributed.core import rpc
        from tornado.ioloop import IOLoop

        return cls(cluster, launcher, rpc(address, connection_args=arguments), IOLoop.current())

    async def end(self) -> None:
        """Have no more changes begin."""
        if self.strategy is not None:
            self.strategy.stop()
        await self.scheduler_comm.close()

    def __await__(self) -> Generator[Any, None, AdaptedCluster]:
        return self
        yield

    @property
    def status(self) -> Status:
        """State of the cluster."""
        return self._cluster.status

    @property
    def plan(self) -> set[str]:
        """The workers that there are to be."""
        return self._launcher.planned

    requested = plan

    @property
    def observed(self) -> set[str]:
        """The workers that are there."""
        return {worker.name for worker in self._launcher.workers if worker.service.state == "ready"}

    async def scale(self, n: int) -> None:
        """Have more workers; where that fails, it is not tried again at once."""
        now = asyncio.get_running_loop().time()
        if now < self._not_before:
            return
        if await self._try(event_loop.in_thread(self._cluster._change, n)):
            self._failures = 0
        else:
            self._failures += 1
            self._not_before = now + min(_LONGEST_PAUSE, 2.0**self._failures)

    async def scale_down(self, names: Sequence[str]) -> None:
        """Have workers leave that the scheduler has retired."""
        await self._try(event_loop.in_thread(self._cluster._remove, [str(name) for name in names]))

    async def _try(self, change: Coroutine[Any, Any, None]) -> bool:
        try:
            await change
        except LazyclusterError as error:
            if self._cluster._adapting is self:  # else it was ended, as was wanted
                logger.warning("adapting the cluster: %s", error)
            return False
        return True


def check_names(options: Mapping[str, Any], strategy: type[Adaptive]) -> None:
    """Refuse options that a strategy, and what it asks of the scheduler, would ignore.

    Raises:
        TypeError: There is no such option.
    """
    from distributed import Scheduler

    # Adaptive hands those that it does not know to the scheduler, which is told them when workers are to leave.
    makers = [vars(one)["__init__"] for one in strategy.__mro__[:-1] if "__init__" in vars(one)]
    known = {name for maker in makers for name in _parameters(maker)} | {
        name for name in _parameters(Scheduler.workers_to_close) if name not in ("target", "key", "attribute")
    }
    for name in options:
        if name not in known:
            options_of_it = dict.fromkeys(["minimum", "maximum", *_LIMITS, *sorted(known)])
            raise TypeError(f"adapt() has no option {name!r}{suggestion(name, options_of_it)}")


def _parameters(function: Any) -> list[str]:
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return [one.name for one in found if one.kind in plain and one.name not in ("self", "cluster")]


def checked_amount(value: object, what: str) -> float:
    """Return a limit of cores or memory as a number.

    Raises:
        ValueError: If it makes no sense.
    """
    from dask.utils import parse_bytes

    try:
        if isinstance(value, bool) or (isinstance(value, str) and not what.endswith("memory")):
            raise ValueError
        amount = parse_bytes(value) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
        if not 0 <= amount < math.inf:
            raise ValueError
    except (TypeError, ValueError):
        example = ", or a string such as '16 GiB'" if what.endswith("memory") else ""
        raise ValueError(f"{what} must be a number of at least 0{example}, not {value!r}") from None
    return amount


def check_duration(value: Any, what: str) -> None:
    """Refuse what is no time for Dask.

    Raises:
        ValueError: If it is none.
    """
    from dask.utils import parse_timedelta

    try:
        parse_timedelta(value)
    except Exception:  # noqa: BLE001  (a KeyError, an AttributeError, ...: it depends on what was given)
        raise ValueError(f'{what} must be seconds, or a string such as "1s" or "500 ms", not {value!r}') from None
