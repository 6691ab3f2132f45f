"""The scheduler of a Dask cluster, for programs that know the clusters of distributed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, cast

from distributed.comm import connect
from distributed.core import rpc
from distributed.objects import SchedulerInfo
from distributed.utils import Log, Logs

from lazycluster.core import event_loop

__all__ = ["SchedulerCalls", "SchedulerView", "awaitable"]

_TRY_EVERY = 0.5  # seconds between two attempts to reach a scheduler that is being started again
_FIRST_ANSWER = 10.0  # seconds
_ONE_ANSWER = 1.0  # seconds
_ASK_EVERY = 0.1  # seconds; distributed tells of new workers, but not when they can work


def awaitable(work: Any) -> Awaitable[Any]:
    """Have a coroutine done on lazycluster's event loop; the result may be awaited on any other one."""
    return asyncio.wrap_future(event_loop.submit(work))


class SchedulerCalls:
    """The scheduler, with the interface of `distributed.core.rpc`, whose calls may be awaited on any event loop.

    Attributes:
        address: Where it is.
    """

    def __init__(self, address: str, arguments: Mapping[str, Any], explained: Callable[[Exception], Exception]) -> None:
        self.address = address
        self._arguments = arguments
        self._explained = explained
        self._rpc: Any = None

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name.startswith("_"):
            raise AttributeError(name)

        async def call(**arguments: Any) -> Any:
            here = self._call(name, arguments)
            return await (here if event_loop.in_loop() else awaitable(here))

        return call

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if self._rpc is None:
            self._rpc = rpc(self.address, connection_args=self._arguments)
        try:
            return await getattr(self._rpc, name)(**arguments)
        except OSError as error:
            raise self._explained(error) from error

    async def close_rpc(self) -> None:
        """Close the connections; a call opens another one."""
        if self._rpc is not None:
            calls, self._rpc = self._rpc, None
            closing = calls.close_rpc()
            await (closing if event_loop.in_loop() else awaitable(closing))


class SchedulerView:
    """View of a scheduler and its workers, from its own messages. All but `info` runs on the event loop.

    Args:
        address: The scheduler's.
        arguments: How one connects to it.
        explained: Returns the error of a call that was not answered, with its cause where that is known.
    """

    def __init__(self, address: str, arguments: Mapping[str, Any], explained: Callable[[Exception], Exception]) -> None:
        self.comm = SchedulerCalls(address, arguments, explained)
        self._arguments = arguments
        self._info: dict[str, Any] = {"workers": {}}
        self._watching: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()

    @property
    def info(self) -> dict[str, Any]:
        """The scheduler's information about itself and its workers, as `distributed.Client.scheduler_info` has it."""
        workers = {address: dict(told) for address, told in self._info["workers"].items()}
        sums = {"n_workers": len(workers), "total_threads": _sum(workers, "nthreads")}
        sums["total_memory"] = _sum(workers, "memory_limit")
        return cast("dict[str, Any]", SchedulerInfo({**self._info, **sums, "workers": workers}))

    async def begin(self) -> None:
        """Have changes followed from now on, and wait until the state of now is known, but not for ever."""
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch())
        if not self._answered.is_set():
            await asyncio.wait([asyncio.ensure_future(self._answered.wait())], timeout=_FIRST_ANSWER)

    async def close(self) -> None:
        """End."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.comm.close_rpc()

    async def _watch(self) -> None:
        while True:
            try:
                comm = await connect(self.comm.address, **self._arguments)
                try:
                    await self._follow(comm)
                finally:
                    comm.abort()
            except (OSError, ValueError):  # the scheduler has gone; it is started again. tornado tells by a ValueError
                self._info = {**self._info, "workers": {}}
            await asyncio.sleep(_TRY_EVERY)

    async def _follow(self, comm: Any) -> None:
        await comm.write({"op": "subscribe_worker_status"})
        self._info = await comm.read()
        self._answered.set()
        while True:
            for change, what in await comm.read():
                if change == "add":
                    workers = {**self._info["workers"], **what.pop("workers")}
                    self._info = {**self._info, **what, "workers": workers}
                elif change == "remove":
                    left = {address: told for address, told in self._info["workers"].items() if address != what}
                    self._info = {**self._info, "workers": left}

    async def wait_for_workers(self, count: int, seconds: float | None, check: Callable[[], Any]) -> None:
        """Wait until so many workers can work.

        Args:
            count: How many.
            seconds: How long at most; None for no limit.
            check: Called now and then; raises an error where there is nothing to wait for any more.

        Raises:
            TimeoutError: If there are fewer then.
        """
        present = 0

        async def wait() -> None:
            nonlocal present
            while True:
                present = await self._running()
                if present >= count:
                    return
                check()
                await asyncio.sleep(_ASK_EVERY)

        try:
            await asyncio.wait_for(wait(), None if seconds is None else max(seconds, _ONE_ANSWER))
        except asyncio.TimeoutError:
            raise _too_few(present, count, seconds) from None

    async def _running(self) -> int:
        try:
            workers = (await self.comm.identity())["workers"].values()
        except OSError:  # the scheduler is being started again, or has failed, which others notice
            return 0
        return sum(worker["status"] == "running" for worker in workers)

    async def logs(self, cluster: str | None, scheduler: bool, workers: bool | Iterable[str]) -> dict[str, str]:
        """Return what the processes of the cluster have logged, by who did.

        Args:
            cluster: What the manager has to say; None to leave it out.
            scheduler: Whether that of the scheduler is wanted.
            workers: Whether those of the workers are wanted, or the addresses of some of them.
        """
        found: dict[str, str] = Logs()
        if cluster is not None:
            found["Cluster"] = Log(cluster)
        if scheduler:
            found["Scheduler"] = _log(await self.comm.get_logs())
        if workers:
            asked = None if isinstance(workers, bool) else list(workers)
            found.update({who: _log(lines) for who, lines in (await self.comm.worker_logs(workers=asked)).items()})
        return found


def _sum(workers: Mapping[str, Mapping[str, Any]], what: str) -> int:
    return sum(told[what] or 0 for told in workers.values())


def _log(lines: Iterable[tuple[str, str]]) -> str:
    text: str = Log("\n".join(line for _, line in lines))
    return text


def _too_few(present: int, wanted: int, seconds: float | None) -> Exception:
    try:
        from distributed.exceptions import WorkerStartTimeoutError
    except ImportError:  # before 2024.7
        return TimeoutError(f"Only {present}/{wanted} workers arrived after {seconds}")
    error: Exception = WorkerStartTimeoutError(present, wanted, seconds)
    return error
