"""More and fewer workers of a Dask cluster that runs, by hand or as the scheduler sees fit."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import logging
import math
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.runtime_cluster import MasterWorkerCluster
from lazycluster.cluster.worker_launcher import ServiceWorkerLauncher, Worker
from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError

if TYPE_CHECKING:
    from distributed import Status
    from distributed.deploy.adaptive import Adaptive

__all__ = ["ElasticCluster", "choose_to_retire", "retire", "scheduler_at"]

logger = logging.getLogger("lazycluster")

_LONGEST_PAUSE = 60.0  # seconds between two attempts to start workers where that fails
_CLOSE_LIMIT = 5.0
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
        "worker can take. Next step: gather or release them, keep more workers, or call cleanup()"
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


class ElasticCluster(MasterWorkerCluster):
    """The part of a Dask cluster that changes its size."""

    _adapting: _Adapting | None = None

    def _scheduler_access(self) -> tuple[str, Mapping[str, Any]]:
        """Return the scheduler's address, and how one connects to it."""
        raise NotImplementedError

    def _check_running(self) -> None:
        raise NotImplementedError

    @property
    def status(self) -> Status:
        """What the cluster does, in distributed's own words."""
        raise NotImplementedError

    def scale(self, n: int) -> None:
        """Start workers, or have some leave, until there are `n` on the hosts that the group has now.

        Workers leave in good order: what they hold is copied to others first, tasks that they work on are done by
        others. Those on hosts that were removed from the group leave, too. This ends `adapt`. A worker's threads and
        memory do not change when it gets or loses neighbours: where several are to be on a host, say ``nthreads`` and
        ``memory_limit``.

        Args:
            n: How many workers there are to be; with 0, tasks wait until there are some again.

        Raises:
            ClusterError: If the cluster does not run; or if some workers did not start, or could not leave since
                nobody can take what they hold: then what could be done is done.
        """
        count = checked_count(n, "the number of workers", 0)
        self._check_running()
        self._end_adapting()
        self._change(count)

    def adapt(
        self,
        minimum: int | None = None,
        maximum: float | None = None,
        *,
        Adaptive: type[Adaptive] | None = None,  # noqa: N803  (the name that clusters of distributed have)
        minimum_cores: float | None = None,
        maximum_cores: float | None = None,
        minimum_memory: str | float | None = None,
        maximum_memory: str | float | None = None,
        **options: Any,
    ) -> Adaptive:
        """Have the number of workers follow the load, until `scale` or `cleanup` is called.

        Args:
            minimum: How many workers there are at least; by default as Dask's configuration says, 0.
            maximum: How many there are at most; by default as Dask's configuration says, or if that sets no limit, one
                per host (with `gpus_per_worker`, per GPU), or as many as there are now if that is more.
            Adaptive: The strategy; by default distributed's own.
            minimum_cores: How many threads all workers together have at least. This and the next three need workers of
                one size: as `nthreads` and `memory_limit` of the cluster say, or as those that are there.
            maximum_cores: How many threads they have at most.
            minimum_memory: How much memory they have at least: bytes, or a text such as ``"16 GiB"``.
            maximum_memory: How much memory they have at most.
            **options: Further options of it, e.g. ``interval="1s"``, ``wait_count=3``, ``target_duration="5s"``.

        Returns:
            What adapts the cluster; its ``stop()`` leaves the cluster as it is then.

        Raises:
            ClusterError: If the cluster does not run, or the size of its workers is not known.
            TypeError: If there is no such option.
            ValueError: If a number makes no sense.
        """
        import dask.config
        from distributed.deploy import adaptive

        self._check_running()
        launcher = self._own_launcher()
        strategy_class = Adaptive or adaptive.Adaptive
        _check_names(options, strategy_class)
        minimum, maximum = self._bounds(
            minimum, maximum, ("cores", minimum_cores, maximum_cores), ("memory", minimum_memory, maximum_memory)
        )
        if minimum is None:
            minimum = int(dask.config.get("distributed.adaptive.minimum"))
        if maximum is None:
            maximum = dask.config.get("distributed.adaptive.maximum")
        checked_count(minimum, "minimum", 0)
        if maximum != math.inf:
            checked_count(maximum, "maximum", max(1, minimum))
        else:
            maximum = max(launcher.default_count(), len(launcher.workers), minimum, 1)
        for name in ("interval", "target_duration"):
            _check_duration(options.get(name), name)
        self._end_adapting()
        view = event_loop.run(_Adapting.begin(self, launcher, *self._scheduler_access()))
        try:
            strategy = strategy_class(view, minimum=minimum, maximum=maximum, **options)
        except BaseException:
            event_loop.run(view.end())
            raise
        view.strategy = strategy
        self._adapting = view
        return strategy

    def _worker_size(self, what: str) -> float:
        """Return the size of each worker: threads for ``cores``, bytes for ``memory``.

        Raises:
            ClusterError: If it is not known, or there is no common one.
        """
        raise NotImplementedError

    def _bounds(
        self, minimum: int | None, maximum: float | None, *limits: tuple[str, object, object]
    ) -> tuple[int | None, float | None]:
        """Return the least and the highest number of workers, from limits of what they have together."""
        for what, least, most in limits:
            if least is not None:
                amount = _amount(least, f"minimum_{what}")
                minimum = max(minimum or 0, math.ceil(amount / self._worker_size(what)))
            if most is not None:
                amount = _amount(most, f"maximum_{what}")
                count = math.floor(amount / self._worker_size(what))
                if count < max(1, minimum or 0):
                    raise ValueError(
                        f"maximum_{what}={most!r} leaves room for {count} workers, fewer than there are to be at least "
                        f"({max(1, minimum or 0)}); each has {self._worker_size(what):g}"
                    )
                maximum = count if maximum is None else min(maximum, count)
        return minimum, maximum

    def _own_launcher(self) -> ServiceWorkerLauncher:
        launcher = self._worker_launcher
        if not isinstance(launcher, ServiceWorkerLauncher):
            raise ClusterError(
                "the workers were started by a launcher of your own, which says nothing of how they leave: "
                "build it on ServiceWorkerLauncher, or use start_workers()"
            )
        return launcher

    def _end_adapting(self) -> None:
        view, self._adapting = self._adapting, None
        if view is not None:
            event_loop.run(view.end())

    def _change(self, count: int) -> None:
        """Have as many workers as that."""
        launcher = self._own_launcher()
        self._in_order(launcher, lambda port: launcher.scale(count, port, self._spare(launcher)))

    def _remove(self, names: Sequence[str]) -> None:
        """Have certain workers leave."""
        launcher = self._own_launcher()
        self._in_order(
            launcher, lambda _: launcher.leave([worker for worker in launcher.workers if worker.name in names])
        )

    def _in_order(self, launcher: ServiceWorkerLauncher, work: Any) -> None:
        import distributed.core  # noqa: F401  (it takes a second, which is not to be the event loop's)

        with self._changing, self._shown(f"Scaling the {type(self).__name__}"):
            self._check_running()
            port = self.master_port
            assert port is not None
            try:
                launcher.run(work(port))
            finally:
                self._ports = self._spare(launcher)

    def _spare(self, launcher: ServiceWorkerLauncher) -> list[int]:
        """Return the ports that may be used for workers."""
        taken = {self.master_port, *(port for worker in launcher.workers for port in worker.ports.values())}
        return [port for port in self._all_ports if port not in taken]


class _SchedulerCalls:
    """The scheduler, as somebody calls it who is to be ended without being cut short."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._under_way: set[asyncio.Future[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._scheduler, name)

        def counted(**arguments: Any) -> asyncio.Future[Any]:
            future: asyncio.Future[Any] = asyncio.ensure_future(call(**arguments))
            self._under_way.add(future)
            future.add_done_callback(self._under_way.discard)
            return future

        return counted

    async def close(self) -> None:
        """Let what is under way end, and close the connections."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_CLOSE_LIMIT)
        await self._scheduler.close_rpc()


class _Adapting:
    """A cluster as distributed's `Adaptive` sees it, on the event loop's thread.

    Attributes:
        strategy: The `Adaptive`.
        loop: The event loop, as tornado has it.
        scheduler_comm: The scheduler.
    """

    def __init__(self, cluster: ElasticCluster, launcher: ServiceWorkerLauncher, scheduler: Any, loop: Any) -> None:
        self.strategy: Adaptive | None = None
        self.loop = loop
        self.scheduler_comm = _SchedulerCalls(scheduler)
        self._cluster, self._launcher = cluster, launcher
        self._failures = 0
        self._not_before = 0.0

    @classmethod
    async def begin(
        cls, cluster: ElasticCluster, launcher: ServiceWorkerLauncher, address: str, arguments: Mapping[str, Any]
    ) -> _Adapting:
        """Return one that can be used."""
        from distributed.core import rpc
        from tornado.ioloop import IOLoop

        return cls(cluster, launcher, rpc(address, connection_args=arguments), IOLoop.current())

    async def end(self) -> None:
        """Have no more changes begin."""
        if self.strategy is not None:
            self.strategy.stop()
        await self.scheduler_comm.close()

    def __await__(self) -> Generator[Any, None, _Adapting]:
        return self
        yield

    @property
    def status(self) -> Status:
        """What the cluster does."""
        return self._cluster.status

    @property
    def plan(self) -> set[str]:
        """The workers that there are to be."""
        return {worker.name for worker in self._launcher.workers if not worker.has_gone}

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


def _check_names(options: Mapping[str, Any], strategy: type[Adaptive]) -> None:
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
            close = difflib.get_close_matches(name, ["minimum", "maximum", *_LIMITS, *known], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"
            raise TypeError(f"adapt() has no option {name!r}{hint}")


def _parameters(function: Any) -> list[str]:
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return [one.name for one in found if one.kind in plain and one.name not in ("self", "cluster")]


def _amount(value: object, what: str) -> float:
    from dask.utils import parse_bytes

    try:
        if isinstance(value, bool) or (isinstance(value, str) and not what.endswith("memory")):
            raise ValueError
        amount = parse_bytes(value) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
        if not 0 <= amount < math.inf:
            raise ValueError
    except (TypeError, ValueError):
        example = ", or a text such as '16 GiB'" if what.endswith("memory") else ""
        raise ValueError(f"{what} must be a number of at least 0{example}, not {value!r}") from None
    return amount


def _check_duration(value: Any, what: str) -> None:
    from dask.utils import parse_timedelta

    try:
        parse_timedelta(value)
    except Exception:  # noqa: BLE001  (a KeyError, an AttributeError, ...: it depends on what was given)
        raise ValueError(f'{what} must be seconds, or a text such as "1s" or "500 ms", not {value!r}') from None


def checked_count(value: object, what: str, least: int) -> int:
    """Return a number if it makes sense.

    Raises:
        ValueError: If it does not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} must be an integer of at least {least}, not {value!r}")
    return value
