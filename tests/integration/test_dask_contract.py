"""What programs know that know the clusters of distributed: the same of its own `LocalCluster` and of ours."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

import dask.config
from cluster_groups import connect
from distributed import Client, LocalCluster, Status
from distributed.utils import Logs

from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster, RoundRobinLauncher
from lazycluster.cluster.exceptions import ClusterError, WorkerStartError
from patience import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this module

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# The workers that such a test starts are those of the next one.
shared = pytest.mark.keeps("manager")
_SIZE: dict[str, Any] = {"memory_limit": "500 MB"}

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def group(module_hosts: Any) -> Iterator[RuntimeGroup]:
    with connect(module_hosts.config_file, [host.name for host in module_hosts][:2]) as group:
        yield group


# Workers that are threads of the tests take for their own what the tests have in memory.
_NO_LIMITS = {f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause", "terminate")}


@pytest.fixture(scope="module", params=["distributed", "lazycluster"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """A function that makes a cluster, which is to have two workers of one thread once it is awaited."""
    if request.param == "distributed":
        # Without processes: those that multiprocessing keeps would be taken for left behind.
        local = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "protocol": "tcp", "host": "127.0.0.1"}
        local |= {"dashboard_address": "127.0.0.1:0", "local_directory": str(tmp_path_factory.mktemp("local")), **_SIZE}
        with dask.config.set(_NO_LIMITS):
            yield lambda **options: LocalCluster(**local, **options)
    else:
        yield lambda **options: DaskCluster(request.getfixturevalue("group"), nthreads=1, **_SIZE, **options)


@pytest.fixture(scope="module")
def cluster(make: Make) -> Iterator[Any]:
    with make() as cluster:
        if isinstance(cluster, DaskCluster):
            cluster.start()
        yield cluster


def _reaches(cluster: Any, count: int) -> None:
    """Wait for a size; `scale` of distributed does not."""
    until(lambda: len(cluster.observed) == count, f"{count} workers")


# --- a program that blocks -----------------------------------------------------------------------
def test_its_name_is_a_text_that_can_be_set(cluster: Any) -> None:
    name = cluster.name
    assert isinstance(name, str)
    assert name
    cluster.name = "mine"
    assert cluster.name == "mine"
    cluster.name = name


def test_names_differ(make: Make, cluster: Any) -> None:
    with make() as other:
        assert other.name != cluster.name


def test_what_the_scheduler_says_of_itself(cluster: Any) -> None:
    cluster.wait_for_workers(2, timeout=30)
    info = cluster.scheduler_info
    assert isinstance(info, dict)
    assert info["address"] == cluster.scheduler_address
    assert {"type", "id", "address", "services", "started", "workers"} <= set(info)
    assert (info.get("n_workers", 2), info.get("total_threads", 2)) == (2, 2)
    assert [worker["nthreads"] for worker in info["workers"].values()] == [1, 1]
    assert {worker["memory_limit"] for worker in info["workers"].values()} == {500_000_000}
    assert "Scheduler" in info._repr_html_()
    with Client(cluster) as client:
        assert set(client.scheduler_info(n_workers=-1)["workers"]) == set(info["workers"])


def test_calls_of_the_scheduler(cluster: Any) -> None:
    cluster.wait_for_workers(2, timeout=30)
    threads = cluster.sync(cluster.scheduler_comm.ncores)
    assert threads == dict.fromkeys(cluster.scheduler_info["workers"], 1)
    assert cluster.scheduler_comm.address == cluster.scheduler_address
    cluster.sync(cluster.scheduler_comm.set_metadata, keys=["mine"], value=5)
    assert cluster.sync(cluster.scheduler_comm.get_metadata, keys=["mine"], default=None) == 5


def test_wanted_and_present_workers(cluster: Any) -> None:
    cluster.wait_for_workers(2, timeout=30)
    assert cluster.plan == cluster.requested == cluster.observed
    assert len(cluster.plan) == 2
    with Client(cluster) as client:
        names = {worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()}
    assert cluster.observed == names


def test_waiting_for_workers(cluster: Any) -> None:
    assert cluster.wait_for_workers(1) is None
    with pytest.raises(TimeoutError, match="2/5"):
        cluster.wait_for_workers(5, timeout="300 ms")
    for count in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match=r"positive|at least 1"):
            cluster.wait_for_workers(count)
    with Client(cluster) as client:  # which leaves it to the cluster
        client.wait_for_workers(2, timeout=10)
        with pytest.raises(TimeoutError):
            client.wait_for_workers(5, timeout=0.3)


def test_logs(cluster: Any) -> None:
    with Client(cluster) as client:
        client.run(_log, "written by a test")
        workers = set(client.scheduler_info(n_workers=-1)["workers"])
    logs = cluster.get_logs()
    assert isinstance(logs, Logs)
    assert set(logs) == {"Cluster", "Scheduler", *workers}
    assert all(isinstance(text, str) for text in logs.values())
    assert "Register worker" in logs["Scheduler"] or "worker" in logs["Scheduler"].lower()
    assert all("written by a test" in logs[worker] for worker in workers)
    one = min(workers)
    assert set(cluster.get_logs(cluster=False, scheduler=False, workers=[one])) == {one}
    assert set(cluster.get_logs(cluster=False, workers=False)) == {"Scheduler"}
    assert set(cluster.get_logs(scheduler=False, workers=False)) == {"Cluster"}


def _log(text: str) -> None:
    import logging

    logging.getLogger("distributed.worker").warning(text)


@shared
@pytest.mark.parametrize(
    ("size", "count"),
    [({"n": 1}, 1), ({"cores": 3}, 3), ({"memory": "1 GB"}, 2), ({"n": 1, "cores": 2}, 2), ({"memory": 1.1e9}, 3)],
    ids=str,
)
def test_scaling_by_number_threads_and_memory(cluster: Any, size: dict[str, Any], count: int) -> None:
    cluster.scale(**size)
    _reaches(cluster, count)
    assert len(cluster.plan) == count
    cluster.scale(2)
    _reaches(cluster, 2)


@shared
def test_adapting_within_bounds_of_threads_and_memory(cluster: Any) -> None:
    adaptive = cluster.adapt(minimum_cores=1, maximum_cores=3, maximum_memory="1 GB", interval="50ms", wait_count=1)
    try:
        assert (adaptive.minimum, adaptive.maximum) == (1, 2)
        _reaches(cluster, 1)
        with Client(cluster) as client:
            futures = client.map(lambda _: time.sleep(0.5), range(60))
            _reaches(cluster, 2)
            client.cancel(futures)
    finally:
        adaptive.stop()
    cluster.scale(2)
    _reaches(cluster, 2)


@shared
def test_workers_that_somebody_else_ends_are_seen(make: Make) -> None:
    with make() as cluster, Client(cluster) as client:
        client.wait_for_workers(2, timeout=30)
        gone = min(cluster.scheduler_info["workers"])
        client.retire_workers([gone], close_workers=True)
        until(lambda: gone not in cluster.scheduler_info["workers"], "the end of a worker")
        assert len(cluster.observed) == 1


def test_status_and_addresses_before_and_after(make: Make) -> None:
    with make() as cluster:
        if isinstance(cluster, DaskCluster):
            assert (cluster.status, cluster.scheduler_address) == (Status.created, "<Not Connected>")
            assert (cluster.dashboard_link, cluster.scheduler_info, cluster.plan) == ("", {"workers": {}}, set())
            cluster.start()
        assert cluster.status is Status.running
        assert "://" in cluster.scheduler_address
        assert cluster.dashboard_link.endswith("/status")
    assert cluster.status is Status.closed
    assert isinstance(cluster.scheduler_address, str)  # lists of clusters show also those that were ended
    assert isinstance(cluster.dashboard_link, str)
    assert isinstance(cluster.scheduler_info["workers"], dict)
    assert cluster.close() is None
    with pytest.raises(RuntimeError, match="closed"):
        Client(cluster)


# --- a program with an event loop ----------------------------------------------------------------
def test_in_coroutines(make: Make) -> None:
    async def main() -> Any:
        async with make(asynchronous=True) as cluster:
            assert (cluster.status, cluster.asynchronous) == (Status.running, True)
            assert await cluster is cluster
            await cluster.wait_for_workers(2, timeout=30)
            with pytest.raises(TimeoutError):
                await cluster.wait_for_workers(5, timeout=0.3)
            assert set(await cluster.scheduler_comm.ncores()) == set(cluster.scheduler_info["workers"])
            assert set(await cluster.get_logs(workers=False)) == {"Cluster", "Scheduler"}
            async with Client(cluster, asynchronous=True) as client:
                assert await client.submit(lambda: 55) == 55
                await client.wait_for_workers(2, timeout=30)
            await cluster.scale(1)
            for _ in range(600):
                if len(cluster.observed) == 1:
                    break
                await asyncio.sleep(0.05)
            assert len(cluster.observed) == 1
            adaptive = cluster.adapt(minimum=1, maximum=1)
            adaptive.stop()
        assert cluster.status is Status.closed
        return cluster

    cluster = asyncio.run(main())
    assert cluster.status is Status.closed


def test_await_starts_and_close_ends(make: Make) -> None:
    async def main() -> Status:
        cluster = await make(asynchronous=True)
        assert cluster.status is Status.running
        await cluster.close()
        return cluster.status  # type: ignore[no-any-return]

    assert asyncio.run(main()) is Status.closed


def test_the_event_loop_goes_on_while_it_starts_and_ends(make: Make) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        turning = asyncio.ensure_future(turn())
        async with make(asynchronous=True):
            assert turns > 20
            before = turns
        assert turns > before + 20
        turning.cancel()

    asyncio.run(main())


# --- ours alone ----------------------------------------------------------------------------------
def test_a_client_starts_a_cluster_that_was_not_started(group: RuntimeGroup) -> None:
    with DaskCluster(group, nthreads=1) as cluster:
        with Client(cluster) as client:
            assert client.submit(lambda: 55).result(timeout=30) == 55
        assert cluster.status is Status.running


def test_awaited_twice_at_once_it_is_started_once(group: RuntimeGroup) -> None:
    async def main() -> None:
        cluster = DaskCluster(group, nthreads=1)
        try:
            assert await asyncio.gather(cluster, cluster) == [cluster, cluster]  # type: ignore[list-item]
            assert len(cluster.observed) == 2
        finally:
            await cluster.close()

    asyncio.run(main())


def test_a_start_that_is_cancelled_leaves_nothing(group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> DaskCluster:
        cluster = DaskCluster(group, nthreads=1)
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        start = cluster.start_workers
        monkeypatch.setattr(
            cluster, "start_workers", lambda *a, **k: (loop.call_soon_threadsafe(begun.set), start(*a, **k))
        )
        starting = asyncio.ensure_future(cluster._awaited())
        await begun.wait()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        assert starting.cancelled()
        return cluster

    cluster = asyncio.run(main())
    assert cluster._worker_launcher.services == []
    assert cluster.master_port is None


def test_an_await_of_a_start_that_fails_says_why(group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any) -> Any:
        raise WorkerStartError("worker", "host1", "it has no wheels")

    monkeypatch.setattr(RoundRobinLauncher, "_bring_up_all", fails)

    async def main() -> None:
        async with DaskCluster(group):
            raise AssertionError

    with pytest.raises(ClusterError, match="it has no wheels"):
        asyncio.run(main())
    with pytest.raises(ClusterError, match=r"did not start.*it has no wheels"), DaskCluster(group) as cluster:
        Client(cluster)


def test_close_in_a_notebook_is_done_when_it_returns(group: RuntimeGroup) -> None:
    """A cell runs on a thread whose event loop is not the cell's."""
    cluster = DaskCluster(group, nthreads=1)
    cluster.start(worker_count=1)

    async def cell() -> Any:
        assert not cluster.asynchronous
        ended = cluster.close()
        assert cluster.status is Status.closed
        return ended

    ended = asyncio.run(cell())
    ended._ipython_display_()


def test_the_scheduler_that_is_started_again_is_known_again(group: RuntimeGroup) -> None:
    with DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        assert len(cluster.observed) == 2
        before = cluster.scheduler_info["id"]
        process = cluster._master_launcher.process
        assert process is not None
        process.kill()
        until(lambda: cluster.scheduler_info["id"] != before and len(cluster.observed) == 2, "the next scheduler")
        assert set(cluster.sync(cluster.scheduler_comm.ncores)) == set(cluster.scheduler_info["workers"])


def test_scale_without_a_size_is_refused(group: RuntimeGroup) -> None:
    with DaskCluster(group, nthreads=1) as cluster, pytest.raises(ValueError, match="number of workers"):
        cluster.scale()
