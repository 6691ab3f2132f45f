"""A Dask cluster that gets more and fewer workers while it is used."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from cluster_groups import connect, local_group

import leaks
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.runtimes import Runtime

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this module

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


# The workers that such a test starts are those of the next one; the fixture sees that none is left in the end.
shared = pytest.mark.keeps("manager")


@pytest.fixture(scope="module")
def cluster() -> Iterator[DaskCluster]:
    # As many ports as the scheduler and three workers need, and no more: so each test uses those of workers that left.
    with local_group(2) as group, DaskCluster(group, list(range(25000, 25010)), nthreads=1) as cluster:
        cluster.start(worker_count=1, master_port=25900)
        yield cluster
    assert leaks.running("lazycluster_dask") == []


@pytest.fixture(scope="module")
def client(cluster: DaskCluster) -> Iterator[Any]:
    with cluster.get_client(timeout=10) as client:
        yield client


def _names(client: Any) -> list[str]:
    return sorted(info["name"] for info in client.scheduler_info(n_workers=-1)["workers"].values())


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def _noted(path: str, value: int) -> bytes:
    """Return some data, and note that it was computed."""
    with open(path, "a") as file:
        file.write(f"{value}\n")
    return bytes([value]) * 100_000


def _waits_for(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.01)
    return "done"


# --- by hand -------------------------------------------------------------------------------------
@shared
def test_what_leaving_workers_hold_is_handed_over(cluster: DaskCluster, client: Any, tmp_path: Path) -> None:
    cluster.scale(3)
    names = _names(client)
    assert names == ["local0-0", "local0-1", "local1-0"]  # in turn
    notes = tmp_path / "notes"
    futures = [
        client.submit(lambda *args: _noted(*args), str(notes), number, workers=[names[number % 3]], pure=False)
        for number in range(12)
    ]
    scattered = client.scatter([b"a", b"b", b"c"], broadcast=False)
    client.gather(futures)
    cluster.scale(1)
    assert len(_names(client)) == 1
    assert [data[:1] for data in client.gather(futures)] == [bytes([number]) for number in range(12)]
    assert client.gather(scattered) == [b"a", b"b", b"c"]
    assert sorted(map(int, notes.read_text().split())) == list(range(12))  # nothing was computed again
    assert len(cluster._worker_launcher.services) == 1
    assert sum(map(len, cluster._worker_launcher.ports_per_host.values())) == 1


@shared
def test_the_last_worker_does_not_take_results_along(cluster: DaskCluster, client: Any) -> None:
    cluster.scale(1)
    future = client.scatter(b"precious")
    with pytest.raises(ClusterError, match=r"holds 1 results or actors .*\n  Next step: gather or release"):
        cluster.scale(0)
    assert len(_names(client)) == 1
    assert client.submit(bytes.upper, future).result(timeout=20) == b"PRECIOUS"
    del future
    _until(lambda: not any(client.has_what().values()))
    cluster.scale(0)
    assert _names(client) == []
    waiting = client.submit(lambda: 5, pure=False)
    assert cluster.status.name == "running"
    cluster.scale(1)
    assert waiting.result(timeout=20) == 5


@shared
def test_tasks_that_run_on_leaving_workers_are_done_by_others(
    cluster: DaskCluster, client: Any, tmp_path: Path
) -> None:
    cluster.scale(2)
    futures = [
        client.submit(lambda path: _waits_for(path), str(tmp_path / "go"), key=f"task-{number}") for number in range(6)
    ]
    _until(lambda: all(client.processing().values()))
    cluster.scale(1)
    (tmp_path / "go").touch()
    assert client.gather(futures) == ["done"] * 6


@shared
def test_a_worker_that_is_being_started_again_leaves_first(cluster: DaskCluster, client: Any) -> None:
    cluster.scale(2)
    launcher = cluster._worker_launcher
    victim = launcher.workers[0]
    assert victim.service.pid is not None
    os.kill(victim.service.pid, signal.SIGSTOP)  # its nanny: so it cannot tell of its end either
    os.kill(victim.service.pid, signal.SIGKILL)
    _until(lambda: victim.service.state != "ready")
    cluster.scale(1)
    assert victim not in launcher.workers
    assert client.submit(lambda: 6, pure=False).result(timeout=20) == 6
    _until(lambda: _names(client) == [launcher.workers[0].name])


@shared
def test_a_worker_that_somebody_else_has_retired_does_not_count(cluster: DaskCluster, client: Any) -> None:
    cluster.scale(2)
    client.retire_workers(names=[cluster._worker_launcher.workers[0].name], close_workers=True)
    _until(lambda: cluster._worker_launcher.workers[0].has_gone)
    cluster.scale(2)
    assert len(_names(client)) == 2
    assert len(cluster._worker_launcher.workers) == 2


@shared
def test_several_threads_scale_at_once(cluster: DaskCluster, client: Any) -> None:
    threads = [threading.Thread(target=cluster.scale, args=(count,)) for count in (3, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(_names(client)) == len(cluster._worker_launcher.workers)
    assert len(_names(client)) in (1, 2, 3)
    cluster.scale(1)
    assert len(_names(client)) == 1


@shared
@pytest.mark.parametrize("count", [-1, True, 1.5, "2", None])
def test_a_number_of_workers_that_makes_no_sense(cluster: DaskCluster, count: Any) -> None:
    with pytest.raises(ValueError, match="integer of at least 0"):
        cluster.scale(count)


# --- as the load is ------------------------------------------------------------------------------
@shared
def test_workers_come_and_go_with_the_load(cluster: DaskCluster, client: Any, tmp_path: Path) -> None:
    _until(lambda: not any(client.has_what().values()))  # what the test before has let go of
    cluster.scale(0)
    adaptive = cluster.adapt(minimum=0, maximum=2, interval="100ms", wait_count=2, target_duration="1s")
    futures = [
        client.submit(lambda path: _waits_for(path), str(tmp_path / "go"), key=f"load-{number}") for number in range(8)
    ]
    _until(lambda: len(_names(client)) == 2)
    (tmp_path / "go").touch()
    assert client.gather(futures) == ["done"] * 8
    del futures
    _until(lambda: not cluster._worker_launcher.workers)
    assert adaptive.periodic_callback is not None
    cluster.scale(1)
    assert adaptive.periodic_callback is None  # whoever says a number wants that number
    assert client.submit(lambda: 7, pure=False).result(timeout=20) == 7


@shared
@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"minimum": -1}, "minimum"),
        ({"minimum": "1"}, "minimum"),
        ({"minimum": 2, "maximum": 1}, "maximum"),
        ({"maximum": 0}, "maximum"),
        ({"maximum": 1.5}, "maximum"),
        ({"interval": "soon"}, "interval"),
        ({"target_duration": object()}, "target_duration"),
        ({"minimum_cores": -1}, "minimum_cores"),
        ({"minimum_cores": "2"}, "minimum_cores"),
        ({"maximum_cores": float("inf")}, "maximum_cores"),
        ({"maximum_cores": 0.5}, "maximum_cores=0.5 leaves room for 0 workers"),
        ({"minimum": 3, "maximum_cores": 2}, "room for 2 workers, fewer than there are to be at least \\(3\\)"),
        ({"maximum_memory": "4 XB"}, "maximum_memory must be .* such as '16 GiB', not '4 XB'"),
        ({"minimum_memory": [1]}, "minimum_memory"),
    ],
)
def test_limits_that_make_no_sense(cluster: DaskCluster, limits: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        cluster.adapt(**limits)


@shared
@pytest.mark.parametrize(
    ("limits", "bounds"),
    [
        ({"minimum_cores": 2, "maximum_cores": 3}, (2, 3)),
        ({"minimum_cores": 1.5, "maximum_cores": 3.9}, (2, 3)),
        ({"minimum": 1, "maximum": 4, "minimum_cores": 2, "maximum_cores": 6}, (2, 4)),
        ({"minimum_memory": "800 MB", "maximum_memory": 1_600_000_000}, (2, 3)),
        ({"maximum_cores": 5, "maximum_memory": "1 GB", "interval": "1h", "memory_ratio": 2}, (0, 2)),
    ],
)
def test_limits_of_what_all_workers_have_together(
    cluster: DaskCluster, limits: dict[str, Any], bounds: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster._dask, "memory_limit", "500 MB")
    adaptive = cluster.adapt(**{"interval": "1h", **limits})
    assert (adaptive.minimum, adaptive.maximum) == bounds
    adaptive.stop()


@shared
def test_the_size_of_workers_that_are_there(cluster: DaskCluster, client: Any) -> None:
    cluster.scale(1)
    each = client.run(lambda dask_worker: dask_worker.memory_manager.memory_limit).popitem()[1]
    assert cluster.adapt(maximum_memory=int(3.5 * each), interval="1h").maximum == 3
    cluster.scale(0)
    with pytest.raises(ClusterError, match=r"need workers of one size.*: none is there\n.*memory_limit="):
        cluster.adapt(maximum_memory="1 GiB")
    cluster.scale(1)


@shared
@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("minimum_core", "did you mean 'minimum_cores'"),
        ("intervall", "did you mean 'interval'"),
        ("x", "there are: minimum, maximum, .*interval"),
    ],
)
def test_options_that_adapt_does_not_have(cluster: DaskCluster, option: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"no option '{option}'; {hint}"):
        cluster.adapt(**{option: 1})


@shared
def test_options_of_a_strategy_of_ones_own(cluster: DaskCluster) -> None:
    from distributed.deploy.adaptive import Adaptive

    class Own(Adaptive):
        def __init__(self, *args: Any, eagerness: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.eagerness = eagerness

    assert cluster.adapt(Adaptive=Own, eagerness=3, interval="1h").eagerness == 3
    with pytest.raises(TypeError, match="did you mean 'eagerness'"):
        cluster.adapt(Adaptive=Own, eagernes=3)
    cluster.scale(1)


@shared
def test_without_a_maximum_there_is_one_worker_per_host(cluster: DaskCluster) -> None:
    cluster.scale(1)
    adaptive = cluster.adapt(interval="1h")
    assert (adaptive.minimum, adaptive.maximum) == (0, 2)
    other = cluster.adapt(minimum=1, interval="1h")
    assert adaptive.periodic_callback is None
    other.stop()


# --- before and after ----------------------------------------------------------------------------
def test_only_a_cluster_that_runs_is_scaled() -> None:
    with local_group(1) as group:
        cluster = DaskCluster(group)
        for change in (lambda: cluster.scale(2), cluster.adapt):
            with pytest.raises(ClusterError, match="was not started"):
                change()
        cluster.cleanup()
        with pytest.raises(ClusterError, match="was ended"):
            cluster.scale(1)


def test_the_end_of_the_cluster_ends_a_change() -> None:
    errors: list[BaseException] = []

    with local_group(2) as group:
        cluster = DaskCluster(group, nthreads=1)
        cluster.start(worker_count=1)
        cluster.adapt(minimum=1, maximum=1, interval="100ms")
        launcher = cluster._worker_launcher

        def scale() -> None:
            try:
                cluster.scale(4)
            except ClusterError as error:
                errors.append(error)

        thread = threading.Thread(target=scale)
        thread.start()
        _until(lambda: len(launcher.services) == 4)
        cluster.cleanup()
        thread.join(30)
        assert not thread.is_alive()
        assert launcher.services == []
        assert "was ended" in str(errors[0])


# --- hosts that come and go ----------------------------------------------------------------------
@pytest.mark.soak
def test_runtimes_that_are_added_and_removed_count(make_hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    hosts = make_hosts(3)
    options = {"connection_kwargs": {"config_file": hosts.config_file}, "python": sys.executable}
    with connect(hosts.config_file, ["host1", "host2"]) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start(worker_count=1)
        with cluster.get_client(timeout=10) as client, contextlib.ExitStack() as stack:
            first = client.submit(bytes, 300_000, workers=["host1-0"], pure=False)
            group.add_runtime(runtime=Runtime("host3", **options))
            cluster.scale(3)
            assert _names(client) == ["host1-0", "host2-0", "host3-0"]
            there = client.submit(len, first, workers=["host3-0"], pure=False)
            assert there.result(timeout=20) == 300_000  # the new host reaches the old ones
            stack.enter_context(group.remove_runtime("host1"))
            cluster.scale(2)
            assert _names(client) == ["host2-0", "host3-0"]
            assert hosts[0].listening_ports() == []
            assert client.submit(len, first, pure=False).result(timeout=20) == 300_000
            group.get_runtime("host2").cleanup()  # as good as a host that has gone, and sooner
            cluster.scale(2)
            assert "host2: gets no worker" in caplog.text
            assert _names(client) == ["host3-0", "host3-1"]
