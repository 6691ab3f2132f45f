"""joblib's backend: ``with joblib.parallel_config("lazycluster", group=group)``."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, SequentialBackend

from lazycluster.agent.pool_worker import joblib_batch

from .blob_store import SharedArrays
from .serialization import pack

if TYPE_CHECKING:
    from .executor import GroupExecutor

__all__ = ["LazyclusterBackend"]

# What `Parallel` says to every backend, and means memory that processes of one machine share, or another backend.
_OF_PARALLEL = frozenset(
    {"max_nbytes", "temp_folder", "mmap_mode", "prefer", "require", "verbose", "context", "timeout", "prefetch"}
)


class LazyclusterBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs what joblib calls on the hosts of a group.

    Large arrays go to each host once for all calls of one ``Parallel``. What these calls want to be parallel in turn
    stays in their process.

    Args:
        group: The :class:`~lazycluster.RuntimeGroup`.
        nesting_level: From joblib.
        inner_max_num_threads: Is not supported: each worker has as many threads as its share of the host's cores.

    Raises:
        TypeError: If there is no group.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = False
    supports_sharedmem = False
    uses_threads = False
    default_n_jobs = -1
    # A batch costs far less than with joblib's other backends, so batches may be short.
    MIN_IDEAL_BATCH_DURATION = 0.05
    MAX_IDEAL_BATCH_DURATION = 0.5

    def __init__(
        self,
        group: Any = None,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(group, "executor") or not hasattr(group, "runtimes"):
            raise TypeError(
                "the backend needs a group of hosts: joblib.parallel_config('lazycluster', group=RuntimeGroup(...))"
            )
        if options:
            raise TypeError(f"the backend has no option {next(iter(options))!r}; it has: group")
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._group = group
        self._executor: GroupExecutor | None = None
        self._own: dict[int, GroupExecutor] = {}
        self._initialized: tuple[tuple[int, bytes], GroupExecutor] | None = None
        self._sharing: SharedArrays | None = None
        self._lock = threading.Lock()
        self._futures: set[concurrent.futures.Future[Any]] = set()

    # --- how many ------------------------------------------------------------------------------
    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of calls that can run at once.

        Args:
            n_jobs: What the caller asks for; negative numbers count from all workers of the group.

        Raises:
            ValueError: If it is 0.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        total: int = self._group._kept_executor().worker_count
        if n_jobs is None:
            return total
        return min(n_jobs, total) if n_jobs > 0 else max(total + 1 + n_jobs, 1)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        **options: Any,
    ) -> int:
        """Get ready for a ``Parallel``; returns how many calls it can have at once.

        Args:
            n_jobs: See `effective_n_jobs`.
            parallel: The ``Parallel``.
            initializer: Is called in each worker before anything else; there are workers of its own then.
            initargs: Its arguments.
            **options: What ``Parallel`` says to each backend, such as where arrays are kept in memory.

        Raises:
            TypeError: If there is no such option.
        """
        unknown = options.keys() - _OF_PARALLEL
        if unknown:
            raise TypeError(f"the backend has no option {min(unknown)!r}; it has: initializer, initargs")
        self.parallel = parallel
        count = self.effective_n_jobs(n_jobs)
        if initializer is not None:
            self._executor = self._initialized_executor(count, initializer, tuple(initargs))
            return count
        kept: GroupExecutor = self._group._kept_executor()
        if count == kept.worker_count:
            self._executor = kept
        else:
            own = self._own.get(count)
            if own is None or not own.usable:
                own = self._own[count] = self._group.executor(max_workers=count)
            self._executor = own
        return count

    def _initialized_executor(
        self, count: int, initializer: Callable[..., Any], initargs: tuple[Any, ...]
    ) -> GroupExecutor:
        """Return workers that an initializer has prepared: those of the last time, if it is the same."""
        wanted = count, pack(functools.partial(initializer, *initargs)).digest
        last = self._initialized
        if last is None or last[0] != wanted or not last[1].usable:
            if last is not None:
                last[1]._retire()
            self._initialized = last = (
                wanted,
                self._group.executor(max_workers=count, initializer=initializer, initargs=initargs),
            )
        return last[1]

    def get_nested_backend(self) -> tuple[Any, int | None]:
        """Return the backend of ``Parallel`` in the calls: their own process, and nothing more."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None

    # --- running -------------------------------------------------------------------------------
    def start_call(self) -> None:
        """Begin a ``Parallel``."""
        if self._executor is not None:
            self._sharing = self._executor._share()

    def stop_call(self) -> None:
        """End a ``Parallel``."""
        sharing, self._sharing = self._sharing, None
        if sharing is not None and self._executor is not None:
            self._executor._unshare(sharing)

    def terminate(self) -> None:
        """Forget how long the calls of a ``Parallel`` took: those of the next one may take another time."""
        self.reset_batch_stats()

    def submit(self, func: Any, callback: Callable[[Any], Any] | None = None) -> concurrent.futures.Future[Any]:
        """Have a batch of calls run.

        Args:
            func: The batch.
            callback: Is called with the future when it is done.
        """
        assert self._executor is not None
        calls = [(function, args, kwargs) for function, args, kwargs in func.items]
        future = self._executor._submit_shared(self._sharing, joblib_batch, calls, False)
        with self._lock:
            self._futures.add(future)
        future.add_done_callback(self._forget)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def apply_async(self, func: Any, callback: Callable[[Any], Any] | None = None) -> Any:
        """Do what `submit` does, for older versions of joblib."""
        return self.submit(func, callback)

    def _forget(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._futures.discard(future)

    def retrieve_result_callback(self, out: concurrent.futures.Future[Any]) -> Any:
        """Return the results of a batch that is done."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End what runs, since its results are wanted no more."""
        with self._lock:
            futures, self._futures = self._futures, set()
        if self._executor is not None:
            self._executor._abort(futures)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("joblib's backend for a group of hosts cannot be sent elsewhere")
