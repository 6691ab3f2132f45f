"""A Dask cluster on real SSH hosts, through tunnels only."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from cluster_groups import ssh_group

from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.exceptions import ClusterError, ClusterStartError
from lazycluster.exceptions import TaskExecutionError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this module

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def group(module_hosts: Any) -> Iterator[RuntimeGroup]:
    with ssh_group(module_hosts) as group:
        yield group


@pytest.fixture(scope="module")
def cluster(group: RuntimeGroup) -> Iterator[DaskCluster]:
    with DaskCluster(group) as cluster:
        cluster.start()
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: DaskCluster) -> Iterator[Any]:
    with cluster.get_client(timeout=10) as client:
        yield client


def _workers(client: Any) -> dict[str, dict[str, Any]]:
    return {info["name"]: info for info in client.scheduler_info(n_workers=-1)["workers"].values()}


def _hostname() -> str:
    return socket.gethostname()


def test_every_host_has_a_worker_that_works(client: Any, cluster: DaskCluster) -> None:
    assert sorted(_workers(client)) == ["host1-0", "host2-0", "host3-0"]
    assert sum(client.gather(client.map(lambda x: x * x, range(1000)))) == 332833500
    assert len(set(client.run(_hostname).values())) == 3
    ports = [port for listed in cluster._worker_launcher.ports_per_host.values() for port in listed]
    assert len(set(ports)) == 3


def test_everything_listens_on_loopback_only(client: Any, cluster: DaskCluster, module_hosts: Any) -> None:
    for info in client.scheduler_info(n_workers=-1)["workers"].values():
        assert info["host"] == "127.0.0.1"
        assert info["nanny"].startswith("tls://127.0.0.1:")
    assert cluster.scheduler_address == f"tls://127.0.0.1:{cluster.master_port}"


def test_a_dataframe_is_shuffled_between_the_hosts(client: Any) -> None:
    dd = pytest.importorskip("dask.dataframe")
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"key": [i % 97 for i in range(20000)], "value": range(20000)})
    shuffled = dd.from_pandas(frame, npartitions=12).shuffle("key", shuffle_method="p2p")
    sums = shuffled.groupby("key").value.sum().compute()
    assert sums.sort_index().equals(frame.groupby("key").value.sum().sort_index().astype(sums.dtype))


def test_workers_send_each_other_results(client: Any) -> None:
    names = sorted(_workers(client))
    parts = [client.submit(bytes, 300_000, workers=[name], pure=False) for name in names]
    total = client.submit(lambda *all: sum(map(len, all)), *parts, workers=[names[0]])
    assert total.result(timeout=30) == 900_000


def test_tasks_can_have_clients_of_their_own(client: Any) -> None:
    def nested() -> int:
        from distributed import worker_client

        with worker_client() as inner:
            return sum(inner.gather(inner.map(lambda x: x + 1, range(5))))

    assert client.submit(nested).result(timeout=30) == 15


def test_tracebacks_of_tasks_show_files_and_lines(client: Any) -> None:
    """Of functions that the client sends, of those that come from another worker, and of those that are sent twice."""

    def fail() -> None:
        raise LookupError("here")

    def made() -> Callable[[], None]:
        def inner() -> None:
            raise LookupError("inside")

        return inner

    one, other = sorted(_workers(client))[:2]
    inner = client.submit(made, workers=[one], pure=False)
    nowhere = client.submit(lambda function: function(), inner, workers=[other], pure=False)
    returned = client.submit(inner.result(timeout=30), pure=False)
    futures = [(client.submit(fail), "here"), (nowhere, "inside"), (returned, "inside")]
    for future, word in futures:
        with pytest.raises(LookupError, match=word) as caught:
            future.result(timeout=30)
        text = "".join(traceback.format_exception(caught.value))
        assert re.search(rf'File "{re.escape(__file__)}", line \d+, in (fail|inner)\n', text)
        assert f'raise LookupError("{word}")' in text


def test_restart_gives_new_worker_processes(client: Any) -> None:
    before = set(client.run(os.getpid).items())
    client.restart(timeout=30)
    after = set(client.run(os.getpid).items())
    assert len(after) == 3
    assert not before & after


def test_a_restart_that_was_asked_for_is_no_news(
    client: Any, cluster: DaskCluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a worker that has to be killed, since it does something: that says nothing of memory."""
    events = len(cluster.events)
    restarts = {status.name: status.restarts for status in cluster.workers}
    logged = [len(worker.service.last_output(1 << 20)) for worker in cluster._worker_launcher.workers]
    busy = client.submit(lambda: time.sleep(3600), pure=False)
    _until(lambda: any(client.processing().values()))
    client.restart(timeout=60)
    assert busy.status == "cancelled"
    assert client.submit(lambda: 3, pure=False).result(timeout=30) == 3
    assert cluster.events[events:] == []
    assert {status.name: status.restarts for status in cluster.workers} == restarts
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    for worker, before in zip(cluster._worker_launcher.workers, logged, strict=True):
        assert "Restarting worker" not in worker.service.last_output(1 << 20)[before:]


def test_restarted_workers_do_not_draw_the_same_random_numbers(client: Any) -> None:
    def draw() -> float:
        import numpy

        return float(numpy.random.random())

    before = set(client.run(draw).values())
    client.restart(timeout=30)
    assert not before & set(client.run(draw).values())


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_killed_worker_comes_back(client: Any) -> None:
    address, info = next(iter(client.scheduler_info(n_workers=-1)["workers"].items()))
    old = client.run(os.getpid, workers=[address])[address]
    client.run(lambda: os.kill(os.getpid(), signal.SIGKILL), workers=[address], on_error="ignore")
    _until(lambda: client.run(os.getpid, on_error="ignore").get(address, old) != old)
    assert client.submit(lambda: 7, workers=[info["name"]], pure=False).result(timeout=20) == 7


def test_a_killed_nanny_comes_back(client: Any, cluster: DaskCluster, group: RuntimeGroup) -> None:
    worker = cluster._worker_launcher.workers[1]
    old = worker.service.pid
    group.runtimes[1].call(os.kill, old, signal.SIGKILL)
    _until(lambda: worker.service.pid != old and worker.service.state == "ready")
    assert worker.service.restarts == 1
    assert client.submit(lambda: 8, workers=[worker.name], pure=False).result(timeout=20) == 8


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_dashboards_are_there_for_those_who_know_their_path(client: Any, cluster: DaskCluster) -> None:
    assert client.dashboard_link == cluster.dashboard_link
    assert _status(cluster.dashboard_link) == 200
    secret = cluster.dashboard_link.split("/")[3]
    for worker in cluster._worker_launcher.workers:
        root = f"http://127.0.0.1:{worker.ports['dashboard']}"
        assert _status(f"{root}/{secret}/status") == 200
        for path in ("status", "sitemap.json", "health", "metrics", ""):
            assert _status(f"{root}/{path}") == 404
    root = cluster.dashboard_link.split(secret)[0]
    for path in ("status", "sitemap.json", "health", "metrics", "json/identity.json", ""):
        assert _status(root + path) == 404


def _accepts(port: int, context: ssl.SSLContext | None) -> bool:
    """Whether a port answers Dask's handshake to somebody without the cluster's certificate."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            talk = context.wrap_socket(plain) if context else plain
            talk.settimeout(2)
            talk.sendall(b"\0" * 64)
            return bool(talk.recv(1) and context)
        except (OSError, ssl.SSLError):
            return False


def test_no_port_talks_to_strangers(client: Any, cluster: DaskCluster) -> None:
    stranger = ssl.create_default_context()
    stranger.check_hostname = False
    stranger.verify_mode = ssl.CERT_NONE
    ports = [cluster.master_port]
    ports += [worker.ports[use] for worker in cluster._worker_launcher.workers for use in ("worker", "nanny")]
    for port in ports:
        assert not _accepts(port, stranger)


def test_two_clusters_on_the_same_hosts(group: RuntimeGroup, client: Any) -> None:
    with DaskCluster(group) as other:
        other.start(worker_count=2)
        with other.get_client(timeout=10) as second:
            assert second.submit(lambda: 1).result(timeout=20) == 1
            assert client.submit(lambda: 2).result(timeout=20) == 2
            assert len(_workers(second)) == 2


@pytest.mark.keeps("manager")  # its tunnels last as long as the cluster
def test_more_workers_can_be_started(group: RuntimeGroup, cluster: DaskCluster, client: Any) -> None:
    cluster.start_workers(1)
    client.wait_for_workers(4, timeout=20)
    assert "host1-1" in _workers(client)
    assert client.submit(lambda: 3, workers=["host1-1"], pure=False).result(timeout=20) == 3


def test_what_does_not_fit_in_memory_goes_where_nobody_else_may_write(group: RuntimeGroup, module_hosts: Any) -> None:
    """It is unpickled when it is wanted again."""
    for host in module_hosts:
        host.run("chmod 711 /home/lazy && mkdir -p -m 777 /home/lazy/open && mkdir -p -m 1777 /home/lazy/all")
    with (
        DaskCluster(group, local_directory="/home/lazy/open") as cluster,
        pytest.raises(
            ClusterStartError,
            match=r"local_directory /home/lazy/open cannot be used: /home/lazy/open: everybody may write",
        ),
    ):
        cluster.start()
    with DaskCluster(group, local_directory="/home/lazy/all") as cluster:
        cluster.start()
        with cluster.get_client(timeout=10) as client:
            places = client.run(lambda dask_worker: dask_worker.local_directory)
            modes = client.run(
                lambda dask_worker: os.stat(os.path.dirname(dask_worker.local_directory)).st_mode & 0o777
            )
    assert all(path.startswith("/home/lazy/all/dask-scratch-space-") for path in places.values())
    assert set(modes.values()) == {0o700}


def test_workers_are_named_by_their_host(client: Any, group: RuntimeGroup) -> None:
    """In all ways in which a client takes workers; one worker more on a host is no trouble."""
    import dask

    for host in group.hosts:
        assert client.submit(socket.gethostname, workers=[host], pure=False).result(timeout=30) == host
    assert set(client.gather(client.map(lambda _: socket.gethostname(), range(8), workers="host2", pure=False))) == {
        "host2"
    }
    assert client.compute(dask.delayed(socket.gethostname)(), workers=["host3"]).result(timeout=30) == "host3"
    with dask.annotate(workers=["host2"]):
        assert client.compute(dask.delayed(socket.gethostname)(), optimize_graph=False).result(timeout=30) == "host2"
    assert set(client.run(socket.gethostname, workers=["host1"]).values()) == {"host1"}
    assert set(client.run(socket.gethostname, workers=["host1-0", "host3"]).values()) == {"host1", "host3"}
    holders = client.who_has(client.scatter([1, 2, 3], workers=["host2"]))
    on_host2 = {address for address, name in client.run(socket.gethostname).items() if name == "host2"}
    assert {address for found in holders.values() for address in found} <= on_host2


def test_a_directory_in_the_home_of_the_host(group: RuntimeGroup, module_hosts: Any) -> None:
    with DaskCluster(group, local_directory="~/scratch") as cluster:
        cluster.start(1)
        with cluster.get_client(timeout=10) as client:
            (place,) = client.run(lambda dask_worker: dask_worker.local_directory).values()
    assert place.startswith("/home/lazy/scratch/dask-scratch-space-")
    with (
        DaskCluster(group, local_directory="~nobody-of-that-name/x") as cluster,
        pytest.raises(ClusterError, match="local_directory ~nobody-of-that-name/x cannot be used"),
    ):
        cluster.start(1)
    module_hosts[0].run("rm -rf /home/lazy/scratch")


def test_errors_about_files_say_whose_they_are(client: Any, group: RuntimeGroup, tmp_path: Path) -> None:
    """Paths are those of the worker's host, also where the user means a file of the manager."""
    here, nowhere = tmp_path / "train.csv", tmp_path / "nowhere.csv"
    here.write_text("a,b")
    hint = r" on host2 \(this machine has that file, but functions see the files of their host: .*\): "
    with pytest.raises(FileNotFoundError, match=hint) as caught:
        client.submit(open, str(here), workers=["host2"], pure=False).result(timeout=30)
    assert caught.value.filename == str(here)
    with pytest.raises(FileNotFoundError, match=hint):
        client.run(open, str(here), workers=["host2"])
    with pytest.raises(FileNotFoundError, match=r"directory on host2: '.*nowhere"):
        client.submit(open, str(nowhere), workers=["host2"], pure=False).result(timeout=30)
    with pytest.raises(PermissionError, match="Permission denied on host2"):
        client.submit(open, "/etc/shadow", workers=["host2"], pure=False).result(timeout=30)
    with pytest.raises(TaskExecutionError, match="this machine has that file"):
        group.call(open, str(here))
    with pytest.raises(FileNotFoundError) as caught:
        list(group.map(open, [str(here)]))
    assert "this machine has that file" in str(caught.value.__cause__)
