"""Starts and ends of a Dask cluster: those that fail, those that are interrupted, those that are unusual."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from cluster_groups import connect, local_group, ssh_group
from distributed import Client, Status

import leaks
from lazycluster import RuntimeGroup
from lazycluster.cluster import MasterLauncher, WorkerLauncher
from lazycluster.cluster.dask_cluster import DaskCluster, LocalMasterLauncher, RoundRobinLauncher
from lazycluster.cluster.exceptions import ClusterError, MasterStartError, VersionMismatchError
from lazycluster.exceptions import NoPortsLeftError, PortInUseError

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def group() -> Iterator[RuntimeGroup]:
    with local_group(2) as group:
        yield group


def _programs() -> list[int]:
    return [process.pid for process in leaks.running("lazycluster_dask")]


def _command_line(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def _taken(port: int) -> Iterator[None]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(1)
        yield


def test_the_life_of_a_cluster(group: RuntimeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = DaskCluster(group, nthreads=1, memory_limit="500 MB", resources={"lanes": 2})
    assert cluster.status is Status.created
    assert cluster.master_port is None
    with pytest.raises(ClusterError, match=r"call start\(\)"):
        cluster.get_client()
    cluster.start(worker_count=3)
    assert cluster.status is Status.running
    assert cluster.master_port == DaskCluster.DEFAULT_MASTER_PORT
    with pytest.raises(ClusterError, match="cleanup"):
        cluster.start()
    process = cluster._master_launcher.process
    assert process is not None
    assert process.poll() is None
    os.kill(process.pid, 0)
    with cluster.get_client(timeout=10) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert sorted(info["name"] for info in workers) == ["local0-0", "local0-1", "local1-0"]
        assert {info["nthreads"] for info in workers} == {1}
        assert {info["memory_limit"] for info in workers} == {500_000_000}
        assert {str(info["resources"]) for info in workers} == {"{'lanes': 2}"}
    cluster.print_log()
    assert "Registered to" in capsys.readouterr().out
    cluster.cleanup()
    cluster.cleanup()
    assert cluster.status is Status.closed
    assert process.wait(1) == 0
    assert cluster.master_port is None
    assert _programs() == []
    with pytest.raises(ClusterError, match="was ended"):
        cluster.get_client()


def test_a_client_of_the_cluster_itself_can_shut_it_down(group: RuntimeGroup) -> None:
    cluster = DaskCluster(group)
    cluster.start(worker_count=1)
    client = Client(cluster)
    assert client.submit(lambda: 4).result(timeout=20) == 4
    client.shutdown()
    assert cluster.status is Status.closed
    assert _programs() == []


def test_a_scheduler_that_is_killed_is_noticed(
    group: RuntimeGroup, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalMasterLauncher, "RESTARTS", 0)  # it is started again otherwise: see test_supervision.py
    with DaskCluster(group) as cluster:
        cluster.start(worker_count=1)
        process = cluster._master_launcher.process
        assert process is not None
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        assert cluster.status is Status.failed
        with pytest.raises(ClusterError, match="dask-scheduler"):
            cluster.get_client()
    assert "dask-scheduler" in caplog.text


@pytest.mark.soak
def test_a_client_that_meets_a_scheduler_at_its_end_gets_the_next_one(
    group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Client._update_scheduler_info

    async def ask_a_dying_one(client: Client, *arguments: Any, **options: Any) -> None:  # it has connected before
        monkeypatch.undo()
        os.kill(pid, signal.SIGKILL)
        await ask(client, *arguments, **options)

    with DaskCluster(group) as cluster:
        cluster.start(worker_count=1)
        process = cluster._master_launcher.process
        assert process is not None
        pid = process.pid
        monkeypatch.setattr(Client, "_update_scheduler_info", ask_a_dying_one)
        with cluster.get_client(timeout=60) as client:
            assert client.submit(lambda: 4).result(timeout=60) == 4
        assert cluster.master is not None and cluster.master.restarts == 1


def test_no_secret_is_in_sight(group: RuntimeGroup) -> None:
    with DaskCluster(group) as cluster:
        cluster.start(worker_count=1)
        secret = cluster.dashboard_link.split("/")[3].encode()
        seen = [_command_line(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        environments = [Path("/proc", str(pid), "environ").read_bytes() for pid in _programs()]
        assert environments
        for text in [*seen, *environments, repr(cluster).encode(), repr(vars(cluster)).encode()]:
            assert b"PRIVATE KEY" not in text
            assert secret not in text
        with cluster.get_client(timeout=20) as client:
            kinds = client.run(lambda dask_worker: type(dask_worker.security).__name__)
            kinds |= client.run(lambda dask_worker: type(dask_worker.security).__name__, nanny=True)
            kinds["scheduler"] = client.run_on_scheduler(lambda dask_scheduler: type(dask_scheduler.security).__name__)
            assert {*kinds.values(), type(client.security).__name__} == {"MemorySecurity"}


def test_it_can_be_started_anew(group: RuntimeGroup) -> None:
    cluster = DaskCluster(group)
    for _ in range(2):
        cluster.start(worker_count=1)
        with cluster.get_client(timeout=10) as client:
            assert client.submit(lambda: 4).result(timeout=20) == 4
        cluster.cleanup()


# --- ports ---------------------------------------------------------------------------------------
def test_a_given_port_that_is_taken_is_an_error(group: RuntimeGroup) -> None:
    with _taken(23456), DaskCluster(group) as cluster:
        with pytest.raises(PortInUseError) as caught:
            cluster.start(master_port=23456)
        assert caught.value.port == 23456
    assert _programs() == []


def test_the_default_port_gives_way_if_it_is_taken(group: RuntimeGroup) -> None:
    with _taken(DaskCluster.DEFAULT_MASTER_PORT), _taken(25000), DaskCluster(group) as cluster:
        cluster.start_master()
        assert cluster.master_port == 25001


def test_too_few_ports(group: RuntimeGroup) -> None:
    with DaskCluster(group, ports=[23000, 23001, 23002]) as cluster, pytest.raises(NoPortsLeftError, match="ports="):
        cluster.start()
    assert _programs() == []
    with pytest.raises(ValueError, match="from 1 to 65535"):
        DaskCluster(group, ports=[70000])


def test_ports_taken_between_check_and_use(group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazycluster.cluster import network

    async def blind(ports: Any, connections: Any, *, skip_lost: bool) -> list[int]:
        return list(ports)

    monkeypatch.setattr(network, "free_on_all", blind)
    with _taken(DaskCluster.DEFAULT_MASTER_PORT), _taken(25001), _taken(25005), DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=10) as client:
            assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
            assert client.submit(lambda: 4).result(timeout=20) == 4


# --- what goes wrong -----------------------------------------------------------------------------
def test_a_worker_that_cannot_start_is_an_error_with_its_own_output(group: RuntimeGroup) -> None:
    began = time.monotonic()
    cluster = DaskCluster(group, worker_options={"preload": ["no_such_module_anywhere"]})
    with cluster, pytest.raises(ClusterError) as caught:
        cluster.start()
    assert "no_such_module_anywhere" in str(caught.value)
    assert "local0" in str(caught.value)
    assert time.monotonic() - began < 30
    assert _programs() == []


def test_a_scheduler_that_cannot_start_is_an_error_with_its_own_output(group: RuntimeGroup) -> None:
    cluster = DaskCluster(group, scheduler_options={"no_such_option": 1})
    with cluster, pytest.raises(MasterStartError) as caught:
        cluster.start_master()
    assert "no_such_option" in caught.value.output
    assert caught.value.exit_status == 1
    assert Path(str(caught.value.log_file)).exists()


def test_a_short_time_out_is_honoured(group: RuntimeGroup) -> None:
    with DaskCluster(group) as cluster, pytest.raises(MasterStartError, match="not ready within"):
        cluster.start_master(timeout=0.05)  # type: ignore[arg-type]
    assert _programs() == []


def test_workers_need_a_master(group: RuntimeGroup) -> None:
    with DaskCluster(group) as cluster, pytest.raises(ClusterError, match="start_master"):
        cluster.start_workers()


_UNCHECKED = """
import sys
from lazycluster.cluster.sent import messages
from lazycluster.engines.dask.programs import scheduler
messages.check_ports = lambda ports, hosts: None  # as if the port had been free then
scheduler.main()
"""


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_port_that_is_taken_when_the_scheduler_has_looked_already(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", _UNCHECKED],
        env={**os.environ, "LAZYCLUSTER_SCRATCH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            for port, expected in ((taken.getsockname()[1], "port_taken"), (_port(), "ready")):
                settings = {
                    "prefix": "x",
                    "modules": "",
                    "protocol": "tcp",
                    "security": {},
                    "options": {},
                    "configuration": {},
                }
                ports = {"master": port, "dashboard": _port()}
                settings |= {"hosts": {"master": "127.0.0.1"}, "address": "127.0.0.1"}
                program.stdin.write(json.dumps({**settings, "ports": ports}) + "\n")
                program.stdin.flush()
                told = next(line for line in program.stdout if '"event"' in line and '"versions"' not in line)
                assert expected in told
                assert str(port) in told
    finally:
        program.kill()
        program.communicate()


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """An interpreter of the manager's version without any package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return str(tmp_path / "bare" / "bin" / "python")


def test_dask_missing_on_a_host_is_an_error_with_a_table(bare_python: str) -> None:
    with local_group(1, python=bare_python) as group, DaskCluster(group) as cluster:
        with pytest.raises(VersionMismatchError) as caught:
            cluster.start()
        assert caught.value.hosts == ["local0"]
        assert 'RuntimeGroup(..., environment="manager")' in str(caught.value)
        assert f"{bare_python} -m pip install dask==" in str(caught.value)
        assert re.search(r"\n  local0 +3\.\d+ +- +- +-\n", str(caught.value))
        assert "if you know better" not in str(caught.value)
        assert cluster.master_port is None


def test_other_versions_can_be_accepted(group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from lazycluster.cluster import versions

    monkeypatch.setattr(versions, "versions_here", lambda _: {"dask": "1.0", "distributed": "1.0"})
    with DaskCluster(group) as cluster, pytest.raises(VersionMismatchError, match=r"manager +3\.\d+ +1\.0"):
        cluster.start()
    with DaskCluster(group, check_versions="warn") as cluster:
        cluster.start(worker_count=1)
    assert "does not match" in caplog.text


def test_missing_packages_on_the_manager_are_named(group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazycluster.cluster import versions

    monkeypatch.setattr(versions, "_is_here", lambda name: False)
    with pytest.raises(ClusterError, match=r"pip install .*'dask\[distributed\]>="):
        DaskCluster(group)


def test_a_dead_host_and_min_workers(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    with ssh_group(hosts, connection_kwargs={"link_timeout": 3}) as group:
        hosts[1].power_off()
        deadline = time.monotonic() + 30
        while group.runtimes[1]._connection.state == "open" and time.monotonic() < deadline:
            time.sleep(0.05)
        with DaskCluster(group) as cluster, pytest.raises(ClusterError, match="host2"):
            cluster.start()
        with DaskCluster(group, min_workers=1) as cluster:
            cluster.start()
            with cluster.get_client(timeout=10) as client:
                assert [i["name"] for i in client.scheduler_info(n_workers=-1)["workers"].values()] == ["host1-0"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"memory_limit": "4 pineapples"}, "4 pineapples"),
        ({"resources": {"GPU": "one"}}, "GPU"),
        ({"nthreads": 0}, "nthreads"),
        ({"nthreads": True}, "nthreads"),
        ({"min_workers": 0}, "min_workers"),
        ({"check_versions": "no"}, "check_versions"),
        ({"ports": []}, "ports"),
    ],
)
def test_options_that_make_no_sense(group: RuntimeGroup, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DaskCluster(group, **options)


def test_more_workers_wanted_than_asked_for(group: RuntimeGroup) -> None:
    with DaskCluster(group, min_workers=3) as cluster, pytest.raises(ValueError, match="min_workers is 3, but only 2"):
        cluster.start()
    assert _programs() == []


@pytest.mark.soak
def test_a_host_that_is_lost_while_the_cluster_runs(make_hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    hosts = make_hosts(3)
    with ssh_group(hosts, connection_kwargs={"reconnect": 2}) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            futures = client.map(lambda number: number * 2, range(60), pure=False)
            hosts[2].power_off()
            futures += client.map(lambda number: number * 2, range(60), pure=False)
            assert sum(client.gather(futures)) == 2 * sum(range(0, 120, 2))
            deadline = time.monotonic() + 60
            while "2 workers" not in repr(cluster) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert "2 workers" in repr(cluster)
            said = [record for record in caplog.records if record.levelname == "ERROR" and "host3" in record.message]
            assert "the connection was lost" in said[0].message
            assert cluster.status is Status.running
            cluster.start_workers(2)  # on those that are left
            assert client.submit(sum, [1, 2]).result(timeout=30) == 3


@pytest.mark.soak
def test_two_names_of_one_machine(make_hosts: Any, tmp_path: Path) -> None:
    hosts = make_hosts(2)
    config = Path(hosts.config_file).read_text()
    block = next(block for block in config.split("\n\n") if block.startswith("Host host1\n"))
    (tmp_path / "config").write_text(config + "\n" + block.replace("Host host1", "Host alias") + "\n")
    with connect(str(tmp_path / "config"), ["host1", "alias", "host2"]) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            part = client.submit(bytes, 300_000, workers=["alias-0"], pure=False)
            assert client.submit(len, part, workers=["host2-0"], pure=False).result(timeout=30) == 300_000
            part = client.submit(bytes, 300_000, workers=["host2-0"], pure=False)
            assert client.submit(len, part, workers=["host1-0"], pure=False).result(timeout=30) == 300_000


def test_what_tasks_print_is_in_the_log_at_once(group: RuntimeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    with DaskCluster(group) as cluster:
        cluster.start(worker_count=1)
        with cluster.get_client(timeout=20) as client:
            client.submit(lambda: print("printed by a task"), pure=False).result(timeout=20)
            deadline = time.monotonic() + 20
            while "printed by a task" not in capsys.readouterr().out:
                assert time.monotonic() < deadline
                cluster.print_log()


def test_an_environment_that_set_up_lines_make(hosts: Any) -> None:
    lines = f"export PATH={Path(sys.executable).parent}:$PATH\nexport GREETING='hello there'"
    options = {"config_file": hosts.config_file}
    group = RuntimeGroup(hosts=["host1"], connection_kwargs=options, setup=lines, env={"OWN": "1"})
    with group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            seen = client.submit(lambda: (os.environ["GREETING"], os.environ["OWN"])).result(timeout=20)
    assert seen == ("hello there", "1")


def test_a_python_is_found_by_itself(make_hosts: Any) -> None:
    hosts = make_hosts(1, python="3.8", path=(str(Path(sys.executable).parent), sys.prefix, sys.base_prefix))
    options = {"config_file": hosts.config_file}
    with RuntimeGroup(hosts=["host1"], connection_kwargs=options, python="/usr/bin/python3") as group:
        with DaskCluster(group, check_versions="warn") as cluster, pytest.raises(VersionMismatchError) as caught:
            cluster.start()
        assert "check_versions" not in str(caught.value)  # it would not help: there is no dask
    with (
        RuntimeGroup(hosts=["host1"], connection_kwargs=options, python="auto") as group,
        DaskCluster(group) as cluster,
    ):
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            assert client.submit(lambda: sys.version_info[:2]).result(timeout=20) == sys.version_info[:2]


# --- interruptions -------------------------------------------------------------------------------
_MANAGER = """
    import sys
    sys.path.insert(0, {tests!r})
    from cluster_groups import connect, local_group
    from lazycluster.cluster.dask_cluster import DaskCluster
    group = connect({config!r}, {names!r})
    cluster = DaskCluster(group)
    print("connected", flush=True)
    cluster.start()
    client = cluster.get_client(timeout=20)
    print(client.submit(sum, [1, 2]).result(), flush=True)
    futures = client.map(lambda n: bytes(200_000) * (n % 7), range(100_000), pure=False)
    sys.stdin.read()
"""


def _manager(hosts: Any) -> subprocess.Popen[str]:
    names = [host.name for host in hosts]
    text = textwrap.dedent(_MANAGER).format(tests=str(Path(__file__).parent), config=hosts.config_file, names=names)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_nothing_is_left_when_the_manager_is_killed(module_hosts: Any) -> None:
    with _manager(module_hosts) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "connected\n"
        assert manager.stdout.readline() == "3\n"
        time.sleep(0.5)  # traffic in the tunnels
        manager.kill()
        manager.communicate()
    deadline = time.monotonic() + 5
    while (left := [entry for host in module_hosts.all for entry in host.leftovers()]) or (left := _programs()):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize("after", [0.1, 0.8, *(pytest.param(after, marks=pytest.mark.soak) for after in (2.0, 4.0))])
def test_ctrl_c_during_a_start(module_hosts: Any, after: float) -> None:
    with _manager(module_hosts) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "connected\n"
        time.sleep(after)  # any moment will do
        manager.send_signal(signal.SIGINT)
        _, errors = manager.communicate(timeout=60)
        assert "KeyboardInterrupt" in errors
    assert [entry for host in module_hosts.all for entry in host.leftovers()] == []
    assert _programs() == []


# --- launchers -----------------------------------------------------------------------------------
class OwnMaster(MasterLauncher):
    """Implements what the documents name, and nothing else; of the earlier documents, so without `debug`."""

    def start(self, ports: Any, timeout: int = 3) -> list[int]:  # type: ignore[override]
        self._port = ports if isinstance(ports, int) else ports.pop(0)
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard"]
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port), "--dashboard-address", "127.0.0.1:0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                break
            assert self._process.poll() is None
            time.sleep(0.05)
        return ports if isinstance(ports, list) else []

    def cleanup(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        super().cleanup()


class OwnWorkers(WorkerLauncher):
    """One worker, started by hand."""

    def start(self, worker_count: int, master_port: int, ports: list[int], debug: bool = False) -> list[int]:
        port = ports.pop(0)
        command = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{master_port}", "--no-nanny"]
        more = ["--no-dashboard", "--host", "127.0.0.1", "--worker-port", str(port), "--nthreads", "1"]
        self._worker = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._ports_per_host["local0"] = [port]
        return ports

    def cleanup(self) -> None:
        self._worker.terminate()
        self._worker.wait()
        super().cleanup()


@pytest.fixture
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_TEMPORARY_DIRECTORY", str(tmp_path))  # distributed leaves a directory behind


@pytest.mark.usefixtures("_scratch")
def test_launchers_with_only_the_documented_methods(group: RuntimeGroup) -> None:
    with DaskCluster(group, None, OwnMaster(group), OwnWorkers) as cluster:  # type: ignore[abstract,arg-type]
        cluster.start(worker_count=1)
        assert cluster.scheduler_address == f"tcp://127.0.0.1:{cluster.master_port}"
        with cluster.get_client(timeout=20) as client:
            client.wait_for_workers(1, timeout=30)
            assert client.submit(lambda: 4).result(timeout=20) == 4


@pytest.mark.usefixtures("_scratch")
def test_our_workers_with_a_scheduler_of_your_own(group: RuntimeGroup) -> None:
    with DaskCluster(group, None, OwnMaster(group)) as cluster:  # type: ignore[abstract]
        cluster.start(worker_count=1)
        with cluster.get_client(timeout=20) as client:
            assert client.submit(lambda: 4).result(timeout=20) == 4


def test_our_own_launchers_passed_as_the_documents_do(group: RuntimeGroup) -> None:
    with DaskCluster(group, None, LocalMasterLauncher(group), RoundRobinLauncher) as cluster:
        cluster.start(worker_count=1)
        assert cluster.scheduler_address.startswith("tls://")
        with cluster.get_client(timeout=20) as client:
            assert client.submit(lambda: 4).result(timeout=20) == 4


def test_output_is_printed_live(group: RuntimeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    with DaskCluster(group) as cluster:
        cluster.start(worker_count=1, debug=True)
        text = capsys.readouterr().out
    assert "[local0] " in text
    assert "[localhost] " in text
