"""joblib on the hosts of a group: joblib's own tests of its Dask backend where they apply, and ours."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import os
import re
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.exceptions import RemoteTraceback
from sshhosts import procfs

joblib = pytest.importorskip("joblib")
np = pytest.importorskip("numpy")
pytestmark = pytest.mark.keeps("manager")  # workers and zygotes, for the group's life


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[RuntimeGroup]:
    with RuntimeGroup([LocalRuntime(host="one"), LocalRuntime(host="two")]) as group:
        yield group
    assert not {process.pid for process in procfs.descendants(os.getpid())} & _agents(group)


def _agents(group: RuntimeGroup) -> set[int]:
    return {runtime._connection.agent_info.pid for runtime in group.runtimes}


# --- joblib's ------------------------------------------------------------------------------------------
@pytest.fixture
def theirs(group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """joblib's tests of its Dask backend, with our backend in place of theirs.

    They are a module of the user's own here: else each worker would import all that they import.
    """
    pytest.importorskip("distributed")
    for marker in ("thread_unsafe", "no_cover"):
        request.config.addinivalue_line("markers", f"{marker}: joblib's own")
    # Their tests make one of each backend that is known.
    monkeypatch.delitem(joblib.parallel.BACKENDS, "lazycluster", raising=False)
    original = Path(joblib.__file__).parent / "test" / "test_dask.py"
    text = re.sub(r"^from \.\.(\w*) import", _absolute, original.read_text(), flags=re.MULTILINE)
    text = re.sub(r"^from \.(\w+) import", r"from joblib.test.\1 import", text, flags=re.MULTILINE)
    copy = tmp_path / "tests_of_dask_backend.py"
    copy.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    module: Any = importlib.import_module(copy.stem)
    monkeypatch.delitem(sys.modules, copy.stem)
    sys.modules[copy.stem] = module
    _adapt(module, group, monkeypatch)
    return module


def _absolute(match: re.Match[str]) -> str:
    return f"from joblib{'.' if match[1] else ''}{match[1]} import"


def _adapt(module: Any, group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazycluster.pool.joblib_backend import LazyclusterBackend

    def configured(original: Any) -> Any:
        return lambda backend="dask", **_: original("lazycluster", group=group)

    @contextlib.contextmanager
    def cluster() -> Iterator[Any]:
        yield {"address": None}, [None, None]

    @contextlib.contextmanager
    def client(*_: Any, **__: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(module, "cluster", cluster)
    monkeypatch.setattr(module, "Client", client)
    monkeypatch.setattr(module, "distributed", types.SimpleNamespace(Client=client))
    monkeypatch.setattr(module, "DaskDistributedBackend", LazyclusterBackend)
    monkeypatch.setattr(module, "parallel_config", configured(joblib.parallel_config))
    monkeypatch.setattr(module, "parallel_backend", configured(joblib.parallel_backend))
    monkeypatch.setattr(module, "inc", inc)  # theirs imports all of distributed


def inc(x: int) -> int:
    return x + 1


@pytest.mark.parametrize(
    "name",
    [
        "test_simple",
        "test_dask_backend_uses_autobatching",
        "test_dont_assume_function_purity",
        "test_nested_backend_context_manager",
    ],
)
def test_theirs(theirs: Any, name: str) -> None:
    getattr(theirs, name)(None)


@pytest.mark.filterwarnings("ignore:.*still being processed.*have been cancelled")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_theirs_with_generators(theirs: Any) -> None:
    theirs.test_parallel_unordered_generator_returns_fastest_first_with_dask(-1, theirs.parallel_backend)
    for return_as in ("generator", "generator_unordered"):
        theirs.test_deadlock_with_generator_and_dask(theirs.parallel_config, return_as, 2)


# --- ours ------------------------------------------------------------------------------------------------
@pytest.fixture
def parallel(group: RuntimeGroup) -> Iterator[Any]:
    with joblib.parallel_config("lazycluster", group=group):
        yield joblib.Parallel


@pytest.mark.parametrize("first", ["joblib", "lazycluster"])
def test_it_is_known_whichever_is_imported_first(first: str) -> None:
    other = "lazycluster" if first == "joblib" else "joblib"
    program = f"""
    import {first}, sys
    assert "{other}" not in sys.modules
    import {other}
    from lazycluster import LocalRuntime, RuntimeGroup
    with RuntimeGroup([LocalRuntime()]) as group, joblib.parallel_config("lazycluster", group=group):
        print(joblib.Parallel()(joblib.delayed(abs)(x) for x in (-1, -2)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1, 2]\n", done.stderr


def test_errors_are_the_functions_own(parallel: Any) -> None:
    def fails(x: int) -> int:
        if x == 3:
            raise LookupError("three")
        return x

    with pytest.raises(LookupError, match="three") as caught:
        parallel()(joblib.delayed(fails)(x) for x in range(50))
    assert isinstance(caught.value.__cause__, RemoteTraceback)


def test_an_error_ends_what_still_runs(parallel: Any, tmp_path: Path) -> None:
    def work(x: int) -> None:
        if x:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(600)
        while not os.listdir(tmp_path):
            time.sleep(0.01)
        raise LookupError("that is it")

    with pytest.raises(LookupError):
        parallel(batch_size=1)(joblib.delayed(work)(x) for x in range(2))
    deadline = time.monotonic() + 20
    while any(procfs.process(int(pid)) for pid in os.listdir(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_large_arrays_go_once_and_no_call_sees_what_another_changed(group: RuntimeGroup, parallel: Any) -> None:
    data = np.zeros(1_000_000)

    def use(array: Any, index: int) -> float:
        array[0] += index + 1
        return float(array[0])

    blobs = group._kept_executor()._blobs
    before = blobs._next
    found = parallel(batch_size=1)(joblib.delayed(use)(data, index) for index in range(20))
    assert found == [index + 1.0 for index in range(20)]
    assert data[0] == 0.0
    shared = [blobs[number] for number in range(before, blobs._next) if number in blobs._by_number]
    assert sum(blob.packed.size for blob in shared) < 1.1 * data.nbytes
    deadline = time.monotonic() + 20
    while any(blob.users for blob in shared):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_parallel_in_a_call_stays_in_its_process(parallel: Any) -> None:
    def inner() -> set[int]:
        return {os.getpid(), *joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(4))}

    assert all(len(pids) == 1 for pids in parallel()(joblib.delayed(inner)() for _ in range(4)))


def test_how_many_jobs(group: RuntimeGroup, parallel: Any) -> None:
    total = group._kept_executor().worker_count
    assert joblib.effective_n_jobs(-1) == total
    assert joblib.effective_n_jobs(2) == 2
    assert joblib.effective_n_jobs(-2) == total - 1
    with pytest.raises(ValueError, match="n_jobs == 0"):
        joblib.effective_n_jobs(0)
    pids = parallel(n_jobs=1, batch_size=1)(joblib.delayed(os.getpid)() for _ in range(5))
    assert len(set(pids)) == 1


def test_an_initializer_prepares_the_workers(parallel: Any) -> None:
    def prepare(value: str) -> None:
        os.environ["LAZYCLUSTER_TEST_PREPARED"] = value

    def prepared() -> tuple[int, str | None]:
        return os.getpid(), os.environ.get("LAZYCLUSTER_TEST_PREPARED")

    def run(**options: Any) -> tuple[set[int], set[str | None]]:
        pids, values = zip(*parallel(n_jobs=2, **options)(joblib.delayed(prepared)() for _ in range(20)), strict=True)
        return set(pids), set(values)

    first, values = run(initializer=prepare, initargs=("one",))
    assert values == {"one"}
    again, values = run(initializer=prepare, initargs=("one",))
    assert values == {"one"}
    assert again & first  # the same workers
    assert run(initializer=prepare, initargs=("two",))[1] == {"two"}
    assert run()[1] == {None}


def test_an_initializer_that_fails_is_told(parallel: Any) -> None:
    def prepare() -> None:
        raise LookupError("there is no table")

    with pytest.raises(concurrent.futures.BrokenExecutor, match="there is no table"):
        parallel(n_jobs=2, initializer=prepare)(joblib.delayed(abs)(-1) for _ in range(3))


def test_options_that_parallel_passes_on_are_not_ignored(parallel: Any) -> None:
    with pytest.raises(TypeError, match="no option 'initialiser'; it has: initializer, initargs"):
        parallel(n_jobs=2, initialiser=print)(joblib.delayed(abs)(-1) for _ in range(3))
    with pytest.raises(TypeError):
        parallel(n_jobs=2, initializer=3)(joblib.delayed(abs)(-1) for _ in range(3))
    assert parallel(n_jobs=2, max_nbytes="1M", mmap_mode="c", prefer="processes", verbose=0, timeout=60)(
        joblib.delayed(abs)(-number) for number in range(3)
    ) == [0, 1, 2]


def test_options_that_make_no_sense(group: RuntimeGroup) -> None:
    with pytest.raises(TypeError, match=r"group=RuntimeGroup"):
        joblib.parallel_config("lazycluster")
    with pytest.raises(TypeError, match="no option 'client'"):
        joblib.parallel_config("lazycluster", group=group, client=3)


def test_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    from sklearn.datasets import make_classification
    from sklearn.model_selection import GridSearchCV
    from sklearn.tree import DecisionTreeClassifier

    features, labels = make_classification(300, 20, random_state=0)
    search = GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2, 3]}, cv=3)
    # A group of its own: workers that do not exist yet are forked with scikit-learn imported.
    with RuntimeGroup([LocalRuntime()]) as group, joblib.parallel_config("lazycluster", group=group):
        search.fit(features, labels)
    assert search.best_score_ > 0.5


def test_how_long_calls_took_is_forgotten_with_their_parallel(group: RuntimeGroup) -> None:
    """Else a batch of many slow calls would go to one worker, if those before were quick."""
    with joblib.parallel_config("lazycluster", group=group):
        quick = joblib.Parallel(n_jobs=2)
        assert quick(joblib.delayed(abs)(number) for number in range(3000)) == list(range(3000))
        backend = quick._backend
        assert backend.compute_batch_size() == 1
        assert backend._smoothed_batch_duration == backend._DEFAULT_SMOOTHED_BATCH_DURATION
