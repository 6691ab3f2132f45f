"""`GroupExecutor`: the hosts of a group as one executor of `concurrent.futures`."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from lazycluster.core import event_loop, lifetime
from lazycluster.core.suggestions import suggestion
from lazycluster.exceptions import LazyclusterError, NoRuntimesError
from lazycluster.tasks.pickling import name_of

from .blob_store import BlobStore, SharedArrays
from .chunks import Chunk
from .futures import CallFuture, Futures
from .map import MapRun, check_arguments
from .remote_pool import PoolOptions
from .scheduler import ChunkScheduler
from .serialization import FunctionCache, Packed, pack, pack_calls

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime

__all__ = ["GroupExecutor", "gpus_of", "worker_counts"]

T = TypeVar("T")

_END_LIMIT = 30.0  # seconds for all workers to end


class GroupExecutor(concurrent.futures.Executor):
    """Runs calls on all hosts of a group, in worker processes that stay: a :class:`concurrent.futures.Executor`.

    :meth:`RuntimeGroup.executor` makes one. Each host takes as many calls as its workers can do; what a host that is
    lost had is run by the others. The function and its arguments travel as with :meth:`Runtime.call`: local modules go
    along; what is bound into the function (``partial(f, data)``), and each large NumPy array, goes to each host once.

    Args:
        runtimes: The hosts.
        max_workers: Worker processes in all; by default as many on each host as it has cores.
        initializer: Is called in each worker before anything else. Functions of the same script see the globals that it
            assigns.
        initargs: Its arguments.
        workers_per_host: Instead of `max_workers`: how many on each host, or on single ones by their names.
        gpus_per_call: How many GPUs of its host each worker has for itself: ``CUDA_VISIBLE_DEVICES`` is set, and there
            are as many workers as there are GPUs for. With 0.5 two workers share one. Hosts without are left
            out, with a word in the log.
        idle_gpus: Whether GPUs are left alone that others use, as nvidia-smi says.
        debug: Print what the calls print as it comes, each line with its host. Else it is logged with level debug.

    Raises:
        TypeError, ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        runtimes: Sequence[Runtime],
        max_workers: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        workers_per_host: int | Mapping[str, int] | None = None,
        gpus_per_call: float | None = None,
        idle_gpus: bool = False,
        debug: bool = False,
    ) -> None:
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        counts = worker_counts(runtimes, max_workers, workers_per_host)
        runtimes = [runtime for runtime in runtimes if counts[runtime.host] != 0]
        self.hosts = [runtime.host for runtime in runtimes]
        self._counts = [(runtime, counts[runtime.host]) for runtime in runtimes]
        self._blobs = BlobStore()
        self._functions = FunctionCache()
        first = None
        if initializer is not None:
            first = self._blobs.take(pack(functools.partial(initializer, *initargs)))
        gpus = gpus_of(gpus_per_call, idle_gpus)
        options = [PoolOptions(counts[host], first, debug, gpus) for host in self.hosts]
        contexts = [runtime._context() for runtime in runtimes]
        self._scheduler = ChunkScheduler(
            contexts, options, self._blobs, [runtime._context_when_back for runtime in runtimes]
        )
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._ending = threading.RLock()
        self._started = False
        self._shut_down = False
        self._ended = False
        self._runs: weakref.WeakSet[MapRun] = weakref.WeakSet()
        self._at_end: list[Callable[[GroupExecutor], Any]] = []
        self._futures = Futures(self._scheduler)
        lifetime.register(self)

    @property
    def usable(self) -> bool:
        """True if calls can be run."""
        return not self._shut_down and self._scheduler.error is None and os.getpid() == self._owner_pid

    @property
    def worker_count(self) -> int:
        """Number of calls that can run at once on the hosts that are there."""
        return sum(
            count or int(runtime.info["cpu_cores"])
            for runtime, count in self._counts
            if runtime._connection.state in ("open", "interrupted")
        )

    # --- calls ---------------------------------------------------------------------------------
    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Have a function called on one of the hosts.

        Args:
            fn: The function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The future of the call. What cannot be sent is its exception.

        Raises:
            RuntimeError: If the executor was shut down.
            LazyclusterError: If no host is left, or the workers cannot be started.
        """
        return self._submit_shared(None, fn, *args, **kwargs)

    def _submit_shared(
        self, sharing: SharedArrays | None, fn: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[T]:
        """Do what `submit` does, for a series whose arrays are shared, see :meth:`_share`."""
        if not callable(fn):
            raise TypeError(f"{fn!r} is not a function")
        future: CallFuture[T] = CallFuture(self._futures)
        sharing = sharing or SharedArrays(self._blobs)
        try:
            packed = self._functions.pack(fn)
            calls = pack_calls(fn, [args], kwargs or None, sharing.share)
        except TypeError as error:
            with self._lock:
                self._check()
            future.set_exception(error)
            return future
        with self._lock:
            self._begin(packed, calls.imports)
            blob = self._blobs.take(packed).number
            self._futures.add(future, name_of(fn), Chunk(calls, 0, 1, blob, sharing.taken(), self._futures))
        return future

    def _share(self) -> SharedArrays:
        """Begin a series of calls; arrays in their arguments must not be changed until it is over."""
        return SharedArrays(self._blobs, by_identity=True)

    def _unshare(self, sharing: SharedArrays) -> None:
        """End a series of calls."""
        self._scheduler.release(sharing.close())

    def _abort(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        """Cancel futures, and end those of their calls that run."""
        self._futures.abort(set(futures))

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
    ) -> Iterator[T]:
        """Call a function with each item, on all hosts.

        Args:
            fn: The function.
            *iterables: Their items are the arguments, as with :func:`map`.
            timeout: Seconds from now within which each result must come.
            chunksize: Calls that go to a worker together: many for calls that take less than a millisecond.
            buffersize: Items that are taken beyond the results that were handed on, at most. By default as many as
                keep the hosts busy; so iterables may be endless, and results large.
            ordered: Whether results come in the order of the items, or as they are there.

        Returns:
            An iterator over the results. Closing it ends what still runs.

        Raises:
            TypeError: If the function cannot be sent; when iterating, what an argument or result cannot be.
            TimeoutError: When iterating, if a result does not come in time.
            WorkerLostError: When iterating, if workers or hosts have died under a call each time that it was tried.
        """
        if not callable(fn):
            raise TypeError(f"{fn!r} is not a function")
        check_arguments(timeout, chunksize, buffersize)
        packed = self._functions.pack(fn)
        with self._lock:
            self._begin(packed)
            run = MapRun(
                self._scheduler,
                fn,
                packed,
                iterables,
                timeout=timeout,
                chunksize=chunksize,
                buffersize=buffersize,
                ordered=ordered,
            )
            self._runs.add(run)
        run.fill()
        return run.results()

    def _begin(self, packed: Packed, imports: tuple[str, ...] = ()) -> None:
        self._check()
        if not self._started:
            self._scheduler.start((*packed.imports, *imports), packed.fresh)  # twice, after Ctrl-C here, is no harm
            self._started = True

    def _check(self) -> None:
        if os.getpid() != self._owner_pid:
            raise LazyclusterError(
                f"this executor belongs to the process {self._owner_pid}; a forked child cannot use it. Make a new one"
            )
        if self._shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._scheduler.error is not None:
            raise self._scheduler.error

    # --- the end -------------------------------------------------------------------------------
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the workers when they are done. Doing it again does nothing.

        Args:
            wait: Return when all is over; else at once. In the callback of a future it is always at once, since what
                is to be waited for waits for the callback.
            cancel_futures: Cancel what was not begun. While the first workers start, a call for each counts as begun,
                as with the executors of the standard library.
        """
        with self._lock:
            self._shut_down = True
        if os.getpid() != self._owner_pid:
            return
        if cancel_futures:
            self._futures.cancel_waiting(sum(count or 1 for _, count in self._counts))
        if wait and not self._futures.in_callback:
            self._end()
        elif not self._ended:
            threading.Thread(target=self._end, name="lazycluster shutdown", daemon=True).start()

    def _end(self) -> None:
        try:
            self._futures.wait()
            for run in list(self._runs):
                run.wait()
        except BaseException:
            self.cleanup()
            raise
        self._finish(kill=False)

    def _retire(self) -> None:
        """Shut down.

        Waits for the end, so that others can have what it held, unless that is for calls that run.
        """
        busy = self._futures.busy or any(run.busy for run in list(self._runs))
        self.shutdown(wait=not busy)

    def cleanup(self) -> None:
        """End the workers at once, whatever they do; futures that are not done are cancelled. Again: nothing."""
        with self._lock:
            self._shut_down = True
        if os.getpid() == self._owner_pid:
            self._finish(kill=True)

    def _finish(self, kill: bool) -> None:
        with self._ending:
            if self._ended:
                return
            try:
                event_loop.run(self._scheduler.close(kill), _END_LIMIT)
                self._ended = True
            finally:  # also after Ctrl-C, which leaves the rest to the next who calls this
                self._futures.close()
                for run in list(self._runs):
                    run.abandon()
                for call in self._at_end:
                    call(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.shutdown(wait=True)
        else:
            self.cleanup()

    def __repr__(self) -> str:
        state = "shut down" if self._shut_down else "open"
        return f"<GroupExecutor on {', '.join(self.hosts)}: {state}>"


def worker_counts(
    runtimes: Sequence[Runtime], max_workers: int | None, per_host: int | Mapping[str, int] | None
) -> dict[str, int | None]:
    """Return the number of workers of each host; None: as many as it has cores.

    Args:
        runtimes: The hosts.
        max_workers: How many in all. They are spread by how many cores each host has.
        per_host: How many on each, or on single hosts by their names.

    Raises:
        TypeError, ValueError: If an argument makes no sense.
        NoRuntimesError: If there is no host.
    """
    if not runtimes:
        raise NoRuntimesError("the group is empty: add a runtime with add_runtime()")
    hosts = [runtime.host for runtime in runtimes]
    if max_workers is not None:
        if per_host is not None:
            raise ValueError("either max_workers or workers_per_host can be given, not both")
        count = _checked(max_workers, "max_workers")
        return _spread(_cores(runtimes, count), count)
    if isinstance(per_host, Mapping):
        unknown = [host for host in per_host if host not in hosts]
        if unknown:
            raise ValueError(f"workers_per_host: {unknown[0]!r} is not in the group{suggestion(unknown[0], hosts)}")
        return {host: _checked(per_host[host]) if host in per_host else None for host in hosts}
    return dict.fromkeys(hosts, None if per_host is None else _checked(per_host))


def gpus_of(per_call: float | None, idle: bool) -> dict[str, Any] | None:
    """Return the GPUs of each worker as the agent's request `pool` takes them.

    Args:
        per_call: How many each worker has; of parts of one, a whole number must make one.
        idle: Whether only those that nobody else uses.

    Raises:
        TypeError, ValueError: If it makes no sense.
    """
    if per_call is None:
        if idle:
            raise ValueError("idle_gpus needs gpus_per_call: say how many")
        return None
    if isinstance(per_call, bool) or not isinstance(per_call, (int, float)):
        raise TypeError(f"gpus_per_call must be a number, not {type(per_call).__name__}")
    if 0 < per_call < 1 and abs(1 / per_call - round(1 / per_call)) < 1e-6:
        return {"count": 1, "workers": round(1 / per_call), "idle": idle}
    if per_call < 1 or per_call != int(per_call):
        raise ValueError(f"gpus_per_call must be an integer, or 1/2, 1/3, ... of one, not {per_call:g}")
    return {"count": int(per_call), "workers": 1, "idle": idle}


def _spread(cores: Mapping[str, int], count: int) -> dict[str, int | None]:
    counts = dict.fromkeys(cores, 0)
    for _ in range(count):
        host = min(cores, key=lambda host: (counts[host] + 1) / cores[host])
        counts[host] += 1
    return {**counts}


def _cores(runtimes: Sequence[Runtime], count: int) -> dict[str, int]:
    """Return the cores of some hosts, asked at once; where there is one host only, they do not matter."""
    if len(runtimes) > 1:
        for runtime in runtimes:
            runtime.fill_info_buffer()
        return {runtime.host: int(runtime.info["cpu_cores"]) for runtime in runtimes}
    return {runtimes[0].host: count}


def _checked(count: int, name: str = "workers_per_host") -> int:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} must be an integer, not {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name} must be greater than 0, not {count}")
    return count
