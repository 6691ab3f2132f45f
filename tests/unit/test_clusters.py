"""The contracts of clusters, with launchers that start nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import pickle
import ssl
import tempfile
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from lazycluster.cluster import MasterLauncher, MasterWorkerCluster, WorkerLauncher
from lazycluster.cluster import network as networks
from lazycluster.cluster.direct_network import DirectNetwork
from lazycluster.cluster.engine import Endpoint, Engine
from lazycluster.cluster.exceptions import (
    ClusterError,
    ClusterStartError,
    MasterStartError,
    ServiceError,
    WorkerStartError,
)
from lazycluster.cluster.network import Network, Port, PortSupply, Reach, forwards_needed
from lazycluster.cluster.service_spec import ServiceSpec
from lazycluster.cluster.services import Service, as_kind
from lazycluster.cluster.worker_hosts import WorkerHost
from lazycluster.cluster.worker_launcher import ServiceWorkerLauncher
from lazycluster.core import event_loop
from lazycluster.engines.dask.engine import DaskEngine
from lazycluster.engines.dask.launchers import LocalMasterLauncher, RoundRobinLauncher
from lazycluster.engines.hyperopt.masters import EmbeddedMongoLauncher
from lazycluster.exceptions import ConnectionLostError, NoPortsLeftError, NoRuntimesError, PortInUseError


class Lost:
    """A connection, and a channel of it, whose agent has gone."""

    state = "open"

    async def wait_until_open(self) -> None:
        """It is."""

    async def result(self) -> Any:
        raise ConnectionLostError("host1", "the host was restarted")


class Group:
    """As much of a group as these tests need."""

    def __init__(self, count: int = 3) -> None:
        self.runtime_count = count
        self.runtimes: list[Any] = []
        self.exposed: list[int] = []

    def print_log(self) -> None:
        print("the group's log")

    def expose_port_to_runtimes(self, port: int) -> None:
        self.exposed.append(port)


class Master(MasterLauncher):
    def start(self, ports: Any, timeout: int = 3, debug: bool = False) -> list[int]:
        self.asked = (ports, timeout, debug)
        if isinstance(ports, int):
            self._port = ports
            return []
        self._port = ports[0]
        return list(ports[1:])


class OldMaster(MasterLauncher):
    def start(self, ports: Any, timeout: int = 3) -> list[int]:  # type: ignore[override]
        self._port = ports if isinstance(ports, int) else ports[0]
        return []


class Workers(WorkerLauncher):
    cleaned = 0

    def start(self, worker_count: int, master_port: int, ports: list[int], debug: bool = False) -> list[int]:
        self.asked = (worker_count, master_port, list(ports), debug)
        return ports[worker_count:]

    def cleanup(self) -> None:
        self.cleaned += 1
        super().cleanup()


class BrokenWorkers(Workers):
    def start(self, worker_count: int, master_port: int, ports: list[int], debug: bool = False) -> list[int]:
        raise NoPortsLeftError("none")


def _cluster(*arguments: Any, group: Any = None, **options: Any) -> Any:
    return MasterWorkerCluster(group or Group(), *arguments, **options)


def test_master_and_workers_are_started_with_what_is_documented() -> None:
    group = Group()
    with _cluster([1000, 1001, 1002, 1003, 1004], Master(group), Workers(group), group=group) as cluster:
        assert cluster.master_port is None
        cluster.start()
        default = cluster.DEFAULT_MASTER_PORT
        assert cluster._master_launcher.asked == ([default, 1000, 1001, 1002, 1003, 1004], 3, False)
        assert cluster.master_port == default
        assert cluster._worker_launcher.asked == (3, default, [1000, 1001, 1002, 1003, 1004], False)
        assert cluster._ports == [1003, 1004]
        assert cluster.runtime_group is group
        assert group.exposed == [default]


def test_a_given_port_is_passed_on_as_it_is() -> None:
    with _cluster([1000, 1001, 1002], Master, Workers) as cluster:
        cluster.start(2, 1001, True)
        assert cluster._master_launcher.asked == (1001, 3, True)
        assert cluster._worker_launcher.asked == (2, 1001, [1000, 1002], True)


class Timed(LocalMasterLauncher):
    limit = -1.0

    async def _start(self, ports: Any, limit: float, debug: bool) -> list[int]:
        self.limit = limit
        return []


class TimedDatabase(EmbeddedMongoLauncher):
    limit = -1.0

    async def _start(self, ports: Any, limit: float, debug: bool) -> list[int]:
        self.limit = limit
        return []


@pytest.mark.parametrize("kind", [Timed, TimedDatabase])
def test_a_given_time_out_holds_also_if_it_is_the_number_of_the_default(kind: Any) -> None:
    for timeout in (0, 3, 100, 0.5):
        launcher = kind(Group())
        launcher.start(1000, timeout)
        assert launcher.limit == timeout
        with _cluster(None, launcher, Workers) as cluster:
            cluster.start_master(1000, timeout)
            assert launcher.limit == timeout
    with _cluster(None, launcher, Workers) as cluster:
        launcher.start(1000)
        assert launcher.limit == launcher.START_LIMIT
        launcher.limit = -1.0
        cluster.start_master(1000)
        assert launcher.limit == launcher.START_LIMIT
    for wrong, error in (
        ("3", TypeError),
        (None, TypeError),
        (True, TypeError),
        (-1, ValueError),
        (math.nan, ValueError),
    ):
        launcher = kind(Group())
        with pytest.raises(error, match="timeout must be"):
            launcher.start(1000, wrong)
        assert launcher.limit == -1.0


def test_launchers_of_earlier_documents_take_no_debug() -> None:
    with _cluster(None, OldMaster, Workers) as cluster:
        cluster.start(debug=True)
        assert cluster.master_port == cluster.DEFAULT_MASTER_PORT


def test_a_start_that_fails_is_undone() -> None:
    with _cluster(None, Master, BrokenWorkers) as cluster:
        with pytest.raises(NoPortsLeftError):
            cluster.start()
        assert cluster._worker_launcher.cleaned == 1
        assert cluster.master_port is None
        cluster._worker_launcher = Workers(Group())
        cluster.start()


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="min_workers"):
        _cluster(None, Master, Workers, min_workers=0)
    with pytest.raises(ValueError, match="master_launcher="):
        _cluster()
    with pytest.raises(ValueError, match="empty"):
        _cluster([], Master, Workers)
    with pytest.raises(ValueError, match="65535"):
        _cluster([0], Master, Workers)
    with _cluster(None, Master, Workers, min_workers=3) as cluster:
        for count in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="at least 1"):
                cluster.start(count)
        with pytest.raises(ValueError, match="only 2 workers"):
            cluster.start(2)
    with _cluster(None, Master, Workers, group=Group(0)) as cluster, pytest.raises(NoRuntimesError):
        cluster.start()


def test_the_order_of_calls() -> None:
    with _cluster(None, Master, Workers) as cluster:
        with pytest.raises(ClusterError, match="start_master"):
            cluster.start_workers()
        cluster.start_master()
        with pytest.raises(ClusterError, match="runs already"):
            cluster.start_master()
        cluster.start_workers(1)
        cluster.start_workers(1)
        with pytest.raises(ClusterError, match="cleanup"):
            cluster.start()


def test_cleanup_goes_on_after_an_error() -> None:
    class Stubborn(Workers):
        def cleanup(self) -> None:
            raise RuntimeError("will not")

    cluster = _cluster(None, Master, Stubborn)
    cluster.start()
    with pytest.raises(ClusterError, match="will not"):
        cluster.cleanup()
    assert cluster.master_port is None


def test_default_ports_are_those_that_nobody_takes_by_chance() -> None:
    ports = range(MasterWorkerCluster.DEFAULT_PORT_RANGE_START, MasterWorkerCluster.DEFAULT_PORT_RANGE_END)
    assert not set(ports) & set(range(32768, 61000))
    assert MasterWorkerCluster.DEFAULT_MASTER_PORT not in ports
    assert min(ports) > 1024


# --- ports ---------------------------------------------------------------------------------------
@pytest.fixture
def _free(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    taken: set[int] = set()

    async def free_on_all(ports: Any, connections: Any, *, skip_lost: bool) -> list[int]:
        return [port for port in ports if port not in taken]

    monkeypatch.setattr(networks, "free_on_all", free_on_all)
    return taken


def _take(supply: PortSupply, count: int) -> list[int]:
    return event_loop.run(supply.take(count, []))


def test_ports_are_handed_out_once(_free: set[int]) -> None:
    _free.update({2, 3})
    supply = PortSupply([1, 1, 2, 3, 4, 5])
    assert _take(supply, 2) == [1, 4]
    assert supply.left == [2, 3, 5]
    other = PortSupply([4, 5])
    with pytest.raises(NoPortsLeftError, match="2 ports are needed"):
        _take(other, 2)
    supply.release()
    other.release()
    assert _take(other, 2) == [4, 5]
    other.release()


def test_many_ports_are_asked_for_in_batches(_free: set[int]) -> None:
    _free.update(range(1, 200))
    supply = PortSupply(range(1, 400))
    assert _take(supply, 3) == [200, 201, 202]
    supply.release()


# --- errors --------------------------------------------------------------------------------------
def test_errors_tell_what_happened_and_where() -> None:
    error = WorkerStartError("worker-1", "host", "it ended", exit_status=-9, output="a\nb\n", log_file="/x", hint="do")
    assert str(error).splitlines() == [
        "host: worker-1: it ended (signal 9)",
        "  The end of its output:",
        "  | a",
        "  | b",
        "  All of it: /x",
        "  Next step: do",
    ]
    assert "2 parts" in str(ClusterStartError([error, PortInUseError(5)]))
    assert str(MasterStartError()) == "localhost: master: the master did not start"
    assert "exit status 3" in str(MasterStartError(problem="gone", exit_status=3))


def test_errors_of_processes_take_the_same_arguments_in_the_same_order() -> None:
    general = ServiceError("it", "host", "it ended", exit_status=-9, output="a", log_file="/x", hint="do")
    for kind in (MasterStartError, WorkerStartError):
        error = kind("it", "host", "it ended", exit_status=-9, output="a", log_file="/x", hint="do")
        assert (str(error), vars(error)) == (str(general), vars(general))
        assert vars(as_kind(kind, general)) == vars(general)
        assert type(as_kind(kind, general)) is kind


def test_certificates_are_for_one_cluster_only() -> None:
    pytest.importorskip("cryptography")
    from lazycluster.cluster.certificates import make_credentials

    first, second = make_credentials(), make_credentials()
    assert first.authority != second.authority
    assert "PRIVATE" not in repr(first)
    worker = first.for_role("worker")
    assert worker["require_encryption"] is True
    assert "tls_scheduler_key" not in worker
    assert worker["tls_client_key"] == worker["tls_worker_key"]


def test_certificates_are_valid_by_the_strict_rules() -> None:
    """Those of OpenSSL, which are Python's default since 3.13; only newer versions of distributed turn them off."""
    pytest.importorskip("cryptography")
    from lazycluster.cluster.sent.memory_file import in_memory
    from lazycluster.core.certificates import make_identities

    authority, identities = make_identities("server")
    at_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    at_client = ssl.create_default_context(cadata=authority)
    at_client.verify_flags |= ssl.VERIFY_X509_STRICT
    with in_memory(identities["server"].certificate) as certificate, in_memory(identities["server"].key) as key:
        at_server.load_cert_chain(certificate, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = at_server.wrap_bio(to_server, to_client, server_side=True)
    client = at_client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for side in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.version() == "TLSv1.3"
    assert client.getpeercert()["subject"] == ((("commonName", "lazycluster server"),),)


def test_a_private_key_is_loaded_from_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed meanwhile leaves it behind."""
    pytest.importorskip("cryptography")
    distributed = pytest.importorskip("distributed")
    from lazycluster.cluster.certificates import make_credentials
    from lazycluster.engines.dask.programs.tls import MemorySecurity

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a temporary file")

    for name in ("TemporaryDirectory", "mkdtemp", "mkstemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    security = MemorySecurity(**make_credentials().for_role("worker"))
    elsewhere = pickle.loads(pickle.dumps(security))
    assert type(elsewhere) is distributed.Security  # ours may not be there
    with pytest.raises(AssertionError, match="a temporary file"):
        elsewhere.get_connection_args("worker")
    for same in (security, MemorySecurity.of(elsewhere)):
        assert type(same) is MemorySecurity
        assert same.tls_worker_key == security.tls_worker_key
        before = os.listdir("/proc/self/fd")
        assert same.get_connection_args("worker")["ssl_context"] is not None
        assert same.get_listen_args("worker")["ssl_context"] is not None
        assert len(os.listdir("/proc/self/fd")) == len(before)
    assert MemorySecurity(require_encryption=False).get_connection_args("client")["ssl_context"] is None


def test_a_cluster_that_nobody_refers_to_any_more_ends() -> None:
    ended = threading.Event()

    class Noticed(Workers):
        def cleanup(self) -> None:
            super().cleanup()
            ended.set()

    launcher = Noticed(Group())  # type: ignore[arg-type]
    cluster = _cluster(None, Master, launcher)
    cluster.start()
    del cluster
    gc.collect()
    assert ended.wait(30)
    assert launcher.cleaned == 1


def test_a_cluster_that_was_cleaned_up_is_not_cleaned_up_again_when_it_is_forgotten() -> None:
    cluster = _cluster(None, Master, Workers)
    launcher = cluster._worker_launcher
    cluster.start()
    cluster.cleanup()
    assert not cluster._forgetting.alive
    del cluster
    gc.collect()
    assert launcher.cleaned == 1


def test_a_process_whose_host_cannot_be_prepared_again_fails_whatever_the_error() -> None:
    async def renew(service: Service) -> Any:
        raise RuntimeError("no such place")

    async def whole() -> Service:
        lost: Any = Lost()
        service = Service(ServiceSpec("worker", restarts=2), WorkerHost("host1", lost), "worker 1", renew=renew)
        service._channel, service._was_ready = lost, True
        await service._watch()
        return service

    service = event_loop.run(whole())
    assert service.state == "failed" and "no such place" in service.problem
    assert service.error is not None and service.error.host == "host1"


def test_what_a_worker_prints_without_an_end_is_shown_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    connection: Any = Lost()
    service = Service(ServiceSpec("worker"), WorkerHost("host", connection), "worker 0", debug=True)
    for _ in range(100):
        service._on_output(b"x" * 100_000)
    service._on_output(b"\nlast")
    service._close_log()
    *parts, last = capsys.readouterr().out.splitlines()
    assert "".join(part.removeprefix("[host] ") for part in parts) == "x" * 10_000_000
    assert max(map(len, parts)) < 300_000
    assert last == "[host] last"


@pytest.mark.parametrize("asked", [False, True])
def test_a_worker_process_that_ends_is_told_of_unless_it_was_to_end(
    asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    connection: Any = Lost()
    service = Service(ServiceSpec("worker"), WorkerHost("host", connection), "worker 0")

    async def hear() -> None:
        if asked:
            service.end()
        service._on_event({"state": "message", "event": "respawned", "detail": {"status": 255}})

    asyncio.run(hear())
    assert ("its worker process: it has ended with exit status 255" in caplog.text) is not asked
    assert service.respawns == (0 if asked else 1)


def test_more_workers_than_ports_are_refused_before_any_is_started() -> None:
    class Few(Engine):
        name, cluster = "few", "FewCluster"
        worker_ports = (Port("worker"), Port("nanny", Reach.MANAGER))

        def master(self, at: Endpoint) -> ServiceSpec:
            raise AssertionError("nothing is to be started")

        def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
            raise AssertionError("nothing is to be started")

    launcher: Any = ServiceWorkerLauncher(cast("Any", Group()), Few())
    with pytest.raises(NoPortsLeftError, match="100000 workers need 200000 ports, but only 3 may be used"):
        launcher.start(100_000, 1000, [1001, 1002, 1003])
    with pytest.raises(NoPortsLeftError, match="2 workers need 4 ports"):
        event_loop.run(launcher.scale(2, 1000, [1001, 1002, 1003]))
    launcher.check_ports(1, [1001, 1002])


def test_how_many_ports_are_forwarded() -> None:
    uses = DaskEngine.worker_ports
    assert forwards_needed(uses, workers=1, hosts=1) == 3
    assert forwards_needed(uses, workers=64, hosts=64) == 64 * (64 + 2)
    assert forwards_needed([Port("own", Reach.LOCAL)], workers=10, hosts=10) == 0


@pytest.mark.parametrize(
    ("network", "workers", "said"), [("tunnel", 60, True), ("tunnel", 2, False), ("direct", 60, False)]
)
def test_many_forwarded_ports_are_announced(
    network: Any, workers: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = RoundRobinLauncher(Group())
    launcher.use(Network(DirectNetwork(network)))
    launcher._warn_of_forwards(workers, workers)
    assert ('network="auto"' in caplog.text) is said


def test_options_that_cannot_be_sent_are_refused_at_once() -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    group: Any = Group()
    for name in ("worker_options", "scheduler_options"):
        with pytest.raises(ValueError, match=f"{name}: 'plugins' cannot be sent"):
            DaskCluster(group, **{name: {"preload": "x.py", "plugins": [object()]}})
    cluster = DaskCluster(group, local_directory=Path("/scratch"))
    assert cluster._dask.local_directory == "/scratch"
