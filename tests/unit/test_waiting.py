"""Ctrl-C at whatever moment of a wait leaves no lock taken on which the thread that ends the wait would stand still."""

from __future__ import annotations

import _imp
import concurrent.futures
import gc
import importlib
import inspect
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import interruptible_internals
import pytest

from lazycluster.core import event_loop, interruptible
from lazycluster.core.interruptible import Condition, Event, Future
from sshhosts import HostsUnavailableError, find_python


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _alarm() -> Iterator[None]:
    """Have a signal raise `KeyboardInterrupt`, as Ctrl-C does.

    No garbage is collected meanwhile: what is raised in a callback of the collector (hypothesis has one) is lost, with
    a warning.
    """
    before = signal.signal(signal.SIGALRM, _interrupt)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupted(wait: Callable[[], object], most: float) -> None:
    """Do something again and again until it is interrupted, within some seconds."""
    try:
        # And once more a second later: one that comes while an object is deleted is lost.
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, most), 1.0)
        while True:
            wait()
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _condition_of(waited: Any) -> Any:
    return waited if isinstance(waited, Condition) else waited._condition


@pytest.mark.parametrize("kind", [Future, Event])
def test_an_interrupted_wait_gives_its_lock_back(kind: Callable[[], Any]) -> None:
    waited = kind()
    end = time.monotonic() + 1
    count = 0
    with _alarm():
        while time.monotonic() < end:
            _interrupted(lambda: waited.wait(0.00002), 0.0004)
            assert not _condition_of(waited)._is_owned()
            count += 1
    assert count > 100


def test_an_interrupted_question_gives_the_lock_back() -> None:
    end = time.monotonic() + 1
    with _alarm():
        while time.monotonic() < end:
            future: Future[int] = Future()
            _interrupted(lambda: (future.done(), future.add_done_callback(len)), 0.0002)  # noqa: B023
            assert not _condition_of(future)._is_owned()


def test_others_can_import_though_an_import_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_elsewhere.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    done: Future[Any] = Future()
    thread = threading.Thread(
        target=lambda: done.set_result(importlib.import_module("imported_elsewhere")), daemon=True
    )
    _imp.acquire_lock()  # what Ctrl-C leaves behind in the import system
    _imp.acquire_lock()
    thread.start()
    assert done.result(20).__name__ == "imported_elsewhere"
    assert not _imp.lock_held()
    thread.join()


def test_a_wait_ends_with_what_is_waited_for() -> None:
    future: Future[int] = Future()
    event = Event()
    assert not future.wait(0)
    assert not event.wait(0.001)
    threads = [threading.Timer(0.01, future.set_result, [5]), threading.Timer(0.01, event.set)]
    for thread in threads:
        thread.start()
    assert future.wait()
    assert event.wait(20)
    assert future.result(0) == 5
    assert event.is_set()
    for thread in threads:
        thread.join()


def test_result_waits_and_times_out() -> None:
    future: Future[int] = Future()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.001)
    thread = threading.Timer(0.01, future.set_exception, [ValueError("x")])
    thread.start()
    with pytest.raises(ValueError, match="x"):
        future.result()
    thread.join()


def test_all_who_wait_are_woken() -> None:
    condition = Condition()
    woken: list[int] = []
    ready = [Event() for _ in range(5)]

    def wait(number: int) -> None:
        with condition, condition:  # the lock may be taken more than once
            ready[number].set()
            condition.wait(20)
            woken.append(number)

    threads = [threading.Thread(target=wait, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for event in ready:
        event.wait(20)
    with condition:
        condition.notify_all()
    for thread in threads:
        thread.join(20)
    assert sorted(woken) == [0, 1, 2, 3, 4]


def test_a_coroutine_that_is_never_begun_ends_without_a_warning() -> None:
    """As when Ctrl-C comes just before."""

    async def work() -> None:
        raise AssertionError("it was begun")

    coroutine = work()
    event_loop.LoopFuture(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


# --- CPython's internals --------------------------------------------------------------------------
ADVICE = (
    "core/interruptible.py relies on internals of CPython that have changed.\n"
    "  Next step: read its docstring and this Python's threading.py and concurrent/futures/_base.py, and adapt it; "
    "until then Ctrl-C can make the library stand still, so `requires-python` must leave this version out"
)


def test_cpython_is_as_it_has_to_be() -> None:
    assert interruptible_internals.problems(str(interruptible.__file__)) == [], ADVICE


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_other_pythons_are_as_they_have_to_be(version: str) -> None:
    try:
        python = find_python(version)
    except HostsUnavailableError as reason:
        pytest.skip(str(reason))
    argv = [python, "-I", str(interruptible_internals.__file__), str(interruptible.__file__)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.stderr}{ADVICE}"


def test_what_changes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lock:
        """A lock in Python, without most of what is needed."""

        def acquire(self) -> bool:
            return True

    monkeypatch.setattr("_thread.RLock", Lock)
    monkeypatch.delattr("_imp.lock_held")
    found = interruptible_internals.problems("not read")
    assert any(text.startswith("_imp has no lock_held") for text in found)
    assert "_thread.RLock.acquire is written in Python: Ctrl-C can come between its lines" in found
    assert "_thread.RLock has no _release_save" in found
