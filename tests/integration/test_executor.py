"""`RuntimeGroup.executor`: CPython's own tests of executors, and what theirs do not have."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.core import interruptible
from lazycluster.exceptions import (
    BrokenPoolError,
    LazyclusterError,
    TaskExecutionError,
    WorkerLostError,
)
from patience import until
from sshhosts import procfs

cpython = pytest.importorskip("test.test_concurrent_futures", reason="Python's own tests are not installed")
from test.test_concurrent_futures import executor as executor_tests  # noqa: E402
from test.test_concurrent_futures import test_as_completed, test_init, test_shutdown, test_wait, util  # noqa: E402

pytestmark = pytest.mark.keeps("manager")  # zygotes, for the group's life: `module_group` looks at its end


@pytest.fixture(scope="module", autouse=True)
def module_group() -> Iterator[RuntimeGroup]:
    before = set(children())
    with RuntimeGroup([LocalRuntime(host="one"), LocalRuntime(host="two")]) as group:
        yield group
    assert set(children()) <= before


def children() -> list[int]:
    return [process.pid for process in procfs.descendants(os.getpid())]


class OnGroup(util.ExecutorMixin):
    """What CPython's tests want to know of the executor that they test."""

    group: RuntimeGroup

    @pytest.fixture(autouse=True)
    def _with_group(self, module_group: RuntimeGroup) -> None:
        self.group = module_group

    def executor_type(self, **options: Any) -> concurrent.futures.Executor:
        return self.group.executor(**options)


class TestExecutor(OnGroup, executor_tests.ExecutorTest, util.BaseTestCase):
    test_map_timeout = None  # takes 5 s; test_map.py has another

    @pytest.mark.soak
    def test_free_reference(self) -> None:
        super().test_free_reference()


class TestWait(OnGroup, test_wait.WaitTests, util.BaseTestCase):
    pass


class TestAsCompleted(OnGroup, test_as_completed.AsCompletedTests, util.BaseTestCase):
    test_free_reference_yielded_future = None  # is about futures alone


class TestShutdown(OnGroup, util.BaseTestCase):
    # The others start interpreters in which the executor has another name.
    test_run_after_shutdown = test_shutdown.ExecutorShutdownTest.test_run_after_shutdown
    test_hang_issue12364 = test_shutdown.ExecutorShutdownTest.test_hang_issue12364
    test_hang_gh94440 = test_shutdown.ExecutorShutdownTest.test_hang_gh94440


class TestInitializer(OnGroup, test_init.InitializerMixin, unittest.TestCase):
    pass


# --- beyond CPython's ------------------------------------------------------------------------------------
@pytest.fixture
def group(module_group: RuntimeGroup) -> RuntimeGroup:
    return module_group


def test_an_initializer_that_fails_breaks_the_executor(group: RuntimeGroup) -> None:
    def fails(text: str) -> None:
        raise LookupError(text)

    with group.executor(initializer=fails, initargs=("not there",)) as executor:
        futures = [executor.submit(abs, x) for x in range(5)]
        for future in futures:
            with pytest.raises(BrokenPoolError, match="initializer has failed: LookupError: not there") as caught:
                future.result()
        assert isinstance(caught.value, concurrent.futures.BrokenExecutor)
        assert isinstance(caught.value.__cause__, LookupError)
        with pytest.raises(BrokenPoolError):
            executor.submit(abs, 1)


def test_functions_of_the_same_script_see_what_the_initializer_assigns(group: RuntimeGroup) -> None:
    script = types.ModuleType("__main__")
    exec(_SCRIPT, script.__dict__)
    own: Any = script
    with group.executor(workers_per_host=1, initializer=own.prepare, initargs=(10,)) as executor:
        assert list(executor.map(own.scaled, range(20))) == [10 * x for x in range(20)]
        assert executor.submit(own.apply, own.scaled, 3).result() == 30
        own.offset = 5  # what the script assigns is the script's
        assert executor.submit(own.scaled, 1).result() == 15
        assert executor.submit(own.change).result() == 7
        assert executor.submit(own.scaled, 1).result() == 15


_SCRIPT = """
factor = None
offset = 0

def prepare(value):
    global factor, made
    factor, made = value, "made"

def helper():
    return factor if made == "made" else None

def scaled(x):
    return helper() * x + offset

def apply(function, x):
    return function(x)

def change():
    global offset
    offset = 7
    return offset
"""


def test_in_a_callback_a_shutdown_does_not_wait_for_the_callback(group: RuntimeGroup) -> None:
    over = interruptible.Event()
    executor = group.executor()

    def end(future: concurrent.futures.Future[int]) -> None:
        executor.shutdown()
        over.set()

    executor.submit(abs, -3).add_done_callback(end)
    assert over.wait(60)
    executor.shutdown()  # waits


def test_ctrl_c_while_something_is_submitted(group: RuntimeGroup) -> None:
    def interrupt(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "call_soon_threadsafe":
            sys.settrace(None)
            raise KeyboardInterrupt

    with group.executor() as executor:
        assert executor.submit(abs, -1).result(60) == 1
        until(lambda: not executor._scheduler._wake_scheduled, "the scheduler to have seen all")
        before = sys.gettrace()
        with pytest.raises(KeyboardInterrupt):
            sys.settrace(interrupt)
            executor.submit(abs, -2)
        sys.settrace(before)
        assert executor.submit(abs, -3).result(60) == 3


def test_workers_that_die_before_they_begin_are_not_started_for_ever(group: RuntimeGroup) -> None:
    with (
        group.executor(initializer=os._exit, initargs=(3,)) as executor,
        pytest.raises(LazyclusterError, match="the workers have ended with exit status 3 in their initializer"),
    ):
        executor.submit(abs, 1).result()


def test_a_dead_worker_is_a_broken_executor_for_its_call_only(group: RuntimeGroup) -> None:
    with group.executor() as executor:
        bad = executor.submit(os._exit, 7)
        good = [executor.submit(pow, x, 2) for x in range(20)]
        with pytest.raises(WorkerLostError, match=r"exit status 7 while it ran _exit\(7\)") as caught:
            bad.result()
        assert isinstance(caught.value, concurrent.futures.BrokenExecutor)
        assert [future.result() for future in good] == [x * x for x in range(20)]


def test_a_cancelled_worker_that_had_gone_on_to_the_next_call_loses_nothing(
    group: RuntimeGroup, tmp_path: Path
) -> None:
    def take_the_next_and_die_before_it_is_noted(taken: str) -> None:
        import gc

        worker = next(found for found in gc.get_objects() if type(found).__name__ == "PoolWorker")

        def die(*_: object) -> None:
            worker._board[worker._offset : worker._offset + 16] = bytes(16)
            os._exit(0)

        signal.signal(signal.SIGTERM, die)
        worker._queue.recv(1 << 16)
        Path(taken).touch()
        time.sleep(600)

    with group.executor(max_workers=1) as executor:
        first = executor.submit(take_the_next_and_die_before_it_is_noted, str(tmp_path / "taken"))
        second = executor.submit(abs, -2)
        until((tmp_path / "taken").exists, "the second call to be taken")
        executor._abort([first])
        assert second.result(60) == 2


def test_a_call_is_cancelled_though_its_worker_has_not_noted_yet_that_it_has_it(
    group: RuntimeGroup, tmp_path: Path
) -> None:
    def take_the_next_and_note_it_late(folder: str) -> str:
        import gc

        if Path(folder, "cancelled").exists():
            return "once more"  # as the worker was ended for the other's sake
        worker = next(found for found in gc.get_objects() if type(found).__name__ == "PoolWorker")
        number = worker._queue.recv(1 << 16)[5:13]  # as in `RECORD`
        Path(folder, "taken").touch()
        while not Path(folder, "cancelled").exists():
            time.sleep(0.001)
        worker._board[worker._offset : worker._offset + 8] = number
        time.sleep(600)
        return ""

    with group.executor(max_workers=1) as executor:
        first = executor.submit(take_the_next_and_note_it_late, str(tmp_path))
        second = executor.submit(time.sleep, 600)
        until((tmp_path / "taken").exists, "the second call to be taken")
        executor._abort([second])
        group.get_runtime(executor.hosts[0]).call(abs, -1)  # what comes later than the cancellation
        (tmp_path / "cancelled").touch()
        assert first.result(60) == "once more"


def test_workers_go_on_when_what_they_were_forked_from_is_killed(group: RuntimeGroup, tmp_path: Path) -> None:
    """As by a host that has no memory left. Workers that are needed later are forked from another."""

    def kill_parent() -> int:
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.001)
        (tmp_path / "killed").touch()
        while not (tmp_path / "noticed").exists():
            time.sleep(0.001)
        return os.getpid()

    with group.executor(max_workers=1) as executor:
        runtime = group.get_runtime(executor.hosts[0])
        call = executor.submit(kill_parent)
        until((tmp_path / "killed").exists, "its end")
        assert runtime.call(abs, -1) == 1  # what comes later than that end, so it was noticed
        (tmp_path / "noticed").touch()
        worker = call.result(60)
        assert executor.submit(os.getpid).result(60) == worker
        os.kill(worker, signal.SIGKILL)
        assert executor.submit(os.getpid).result(60) != worker
        assert sorted(executor.map(abs, range(-100, 0))) == list(range(1, 101))


class Ending:
    """Ends whoever reads it."""

    def __init__(self, how: type[BaseException]) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return _raise, (self.how,)


def _raise(how: type[BaseException]) -> None:
    raise how


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt])
def test_a_result_that_ends_whoever_reads_it_is_an_error_of_its_call_only(
    group: RuntimeGroup, how: type[BaseException]
) -> None:
    with group.executor() as executor:
        bad = executor.submit(Ending, how)
        with pytest.raises(TaskExecutionError, match="came, but cannot be unpickled here"):
            bad.result(60)
        assert executor.submit(abs, -3).result(60) == 3
        if how is SystemExit:
            with pytest.raises(TaskExecutionError, match="came, but cannot be unpickled here"):
                list(executor.map(Ending, [how]))


def test_callbacks_may_use_the_library(group: RuntimeGroup) -> None:
    answers: list[Any] = []
    done = threading.Event()
    with group.executor() as executor:

        def callback(future: concurrent.futures.Future[int]) -> None:
            answers.append(future.result())
            answers.append(group.runtimes[0].call(abs, -3))
            done.set()

        executor.submit(abs, -2).add_done_callback(callback)
        assert done.wait(20)
    assert answers == [2, 3]


def test_an_error_in_the_block_ends_what_runs(group: RuntimeGroup, tmp_path: Path) -> None:
    def runs_long() -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(600)

    with pytest.raises(KeyError), group.executor() as executor:
        futures = [executor.submit(runs_long) for _ in range(2)]
        while len(os.listdir(tmp_path)) < 2:
            time.sleep(0.01)
        raise KeyError
    assert not any(procfs.process(int(pid)) for pid in os.listdir(tmp_path))
    for future in futures:
        with pytest.raises(concurrent.futures.CancelledError):
            future.result()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)


def test_shutdown_may_cancel_what_was_not_begun(group: RuntimeGroup) -> None:
    with group.executor(max_workers=2) as executor:
        first = executor.submit(time.sleep, 0.2)
        while not first.running():
            time.sleep(0.001)
        rest = [executor.submit(time.sleep, 0.1) for _ in range(50)]
        executor.shutdown(cancel_futures=True)
        assert first.result() is None
        assert sum(future.cancelled() for future in rest) > 20
        assert all(future.done() for future in rest)


@pytest.mark.parametrize("wait", [True, False])
def test_shutdown_before_workers_are_there_keeps_a_call_for_each(group: RuntimeGroup, wait: bool) -> None:
    executor = group.executor(max_workers=2)
    futures = [executor.submit(abs, -number) for number in range(20)]
    executor.shutdown(wait=wait, cancel_futures=True)
    concurrent.futures.wait(futures)
    begun = [future for future in futures if not future.cancelled()]
    assert begun == futures[: len(begun)]
    assert 2 <= len(begun) < 20
    assert [future.result() for future in begun] == list(range(len(begun)))
    executor.shutdown()


def test_shutdown_without_waiting_lets_calls_finish(group: RuntimeGroup) -> None:
    executor = group.executor()
    future = executor.submit(lambda: time.sleep(0.3) or 5)
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError):
        executor.submit(abs, 1)
    assert future.result() == 5
    executor.shutdown()


def test_workers_are_as_many_as_was_said(group: RuntimeGroup) -> None:
    def where(_: int) -> int:
        time.sleep(0.05)
        return os.getpid()

    with group.executor(max_workers=3) as executor:
        assert len(set(executor.map(where, range(20)))) == 3
    with group.executor(workers_per_host={"one": 1, "two": 2}) as executor:
        assert len(set(executor.map(where, range(20)))) == 3
    with pytest.raises(ValueError, match="'three' is not in the group"):
        group.executor(workers_per_host={"three": 1})
    with pytest.raises(ValueError, match="not both"):
        group.executor(3, workers_per_host=1)
    with pytest.raises(TypeError, match="integer"):
        group.executor(max_workers="3")  # type: ignore[arg-type]


def test_functions_are_sent_as_they_are_at_the_moment(group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    with group.executor() as executor:
        found = []
        for value in (1, 1.0, True, "one"):
            monkeypatch.setitem(globals(), "_setting", value)
            found.append(executor.submit(_tell_setting).result())
        assert found == [(1, "int"), (1.0, "float"), (True, "bool"), ("one", "str")]


_setting: Any = 0


def _tell_setting() -> tuple[Any, str]:
    return _setting, type(_setting).__name__


def test_a_forked_child_is_told_that_it_cannot_use_it(group: RuntimeGroup) -> None:
    with group.executor() as executor:
        executor.submit(abs, 1).result()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                executor.submit(abs, 1)
            except LazyclusterError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        assert b"a forked child cannot use it" in os.read(read, 4096)
        os.close(read)
        assert executor.submit(abs, -1).result() == 1


@pytest.mark.parametrize("work", ["list(group.map(wait, range(4)))", "group.executor().submit(wait, 1).result()"])
def test_ctrl_c_ends_what_runs(tmp_path: Path, work: str) -> None:
    program = f"""
    import os, sys, time
    from pathlib import Path
    from lazycluster import LocalRuntime, RuntimeGroup

    def wait(x):
        Path({str(tmp_path)!r}, str(os.getpid())).touch()
        time.sleep(600)

    with RuntimeGroup([LocalRuntime()]) as group:
        {work}
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not os.listdir(tmp_path):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert not any(procfs.process(int(pid)) for pid in os.listdir(tmp_path))


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (lambda: sys.exit(3), r"initializer has failed: it has called sys\.exit\(3\)"),
        (lambda: os._exit(3), "the workers have ended with exit status 3 in their initializer"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the workers have been ended by SIGKILL.* in their initializer"),
        (lambda: {}["key"], "initializer has failed: KeyError: 'key'"),
        (lambda: int(""), "initializer has failed: ValueError: invalid literal"),
    ],
)
def test_an_initializer_that_ends_its_process_breaks_the_executor(group: RuntimeGroup, end: Any, text: str) -> None:
    with group.executor(max_workers=1, initializer=end) as executor:
        error = executor.submit(abs, -1).exception(timeout=60)
        assert isinstance(error, concurrent.futures.BrokenExecutor)
        with pytest.raises(concurrent.futures.BrokenExecutor, match=text):
            raise error
        with pytest.raises(concurrent.futures.BrokenExecutor):
            executor.submit(abs, -1)
