"""The one event-loop thread: asynchronous inside, synchronous outside.

Everything that the library waits for is waited for here, whatever the caller's thread or own event loop does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

from lazycluster.exceptions import harmless

from . import interruptible, memory_pressure
from .limits import start_thread

T = TypeVar("T")
U = TypeVar("U")

_logger = logging.getLogger("lazycluster")
_logger.addFilter(harmless)  # whatever comes from a host comes through this loop

_CLEANUP_LIMIT = 30.0  # seconds for a cancelled coroutine to undo what it began

# By process: a forked child has the variables, but not the thread. There is no lock, as none may be waited for here:
# garbage may be collected at any moment, and what is collected may close connections, and so ask for the loop.
_running: dict[int, tuple[asyncio.AbstractEventLoop, threading.Thread]] = {}


def get_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop, starting its thread at the first call in a process."""
    found = _running.get(os.getpid())
    if found is None:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_main, args=[loop], name="lazycluster", daemon=True)
        try:
            start_thread(thread)
        except BaseException:  # there are too many, or Ctrl-C
            loop.call_soon_threadsafe(loop.stop)
            raise
        found = _running.setdefault(os.getpid(), (loop, thread))
        if found[0] is not loop:  # somebody else was faster
            loop.call_soon_threadsafe(loop.stop)
    return found[0]


def _main(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(memory_pressure.guard)
    while True:
        try:
            loop.run_forever()
            break
        except MemoryError:
            memory_pressure.relieve()  # in the loop's own code: what was to be done is done in the next round
        except (SystemExit, KeyboardInterrupt):
            # They end an event loop, and with this one everybody who waits would wait for ever. Ctrl-C comes to the
            # main thread only, so it was code of somebody's own that has raised this, e.g. in a callback.
            _logger.exception("a callback raised SystemExit or KeyboardInterrupt; the event loop goes on")
    loop.close()


def in_loop() -> bool:
    """Return whether the calling thread is the loop's own, which must never wait for itself."""
    found = _running.get(os.getpid())
    return found is not None and threading.get_ident() == found[1].ident


def submit(coroutine: Coroutine[Any, Any, T]) -> LoopFuture[T]:
    """Start a coroutine on the loop.

    Unlike that of `asyncio.run_coroutine_threadsafe`, the future is done only when the coroutine is, also when it was
    cancelled: so one can wait for what it does in its `finally`.
    """
    future = LoopFuture(coroutine)
    try:
        future.begin()
    except BaseException:  # Ctrl-C: nobody will know the future
        future.cancel()
        raise
    return future


class LoopFuture(interruptible.Future[T]):
    """A coroutine on the loop. Whoever makes one knows it before it begins, so that Ctrl-C leaves none to itself.

    Args:
        coroutine: What is to be done.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        super().__init__()
        self._task: asyncio.Task[T] | None = None
        self._loop = get_loop()

    def __del__(self) -> None:
        """Let a coroutine that Ctrl-C did not let begin end without a warning; others have ended by now."""
        self._coroutine.close()

    def begin(self) -> None:
        """Have it begin."""
        self._loop.call_soon_threadsafe(self._start)

    def cancel(self) -> bool:
        """Have it end; it is done when it has cleaned up."""
        if self.done():
            return False
        self._loop.call_soon_threadsafe(self._end)
        return True

    # --- on the loop ---------------------------------------------------------------------------
    def _start(self) -> None:
        self._task = self._loop.create_task(self._coroutine)
        self._task.add_done_callback(self._settle)

    def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif not self.done():  # it was never begun: what is asked of the loop it does in order
            self._coroutine.close()
            self._is_cancelled()

    def _is_cancelled(self) -> None:
        super().cancel()
        self.set_running_or_notify_cancel()

    def _settle(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self._is_cancelled()
            return
        error = task.exception()
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())


class Waiter(Protocol):
    """Something that waits for futures in the thread that has called `run`, and may show what takes long."""

    def result(self, future: interruptible.Future[T], timeout: float | None = None) -> T:
        """Wait for a future, and return its result as `concurrent.futures.Future.result` does."""


class _SilentWaiter:
    def result(self, future: interruptible.Future[T], timeout: float | None = None) -> T:
        return future.result(timeout)


@contextlib.contextmanager
def _silently() -> Iterator[Waiter]:
    yield _SilentWaiter()


_waiting: Callable[[], contextlib.AbstractContextManager[Waiter]] = _silently


def wait_with(waiting: Callable[[], contextlib.AbstractContextManager[Waiter]]) -> None:
    """Have `run` wait with something that shows progress; it surrounds the start of the coroutine, too."""
    global _waiting
    _waiting = waiting


def run(coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Run a coroutine on the loop and wait for it, from any other thread; see `wait_with`.

    Args:
        coroutine: What to run.
        timeout: Seconds after which it is cancelled. It is waited for in any case, so that it can clean up.

    Returns:
        What it returns.

    Raises:
        TimeoutError: If it took longer than `timeout`.
        RuntimeError: If called from the loop's own thread.
    """
    work = LoopFuture(coroutine)
    if in_loop():
        raise RuntimeError(
            "called from the event-loop thread of lazycluster (e.g. in a callback): it would wait for itself"
        )
    with _waiting() as waiter:
        return _result(work, timeout, waiter)


def _result(future: LoopFuture[T], timeout: float | None, waiter: Waiter) -> T:
    try:
        future.begin()
        return waiter.result(future, timeout)
    except concurrent.futures.TimeoutError:
        if future.done():
            raise  # the coroutine's own
        future.cancel()
        future.wait(_CLEANUP_LIMIT)
        raise TimeoutError(f"not done within {timeout:g} s") from None
    except BaseException:
        # Ctrl-C: let the coroutine undo what it began; a second Ctrl-C ends this wait, too.
        if not future.done():
            future.cancel()
            future.wait(_CLEANUP_LIMIT)
        raise


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call something that blocks in a thread of its own, which ends with it.

    `asyncio.to_thread` keeps its threads for the rest of the process.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast("T", result))

    def work() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function(*args)
        except StopIteration as caught:  # no coroutine can raise it, and no future of asyncio takes it
            error = RuntimeError(f"{function.__name__} raised StopIteration")
            error.__cause__ = caught
        except BaseException as caught:  # noqa: BLE001  (it is raised where it is waited for)
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has gone with the process
            loop.call_soon_threadsafe(settle, result, error)

    start_thread(threading.Thread(target=work, name=f"lazycluster {function.__name__}", daemon=True))
    return await done


async def together(tasks: Sequence[asyncio.Task[T]]) -> list[T]:
    """Wait for tasks of one purpose. When one fails, or whoever waits is cancelled, the others are cancelled, too.

    Unlike with `asyncio.gather` all have ended then, with what they do in their `finally`, and none was cancelled
    twice: the second time would put an end to what it does about the first.

    Returns:
        Their results, in their order.
    """
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        left = [task for task in tasks if not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
    errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    if errors:
        raise errors[0]
    return [task.result() for task in tasks]


def outcome(task: asyncio.Task[T], otherwise: U) -> T | U:
    """Return the result of a task, or something else if it has none."""
    return otherwise if not task.done() or task.cancelled() or task.exception() is not None else task.result()
