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
from lazycluster.exceptions import LazyclusterError
from lazycluster.tasks.pickling import name_of

from .chunks import Chunk
from .function_cache import Packer
from .futures import CallFuture, Futures
from .host_pool import PoolPlan
from .map import MapRun, checked
from .scheduler import Scheduler
from .serialization import Packed, pack, pack_calls
from .shared_objects import SharedObjects, Sharing
from .worker_counts import gpus_of, worker_counts

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime

__all__ = ["GroupExecutor"]

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
        initializer: Is called in each worker before anything else.
        initargs: Its arguments.
        workers_per_host: Instead of `max_workers`: how many on each host, or on single ones by their names.
        gpus_per_call: How many GPUs of its host each worker has for itself: ``CUDA_VISIBLE_DEVICES`` is set, and there
            are as many workers as there are GPUs for. With 0.5 two workers share one. Hosts without are left out.
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
        self._blobs = SharedObjects()
        self._packer = Packer()
        first = None
        if initializer is not None:
            first = self._blobs.take(pack(functools.partial(initializer, *initargs)))
        gpus = gpus_of(gpus_per_call, idle_gpus)
        plans = [PoolPlan(counts[host], first, debug, gpus) for host in self.hosts]
        contexts = [runtime._context() for runtime in runtimes]
        self._dealer = Scheduler(contexts, plans, self._blobs, [runtime._context_when_back for runtime in runtimes])
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._ending = threading.RLock()
        self._started = False
        self._shut_down = False
        self._ended = False
        self._runs: weakref.WeakSet[MapRun] = weakref.WeakSet()
        self.at_end: list[Callable[[GroupExecutor], Any]] = []
        self._futures = Futures(self._dealer)
        lifetime.register(self)

    @property
    def usable(self) -> bool:
        """Whether calls can be run."""
        return not self._shut_down and self._dealer.error is None and os.getpid() == self._owner

    @property
    def worker_count(self) -> int:
        """How many calls can run at once on the hosts that are there."""
        return sum(
            count or int(runtime.info["cpu_cores"])
            for runtime, count in self._counts
            if runtime._connection.state in ("open", "interrupted")
        )

    # --- running -------------------------------------------------------------------------------
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
        return self.submit_shared(None, fn, *args, **kwargs)

    def submit_shared(
        self, sharing: Sharing | None, fn: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[T]:
        """Do what `submit` does, for a series whose arrays are shared, see :meth:`share`; for the layers above."""
        if not callable(fn):
            raise TypeError(f"{fn!r} is not a function")
        future: CallFuture[T] = CallFuture(self._futures)
        sharing = sharing or Sharing(self._blobs)
        try:
            packed = self._packer.pack(fn)
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

    def share(self) -> Sharing:
        """Begin a series of calls; for the layers above.

        Arrays in their arguments must not be changed until it is over.
        """
        return Sharing(self._blobs, by_identity=True)

    def unshare(self, sharing: Sharing) -> None:
        """End a series of calls; for the layers above."""
        self._dealer.release(sharing.close())

    def abort(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        """Cancel futures, and end those of their calls that run; for the layers above."""
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
        checked(timeout, chunksize, buffersize)
        packed = self._packer.pack(fn)
        with self._lock:
            self._begin(packed)
            run = MapRun(
                self._dealer,
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
            self._dealer.start((*packed.imports, *imports), packed.fresh)  # twice, after Ctrl-C here, is no harm
            self._started = True

    def _check(self) -> None:
        if os.getpid() != self._owner:
            raise LazyclusterError(
                f"this executor belongs to the process {self._owner}; a forked child cannot use it. Make a new one"
            )
        if self._shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._dealer.error is not None:
            raise self._dealer.error

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
        if os.getpid() != self._owner:
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

    def retire(self) -> None:
        """Shut down; for the layers above.

        Waits for the end, so that others can have what it held, unless that is for calls that run.
        """
        busy = self._futures.busy or any(run.busy for run in list(self._runs))
        self.shutdown(wait=not busy)

    def cleanup(self) -> None:
        """End the workers at once, whatever they do; futures that are not done are cancelled. Again: nothing."""
        with self._lock:
            self._shut_down = True
        if os.getpid() == self._owner:
            self._finish(kill=True)

    def _finish(self, kill: bool) -> None:
        with self._ending:
            if self._ended:
                return
            try:
                event_loop.run(self._dealer.close(kill), _END_LIMIT)
                self._ended = True
            finally:  # also after Ctrl-C, which leaves the rest to the next who calls this
                self._futures.close()
                for run in list(self._runs):
                    run.abandon()
                for call in self.at_end:
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
