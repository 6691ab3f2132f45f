"""Calls spread over hosts with `RuntimeGroup.map`, on this machine and on real hosts."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import platform
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.exceptions import AgentError, LazyclusterError, RemoteTraceback, TaskExecutionError, WorkerLostError
from patience import until
from sshhosts import procfs


@pytest.fixture
def group() -> Iterator[RuntimeGroup]:
    """Two runtimes on this machine."""
    with RuntimeGroup([LocalRuntime(host="one"), LocalRuntime(host="two")]) as group:
        yield group


@pytest.fixture
def host_group(hosts: Any) -> Iterator[RuntimeGroup]:
    kwargs = {"config_file": hosts.config_file}
    with RuntimeGroup(hosts=hosts.names, connection_kwargs=kwargs, python="auto") as group:
        yield group


def square(x: int) -> int:
    return x * x


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


_EDITED = "OFFSET = {}\nTABLE = [OFFSET]\nSCALE = None\n\n\ndef scale(value):\n    global SCALE\n    SCALE = value\n"
_PLAINLY = "import edited\n\n\ndef shown(x):\n    return x, edited.OFFSET, edited.TABLE[0], edited.SCALE, {}\n"
_GUARDED = "import threading\nfrom own.edited import TABLE\n\nLOCK = threading.Lock()\n\n\n"
_GUARDED += "def shown(x):\n    with LOCK:\n        from own import lazily\n        return TABLE[0], lazily.VALUE, {}\n"


def test_workers_see_local_modules_as_they_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers stay, modules change; what the initializer has assigned holds on."""
    monkeypatch.syspath_prepend(tmp_path)
    paths = tmp_path / "edited.py", tmp_path / "plainly.py"
    modules: list[Any] = []
    try:
        with RuntimeGroup([LocalRuntime(host="one")]) as group:
            for number in (1, 22, 333):
                for path, text in zip(paths, (_EDITED, _PLAINLY), strict=True):
                    path.write_text(text.format(number))
                names = ("edited", "plainly")
                modules = [importlib.reload(module) for module in modules] or [*map(importlib.import_module, names)]
                assert list(group.map(modules[1].shown, [0])) == [(0, number, number, None, number)]
            edited, plainly = modules
            with group.executor(workers_per_host=1, initializer=edited.scale, initargs=(10,)) as executor:
                assert executor.submit(plainly.shown, 1).result() == (1, 333, 333, 10, 333)
                edited.OFFSET = 4
                assert executor.submit(plainly.shown, 2).result() == (2, 4, 333, 10, 333)
    finally:
        for name in ("edited", "plainly"):
            sys.modules.pop(name, None)


def test_workers_see_modules_that_go_as_sources_as_they_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock cannot be sent, so the host runs the sources, as it does of what is imported only by the call."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own"
    package.mkdir()
    (package / "__init__.py").write_text("")
    texts = {"edited": "TABLE = [{}]\n", "lazily": "VALUE = {}\n", "guarded": _GUARDED}
    loaded: list[Any] = []
    try:
        with RuntimeGroup([LocalRuntime(host="one")]) as group:
            for number in (1, 22, 333):
                for name, text in texts.items():
                    (package / f"{name}.py").write_text(text.format(number))
                names = ("own.edited", "own.guarded")
                loaded = [importlib.reload(module) for module in loaded] or [*map(importlib.import_module, names)]
                assert list(group.map(loaded[1].shown, [0])) == [(number, number, number)]
                assert "own.lazily" not in sys.modules
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
            sys.modules.pop(name, None)


# --- what comes back ---------------------------------------------------------------------------------
def test_results_in_order_whatever_the_chunks_are(group: RuntimeGroup) -> None:
    expected = [square(x) for x in range(500)]
    assert list(group.map(square, range(500))) == expected
    assert list(group.map(square, range(500), chunksize=7)) == expected
    assert list(group.map(square, range(500), chunksize=7, buffersize=20)) == expected
    assert sorted(group.map(square, range(500), chunksize=3, ordered=False)) == expected
    assert list(group.map(pow, range(5), itertools.repeat(2))) == [0, 1, 4, 9, 16]
    assert list(group.map(square, [])) == []


def test_workers_stay_and_know_local_classes(group: RuntimeGroup) -> None:
    def moved(point: Point) -> tuple[Point, int]:
        return Point(point.x + 1), os.getpid()

    first = list(group.map(moved, [Point(x) for x in range(8)]))
    assert [point.x for point, _ in first] == list(range(1, 9))
    assert all(type(point) is Point for point, _ in first)
    # One of the two hosts may be faster with all of it, each time another: but there are no more workers than cores.
    maps = Counter({pid for _, pid in first})
    for _ in range(2 * (os.cpu_count() or 1)):
        maps.update({pid for _, pid in group.map(moved, [Point(0)] * 8)})
    assert max(maps.values()) > 1


def test_closures_coroutines_and_what_is_bound(group: RuntimeGroup) -> None:
    table = {"a": 1}

    async def look(table: dict[str, int], key: str) -> int:
        return table[key]

    assert list(group.map(functools.partial(look, table), ["a", "a"])) == [1, 1]


def test_large_objects_are_mapped_not_copied(group: RuntimeGroup) -> None:
    np = pytest.importorskip("numpy")
    big = np.arange(3_000_000, dtype=float)

    def use(data: Any, index: int) -> tuple[float, bool]:
        data[index] += 1  # its own copy of that page, as if it were its own array
        return float(data[index]), Path("/proc/self/maps").read_text().count("memfd:pool") > 0

    assert set(group.map(functools.partial(use, big), range(6))) == {(x + 1.0, True) for x in range(6)}
    assert list(group.map(use, [big] * 3, [7, 8, 9])) == [(8.0, True), (9.0, True), (10.0, True)]
    assert big[7] == 7.0
    sent = [array.sum() for array in group.map(lambda x: np.full(400_000, x), range(5))]
    assert sent == [400_000 * x for x in range(5)]


def test_what_is_changed_between_items_is_sent_as_it_was(group: RuntimeGroup) -> None:
    np = pytest.importorskip("numpy")

    def frames() -> Iterator[Any]:
        frame = np.zeros(200_000)
        for value in range(6):
            frame[:] = value
            yield frame

    assert list(group.map(lambda frame: float(frame[-1]), frames())) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_what_calls_print_is_shown_with_the_host(group: RuntimeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    with group.executor(debug=True) as executor:
        assert list(executor.map(print, ["hello"])) == [None]
    assert capsys.readouterr().out in ("[one] hello\n", "[two] hello\n")


def test_each_worker_has_its_share_of_the_cores(group: RuntimeGroup) -> None:
    def limits() -> tuple[str | None, int]:
        return os.environ.get("OMP_NUM_THREADS"), len(os.sched_getaffinity(0))

    with group.executor(workers_per_host=1) as executor:
        threads, cores = executor.submit(limits).result()
    assert threads is not None
    assert 1 <= int(threads) <= cores


# --- endless, slow, large ----------------------------------------------------------------------------
def test_an_endless_iterable_is_taken_as_it_is_needed(group: RuntimeGroup) -> None:
    taken = itertools.count()
    results = group.map(square, taken, buffersize=10)
    assert [next(results) for _ in range(50)] == [square(x) for x in range(50)]
    assert next(taken) <= 60
    results.close()
    results = group.map(square, itertools.count())
    assert list(itertools.islice(results, 5000)) == [square(x) for x in range(5000)]
    results.close()


def test_a_slow_host_does_not_hold_up_the_rest(group: RuntimeGroup) -> None:
    def where(x: int) -> str:
        host = os.environ["NAME_OF_HOST"]
        time.sleep(0.2 if host == "one" else 0.01)
        return host

    for name in group.hosts:
        group.get_runtime(name).add_env_variables({"NAME_OF_HOST": name})
    with group.executor(workers_per_host=1) as executor:
        counts = list(executor.map(where, range(60)))
    assert counts.count("two") > 4 * counts.count("one")


def test_what_a_busy_host_has_in_stock_goes_to_one_that_is_idle(group: RuntimeGroup, tmp_path: Path) -> None:
    def first_waits(x: int) -> int:
        path = Path(str(tmp_path), "go")
        if x == 0:
            while not path.exists():
                time.sleep(0.01)
        elif x == 7:
            path.touch()
        return x

    # If one of them stood behind the first, it would never come to an end.
    with group.executor(workers_per_host=1) as executor:
        assert list(executor.map(first_waits, range(8), timeout=30)) == list(range(8))


# --- errors --------------------------------------------------------------------------------------------
def test_the_functions_own_exception_with_its_traceback_there(group: RuntimeGroup) -> None:
    def fails(x: int) -> int:
        if x == 3:
            raise LookupError("three")
        return x

    for chunksize in (1, 10):
        results = group.map(fails, range(6), chunksize=chunksize)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(LookupError, match="three") as caught:
            next(results)
        cause = caught.value.__cause__
        assert isinstance(cause, RemoteTraceback)
        assert cause.host in group.hosts
        assert 'raise LookupError("three")' in str(cause)
        assert "pool_worker" not in str(cause)


def test_tracebacks_of_functions_that_workers_have_made(group: RuntimeGroup) -> None:
    def made(x: int) -> Any:
        def inner(y: int) -> int:
            raise LookupError(x + y)

        return inner

    (inner,) = group.map(made, [1])
    with group.executor() as executor, pytest.raises(LookupError, match="3") as caught:
        executor.submit(inner, 2).result()
    assert f'  File "{__file__}", line' in str(caught.value.__cause__)
    assert "    raise LookupError(x + y)" in str(caught.value.__cause__)


def test_what_cannot_be_sent_harms_only_its_own_call(group: RuntimeGroup) -> None:
    def echo(x: Any) -> Any:
        return (item for item in ()) if x == "generator" else x

    results = group.map(echo, [1, threading.Lock(), 3], chunksize=3)
    assert next(results) == 1
    with pytest.raises(TypeError, match=r"argument 1 of .*echo\(\)"):
        next(results)
    results = group.map(echo, [1, "generator", 3], chunksize=3)
    assert next(results) == 1
    with pytest.raises(TaskExecutionError, match="a generator, cannot be sent back"):
        next(results)
    with pytest.raises(TypeError, match="cannot be sent"):
        group.map(threading.Lock().acquire, [1])
    assert list(group.map(echo, [1, 2])) == [1, 2]


def test_what_a_host_does_not_have_is_named(group: RuntimeGroup) -> None:
    def needs() -> None:
        import a_module_that_no_host_has  # noqa: F401

    with group.executor() as executor, pytest.raises(ModuleNotFoundError, match="a_module_that_no_host_has"):
        executor.submit(needs).result()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"chunksize": 0}, ValueError),
        ({"chunksize": 1.5}, TypeError),
        ({"buffersize": 0}, ValueError),
        ({"timeout": "soon"}, TypeError),
    ],
)
def test_bad_arguments(group: RuntimeGroup, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        group.map(square, [1], **options)
    with pytest.raises(TypeError, match="not a function"):
        group.map("square", [1])  # type: ignore[arg-type]


def test_a_worker_that_dies_costs_a_retry_and_a_call_that_kills_is_named(group: RuntimeGroup, tmp_path: Path) -> None:
    marker = str(tmp_path / "died")

    def dies_once(x: int) -> int:
        if x == 7 and not os.path.exists(marker):
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    assert list(group.map(dies_once, range(40), chunksize=5)) == list(range(40))

    def kills(x: int) -> int:
        if x == 7:
            print("I am about to die", flush=True)
            os._exit(3)
        return x

    results = group.map(kills, range(40), chunksize=5)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(WorkerLostError, match=r"exit status 3 while it ran .*kills\(7\) \(item 7\)") as caught:
        next(results)
    error = caught.value
    assert len(error.hosts) == 3
    assert error.host in group.hosts
    assert error.exit_status == 3
    assert isinstance(error.pid, int)
    assert "I am about to die" in error.output
    assert list(group.map(square, range(10))) == [square(x) for x in range(10)]


def test_another_python_is_refused_as_for_single_functions() -> None:
    other = next(
        (
            path
            for path in sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin/python3"))
            if not path.parts[-3].startswith(".".join(platform.python_version_tuple()[:2]))
        ),
        None,
    )
    if other is None:
        pytest.skip("there is no Python of another version here")
    with RuntimeGroup([LocalRuntime(python=str(other))]) as group:
        with pytest.raises(AgentError, match="needs the same minor version"):
            list(group.map(square, [1, 2]))
        with pytest.raises(AgentError, match="needs the same minor version"):
            list(group.map(square, [1, 2]))


# --- ending ----------------------------------------------------------------------------------------------
def test_closing_the_iterator_ends_what_runs(group: RuntimeGroup, tmp_path: Path) -> None:
    def runs_long(x: int) -> int:
        if x:
            Path(str(tmp_path), str(os.getpid())).touch()
            time.sleep(600)
        return x

    results = group.map(runs_long, range(3))
    assert next(results) == 0
    until(lambda: len(os.listdir(tmp_path)) == 2, "two calls that run")
    results.close()
    until(lambda: not any(procfs.process(int(pid)) for pid in os.listdir(tmp_path)), "their end")
    assert list(group.map(square, range(8))) == [square(x) for x in range(8)]


def test_a_timeout_ends_what_runs(group: RuntimeGroup) -> None:
    results = group.map(time.sleep, [0, 600], timeout=1)
    assert next(results) is None
    with pytest.raises(TimeoutError, match=r"sleep.*1 s"):
        next(results)


def test_what_workers_started_ends_with_them(tmp_path: Path) -> None:
    def starts(x: int) -> int:
        import subprocess

        return subprocess.Popen(["sleep", "600"], start_new_session=True).pid

    with RuntimeGroup([LocalRuntime()]) as group:
        pids = list(group.map(starts, range(3)))
        assert all(procfs.process(pid) for pid in pids)
    assert not any(procfs.process(pid) for pid in pids)


def test_a_group_that_was_cleaned_up_maps_no_more() -> None:
    group = RuntimeGroup([LocalRuntime()])
    results = group.map(time.sleep, [0, 600])
    next(results)
    group.cleanup()
    with pytest.raises((LazyclusterError, concurrent_cancelled())):
        next(results)
    with pytest.raises(LazyclusterError, match="closed"):
        group.map(square, [1])


def concurrent_cancelled() -> type[BaseException]:
    import concurrent.futures

    return concurrent.futures.CancelledError


# --- real hosts ------------------------------------------------------------------------------------------
def test_hosts_take_part_as_they_can(host_group: RuntimeGroup) -> None:
    def where(x: int) -> tuple[int, str]:
        time.sleep(0.02)
        return x, os.uname().nodename

    results = list(host_group.map(where, range(60)))
    assert [x for x, _ in results] == list(range(60))
    assert len({host for _, host in results}) == 3


# --- large arrays and frames of every type -------------------------------------------------------
_COUNT = 150_000  # values of 8 bytes: more than from which on an array travels apart


def _large_values() -> dict[str, Any]:
    np, pd = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    numbers = np.arange(_COUNT)
    dates = np.datetime64("2020-01-01T00:00:00", "ns") + numbers.astype("m8[s]")
    mixed = np.zeros(_COUNT, [("when", "M8[s]"), ("name", "S5"), ("value", ">f4", (2,))])
    mixed["when"], mixed["name"] = dates, b"abc"
    frame = pd.DataFrame({"when": pd.DatetimeIndex(dates), "value": numbers * 1.5, "name": "text"})
    strings = {"strings": np.array(["x" * (n % 9) for n in range(_COUNT)], np.dtypes.StringDType())} if hasattr(
        np.dtypes, "StringDType"
    ) else {}  # fmt: skip
    return {
        "dates": dates,
        "dates by columns": np.asfortranarray(dates.reshape(-1, 2)),
        "dates that are not contiguous": np.repeat(dates, 2)[::2],
        "spans": numbers.astype("m8[ms]"),
        "days": dates.astype("M8[D]"),
        "structured": mixed,
        "a field of it": mixed["when"],
        "records": mixed.view(np.recarray),
        "aligned": np.zeros(_COUNT, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
        "void": numbers.view("V8"),
        "bytes": numbers.astype("S20"),
        "text": numbers.astype("U6"),
        "other end first": numbers.astype(">i8"),
        "half": (np.repeat(numbers, 5) % 1000).astype("f2"),
        "complex": numbers.astype("c16"),
        "long double": numbers.astype("g"),
        "truth": np.repeat(numbers, 9) % 2 == 0,
        "masked": np.ma.masked_less(numbers, 5),
        "objects": numbers.astype(object),
        "frame of dates": frame,
        "series of dates": frame["when"].dt.tz_localize("Europe/Berlin"),
        "index of dates": pd.DatetimeIndex(dates),
        "index of periods": pd.period_range("1900-01-01", periods=_COUNT, freq="D"),
        "index of spans": pd.to_timedelta(numbers, unit="s"),
        "frame by dates": frame.set_index(["when", "value"]),
        "categories": frame["when"].astype("category"),
        "intervals": pd.interval_range(0, _COUNT),
        **strings,
    }


def _same(value: Any) -> Any:
    return value


def test_large_arrays_and_frames_of_every_type_are_arguments(group: RuntimeGroup) -> None:
    np, pd = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    values = _large_values()
    for way in (group.map(_same, values.values()), (future.result() for future in _submitted(group, values))):
        for (name, wanted), got in zip(values.items(), way, strict=True):
            if isinstance(wanted, (pd.DataFrame, pd.Series, pd.Index)):
                assert type(got) is type(wanted), name
                assert got.equals(wanted), name
            else:
                assert (got.dtype, got.shape, got.flags.f_contiguous) == (
                    wanted.dtype, wanted.shape, wanted.flags.f_contiguous or not wanted.flags.contiguous
                ), name  # fmt: skip
                assert np.array_equal(got, wanted), name


def _submitted(group: RuntimeGroup, values: dict[str, Any]) -> list[Any]:
    with group.executor() as executor:
        return [executor.submit(_same, value) for value in values.values()]
