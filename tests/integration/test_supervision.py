"""What a cluster keeps running is watched, started again, and says how it does, or that it cannot go on."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from cluster_groups import connect, local_group
from distributed import CancelledError, Client, Status

from lazycluster.cluster.dask_cluster import DaskCluster, LocalMasterLauncher, RoundRobinLauncher
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.health import ClusterEvent
from lazycluster.ssh import workspace
from patience import until
from sshhosts import procfs

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_PATIENCE = 90.0  # seconds, on a loaded machine


class Events:
    """The events of a cluster, as they come."""

    def __init__(self, cluster: DaskCluster) -> None:
        self._queue: queue.Queue[ClusterEvent] = queue.Queue()
        self.forget = cluster.on_event(self._queue.put)

    def wait_for(self, kind: str, name: str = "") -> ClusterEvent:
        seen = []
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                event = self._queue.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no event {kind!r} of {name!r}; there were: {[str(one) for one in seen]}")
            seen.append(event)
            if event.kind == kind and name in event.name:
                return event


@pytest.fixture
def client_of() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        yield lambda cluster: stack.enter_context(contextlib.closing(cluster.get_client()))


def test_a_scheduler_that_is_killed_comes_back_and_says_what_is_lost(hosts: Any, client_of: Any) -> None:
    with connect(hosts.config_file, hosts.names[:2]) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        client: Client = client_of(cluster)
        events = Events(cluster)
        address, before = cluster.scheduler_address, cluster.master
        assert before is not None and before.pid is not None
        running = client.submit(time.sleep, 600, pure=False)
        os.kill(before.pid, signal.SIGKILL)
        # Who waits is told soon, and not left waiting.
        with pytest.raises(CancelledError):
            running.result(timeout=_PATIENCE)
        lost = events.wait_for("restarting", "dask-scheduler")
        assert "submit them again" in lost.detail and "SIGKILL" in lost.detail
        events.wait_for("ready", "dask-scheduler")
        # The same client, the same address, the workers that were there.
        client.wait_for_workers(2, timeout=_PATIENCE)
        assert client.submit(sum, [1, 2, 3], pure=False).result(timeout=_PATIENCE) == 6
        assert cluster.scheduler_address == address
        assert cluster.status is Status.running
        after = cluster.master
        assert after is not None and after.pid != before.pid
        assert (after.state, after.restarts, after.last_exit) == ("ready", 1, -signal.SIGKILL)
        names = sorted(worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
        assert names == ["host1-0", "host2-0"]
        assert [str(event) for event in cluster.events if event.kind == "restarting" and "scheduler" in event.name]
        events.forget()


@pytest.mark.soak
def test_a_scheduler_whose_keeper_is_killed_comes_back_under_the_next_one(hosts: Any, client_of: Any) -> None:
    with connect(hosts.config_file, hosts.names[:2]) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        client: Client = client_of(cluster)
        events = Events(cluster)
        [space] = workspace._spaces.values()
        address, keeper, before = cluster.scheduler_address, space.keeper.agent_info.pid, cluster.master
        assert before is not None
        running = client.submit(time.sleep, 600, pure=False)
        os.kill(keeper, signal.SIGKILL)
        with pytest.raises(CancelledError):
            running.result(timeout=_PATIENCE)
        lost = events.wait_for("restarting", "dask-scheduler")
        assert "the keeper on this machine was lost" in lost.detail and "submit them again" in lost.detail
        events.wait_for("ready", "dask-scheduler")
        client.wait_for_workers(2, timeout=_PATIENCE)
        assert client.submit(sum, [1, 2, 3], pure=False).result(timeout=_PATIENCE) == 6
        after = cluster.master
        assert after is not None and after.pid != before.pid
        assert (cluster.scheduler_address, cluster.status) == (address, Status.running)
        assert (after.state, after.restarts, space.keeper.generation) == ("ready", 1, 2)
        # And it is in the care of that one.
        assert after.pid in {found.pid for found in procfs.descendants(space.keeper.agent_info.pid)}
        events.forget()


def test_a_worker_that_is_killed_is_told_of(client_of: Any) -> None:
    with local_group(1) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        events = Events(cluster)
        client = client_of(cluster)
        [before] = cluster.workers
        assert (before.state, before.host, before.restarts, before.last_exit) == ("ready", "local0", 0, None)
        assert before.pid is not None
        inner = client.submit(os.getpid, pure=False).result(timeout=_PATIENCE)
        os.kill(inner, signal.SIGKILL)
        assert "SIGKILL" in events.wait_for("respawned", "dask-worker").detail
        assert client.submit(sum, [4], pure=False).result(timeout=_PATIENCE) == 4
        # The nanny itself: everything below it ends, and is started again.
        os.kill(before.pid, signal.SIGKILL)
        events.wait_for("restarting", "dask-worker")
        events.wait_for("ready", "dask-worker")
        assert client.submit(sum, [5], pure=False).result(timeout=_PATIENCE) == 5
        [after] = cluster.workers
        assert (after.state, after.restarts, after.last_exit) == ("ready", 2, -signal.SIGKILL)
        assert after.pid != before.pid
        assert "Start worker at" in after.log
        assert "log=" not in repr(after)
        client.shutdown()
        events.wait_for("ended", "dask-worker")


def test_a_nanny_that_cannot_start_its_worker_again_is_started_anew(client_of: Any) -> None:
    """It would end as if somebody had asked it to."""

    def is_bound(port: int) -> bool:
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return True
        return False

    with local_group(1) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        events = Events(cluster)
        client = client_of(cluster)
        [address] = client.scheduler_info(n_workers=-1)["workers"]
        inner = client.submit(os.getpid, pure=False).result(timeout=_PATIENCE)
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            os.kill(inner, signal.SIGKILL)
            until(lambda: is_bound(int(address.rpartition(":")[2])), "the port of the worker")
            taken.listen()
            events.wait_for("restarting", "dask-worker")
        events.wait_for("ready", "dask-worker")
        assert client.submit(sum, [5], pure=False).result(timeout=_PATIENCE) == 5
        events.forget()


def test_a_scheduler_that_dies_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalMasterLauncher, "RESTARTS", 1)
    with local_group(1) as group, DaskCluster(group) as cluster:
        cluster.start()
        events = Events(cluster)
        for kind in ("ready", "failed"):
            assert cluster.master is not None and cluster.master.pid is not None
            os.kill(cluster.master.pid, signal.SIGKILL)
            events.wait_for(kind, "dask-scheduler")
        assert cluster.master.state == "failed"
        assert cluster.status is Status.failed
        for use in (cluster.get_client, lambda: cluster.scheduler_address, lambda: cluster.dashboard_link):
            with pytest.raises(ClusterError, match=r"after 1 restarts(?s:.)*call cleanup\(\), then start\(\)"):
                use()
        cluster.cleanup()
        cluster.start()
        assert cluster.status is Status.running


def test_workers_that_die_for_good(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(RoundRobinLauncher, "RESTARTS", 0)
    with local_group(2) as group, DaskCluster(group) as cluster:
        cluster.start()
        events = Events(cluster)
        first, second = cluster.workers
        os.kill(first.pid or 0, signal.SIGKILL)
        assert first.name in events.wait_for("failed").name
        assert cluster.status is Status.running
        assert [worker.state for worker in cluster.workers] == ["failed", "ready"]
        os.kill(second.pid or 0, signal.SIGKILL)
        events.wait_for("failed")
        assert cluster.status is Status.failed
        with pytest.raises(ClusterError, match="no worker is left"):
            cluster.get_client()
    assert second.name in caplog.text


def test_a_callback_that_fails_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with local_group(1) as group, DaskCluster(group) as cluster:
        with pytest.raises(TypeError, match="callable"):
            cluster.on_event("print")  # type: ignore[arg-type]
        called = threading.Event()

        def broken(event: ClusterEvent) -> None:
            called.set()
            raise RuntimeError("of the user's")

        cluster.on_event(broken)
        forget = cluster.on_event(lambda event: pytest.fail("it was forgotten"))
        forget()
        forget()
        cluster.start()
        assert called.wait(_PATIENCE)
        assert {"ready"} == {event.kind for event in cluster.events}
    assert "of the user's" in caplog.text
