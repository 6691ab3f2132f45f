"""Calls spread over the hosts of a group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lazycluster.runtimes import Runtime

if TYPE_CHECKING:
    from lazycluster.pool.executor import GroupExecutor

__all__ = ["Spreading"]

T = TypeVar("T")


class Spreading:
    """The part of a group that has calls run wherever there is room."""

    _lock: threading.RLock
    _executors: set[GroupExecutor]  # those that were not shut down
    _kept: tuple[tuple[list[Runtime], float | None, bool], GroupExecutor] | None

    @property
    def runtimes(self) -> list[Runtime]:
        """The runtimes."""
        raise NotImplementedError

    def _check_open(self) -> None:
        raise NotImplementedError

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
        gpus_per_call: float | None = None,
        idle_gpus: bool = False,
    ) -> Iterator[T]:
        """Call a function with each item, spread over all cores of all hosts.

        The worker processes stay for the next `map`. Each host takes as many calls as it can do; what was on a host
        that is lost runs elsewhere. What is bound into the function (``functools.partial(f, data)``) goes to each host
        once.

        Args:
            fn: The function, see :meth:`RuntimeTask.run_function`.
            *iterables: Their items are the arguments, as with :func:`map`. They may be endless.
            timeout: Seconds from now within which each result must come.
            chunksize: Calls that go to a worker together: many for calls that take less than a millisecond.
            buffersize: Items that are taken beyond the results that were handed on, at most; by default as many as
                keep the hosts busy.
            ordered: Whether results come in the order of the items, or as they are there.
            gpus_per_call: How many GPUs each call has for itself, see :meth:`executor`.
            idle_gpus: Whether GPUs are left alone that others use, as nvidia-smi says.

        Returns:
            An iterator over the results. Closing it ends what still runs.

        Raises:
            TypeError: If the function cannot be sent; when iterating, what an argument or result cannot be.
            TimeoutError: When iterating, if a result does not come in time.
            WorkerLostError: When iterating, if workers or hosts have died under a call each time that it was tried.
            Exception: When iterating, what the function has raised.

        Examples:
            >>> list(group.map(pow, range(4), range(4)))        # doctest: +SKIP
            [1, 1, 4, 27]
        """
        return self.kept_executor(gpus_per_call, idle_gpus).map(
            fn, *iterables, timeout=timeout, chunksize=chunksize, buffersize=buffersize, ordered=ordered
        )

    def executor(
        self,
        max_workers: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        workers_per_host: int | Mapping[str, int] | None = None,
        gpus_per_call: float | None = None,
        idle_gpus: bool = False,
        debug: bool = False,
    ) -> GroupExecutor:
        """Return the group as a :class:`concurrent.futures.Executor` with worker processes of its own on all hosts.

        Args:
            max_workers: Workers in all; by default as many on each host as it has cores.
            initializer: Is called in each worker before anything else. Functions of the same script see the globals
                that it assigns.
            initargs: Its arguments.
            workers_per_host: Instead of `max_workers`: how many on each host, or on single ones by their names.
            gpus_per_call: How many GPUs of its host each worker has for itself: ``CUDA_VISIBLE_DEVICES`` is set, and
                there are as many workers as there are GPUs for. With 0.5 two workers share one. Hosts without are left
                out, with a word in the log.
            idle_gpus: Whether GPUs are left alone that others use, as nvidia-smi says.
            debug: Print what the calls print as it comes, each line with its host.

        Returns:
            The executor. At the end of a ``with`` block it waits for its calls; after an error it ends them.

        Raises:
            TypeError, ValueError: If an argument makes no sense.

        Examples:
            >>> with group.executor() as executor:              # doctest: +SKIP
            ...     future = executor.submit(pow, 2, 10)
            ...     print(future.result())
            1024
        """
        self._check_open()
        from lazycluster.pool.executor import GroupExecutor

        executor = GroupExecutor(
            self.runtimes,
            max_workers,
            initializer,
            initargs,
            workers_per_host=workers_per_host,
            gpus_per_call=gpus_per_call,
            idle_gpus=idle_gpus,
            debug=debug,
        )
        self._executors.add(executor)
        executor.at_end.append(self._executors.discard)
        return executor

    def kept_executor(self, gpus_per_call: float | None = None, idle_gpus: bool = False) -> GroupExecutor:
        """Return the executor of `map`; for the layers above.

        It is a new one if the group has changed, or the last one cannot be used any more.
        """
        self._check_open()
        with self._lock:
            wanted = (self.runtimes, gpus_per_call, idle_gpus)
            if self._kept is None or self._kept[0] != wanted or not self._kept[1].usable:
                if self._kept is not None:
                    self._kept[1].retire()
                self._kept = wanted, self.executor(gpus_per_call=gpus_per_call, idle_gpus=idle_gpus)
            return self._kept[1]

    def _end_executors(self) -> None:
        """End all workers."""
        self._kept = None
        for executor in list(self._executors):
            executor.cleanup()
