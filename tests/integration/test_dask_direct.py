"""Dask clusters whose hosts talk to each other at their own addresses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

import dask
from cluster_groups import connect, local_group, ssh_group

from lazycluster import RuntimeGroup
from lazycluster.cluster import MasterLauncher
from lazycluster.cluster.dask_cluster import DaskCluster, RoundRobinLauncher
from lazycluster.cluster.exceptions import ClusterError, UnreachableError
from lazycluster.cluster.services import Service

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = {"nthreads": 1, "memory_limit": "500 MB"}


@pytest.fixture(scope="module")
def group(module_hosts: Any) -> Iterator[RuntimeGroup]:
    with ssh_group(module_hosts) as group:
        yield group


@pytest.fixture(scope="module")
def cluster(group: RuntimeGroup) -> Iterator[DaskCluster]:
    with DaskCluster(group, network="direct", **SMALL) as cluster:
        cluster.start()
        yield cluster


@pytest.fixture
def client(cluster: DaskCluster) -> Iterator[Any]:
    with cluster.get_client(timeout=30) as client:
        yield client


def _workers(client: Any) -> dict[str, dict[str, Any]]:
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def _firewall(host: Any, *rule: str) -> Iterator[None]:
    host.run(["/usr/sbin/iptables", "-I", *rule])
    try:
        yield
    finally:
        host.run(["/usr/sbin/iptables", "-D", *rule])


def _listening(host: Any) -> dict[int, str]:
    """Return the addresses that listen on a host, by port, but for sshd's."""
    lines = host.run(["ss", "-Hltn"]).stdout.splitlines()
    pairs = [line.split()[3].rpartition(":") for line in lines]
    return {int(port): address for address, _, port in pairs if int(port) not in (22, host.port)}


def test_workers_and_scheduler_reach_each_other_at_their_own_addresses(
    client: Any, cluster: DaskCluster, module_hosts: Any
) -> None:
    first = module_hosts[0]
    assert client.scheduler_info()["address"] == f"tls://{first.address}:{cluster.master_port}"
    assert cluster.scheduler_address == f"tls://127.0.0.1:{cluster.master_port}"
    told = {info["name"]: (address, info["nanny"]) for address, info in _workers(client).items()}
    assert sorted(told) == [f"{host.name}-0" for host in module_hosts]
    for host in module_hosts:
        assert all(address.startswith(f"tls://{host.address}:") for address in told[f"{host.name}-0"])
    parts = client.map(lambda number: bytes(1000) * number, [1, 2, 3], workers=list(_workers(client)), pure=False)
    assert client.submit(lambda parts: sum(map(len, parts)), parts).result(timeout=30) == 6000
    assert "network" in str(cluster._repr_html_())


def test_nothing_listens_on_all_addresses(client: Any, cluster: DaskCluster, module_hosts: Any) -> None:
    for host in module_hosts:
        listening = _listening(host)
        assert set(listening.values()) == {host.address, "127.0.0.1"}
        for worker in cluster._worker_launcher.workers:
            if worker.place.host == host.name:
                assert {listening[worker.ports[name]] for name in ("worker", "nanny")} == {host.address}
                assert listening[worker.ports["dashboard"]] == "127.0.0.1"
    # On the manager there are tunnels to the scheduler and the dashboards, and to nothing else.
    ours = {int(line.split()[3].rpartition(":")[2]) for line in _own_listeners()}
    wanted = {cluster._master_launcher.at.ports[name] for name in ("master", "dashboard")}
    wanted |= {worker.ports["dashboard"] for worker in cluster._worker_launcher.workers}
    assert wanted <= ours
    assert not ours & {worker.ports["worker"] for worker in cluster._worker_launcher.workers}


def _own_listeners() -> list[str]:
    lines = subprocess.run(["ss", "-Hltn"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert all(line.split()[3].startswith(("127.0.0.1:", "[::1]:")) for line in lines)
    return lines


_ASK = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
for address in sys.argv[1:]:
    host, port = address.rsplit(":", 1)
    for wrap in (context.wrap_socket, lambda connection: connection):
        with socket.create_connection((host, int(port)), 10) as plain:
            try:
                connection = wrap(plain)
                connection.sendall(b"x" * 100)
                answer = connection.recv(100)
            except OSError:
                answer = b""
            # What TLS says before it knows the other side: an alert, and nothing of the service.
            assert len(answer) <= 7, (address, answer)
"""


def test_nobody_without_a_certificate_is_answered(client: Any, cluster: DaskCluster, module_hosts: Any) -> None:
    known = _workers(client).items()
    addresses = [one.partition("//")[2] for address, info in known for one in (address, info["nanny"])]
    addresses.append(f"{module_hosts[0].address}:{cluster.master_port}")
    asked = module_hosts[2].run(["python3", "-c", _ASK, *addresses], user="daemon", check=False)
    assert asked.stderr == ""


_CAPTURE = """
import socket, sys
capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
capture.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
print("ready", flush=True)
capture.settimeout(0.2)
import select
while True:
    ready = select.select([capture, sys.stdin], [], [])[0]
    if capture in ready:
        sys.stdout.buffer.write(capture.recv(1 << 17))
        sys.stdout.buffer.flush()
    elif sys.stdin in ready:
        break
"""


def test_between_hosts_nothing_is_in_clear(client: Any, cluster: DaskCluster, module_hosts: Any) -> None:
    enter = ["nsenter", "-t", str(module_hosts.supervisor_pid), "-n", "--"]
    capture = subprocess.Popen(
        [*enter, sys.executable, "-c", _CAPTURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert capture.stdin is not None
    assert capture.stdout is not None
    assert capture.stdout.readline() == b"ready\n"
    seen = bytearray()
    output = capture.stdout
    reading = threading.Thread(target=lambda: seen.extend(output.read()))
    reading.start()
    try:
        secret = "this-is-only-between-the-hosts-"
        addresses = sorted(_workers(client))
        made = client.submit(lambda: secret * 2000, workers=addresses[:1], pure=False)
        assert client.submit(len, made, workers=addresses[1:2]).result(timeout=30) == len(secret) * 2000
        # The same in clear, to see that it would be found.
        host, other = module_hosts[0], module_hosts[1]
        code = "import socket, sys; socket.socket(type=socket.SOCK_DGRAM).sendto(b'in-clear', (sys.argv[1], 9))"
        host.run(["python3", "-c", code, other.address])
    finally:
        capture.stdin.close()
        reading.join(30)
        capture.wait(30)
        capture.stdout.close()
    assert b"in-clear" in seen
    assert len(seen) > len(secret) * 2000
    for private in (secret, cluster._dask.access.prefix, "PRIVATE KEY"):
        assert private.encode() not in seen


def test_a_scheduler_that_is_killed_comes_back_on_its_host(
    client: Any, cluster: DaskCluster, module_hosts: Any
) -> None:
    before = cluster._master_launcher.process.pid
    module_hosts[0].run(["kill", "-KILL", str(before)])
    _until(lambda: cluster.master is not None and cluster.master.restarts == 1 and cluster.master.state == "ready")
    with cluster.get_client(timeout=30) as another:
        another.wait_for_workers(3, timeout=60)
        assert another.submit(lambda: 7).result(timeout=30) == 7


def test_a_killed_worker_comes_back(client: Any, cluster: DaskCluster) -> None:
    client.wait_for_workers(3, timeout=60)
    before = client.run(os.getpid)
    victim = sorted(before)[-1]
    with contextlib.suppress(Exception):
        client.run(os._exit, 1, workers=[victim], on_error="ignore")
    _until(lambda: len(after := client.run(os.getpid, on_error="ignore")) == 3 and after.get(victim) != before[victim])


def test_workers_come_and_go(group: RuntimeGroup) -> None:
    with DaskCluster(group, network="direct", **SMALL) as cluster:
        cluster.start(1)
        with cluster.get_client(timeout=30) as client:
            held = client.submit(bytes, 1000)
            cluster.scale(4)
            client.wait_for_workers(4, timeout=60)
            assert not any("127.0.0.1" in address for address in _workers(client))
            cluster.scale(2)
            _until(lambda: len(_workers(client)) == 2)
            assert len(held.result(timeout=30)) == 1000


def test_own_modules_are_there(
    client: Any, cluster: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "direct_helper.py"
    module.write_text("def answer():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import direct_helper

    assert client.submit(direct_helper.answer, pure=False).result(timeout=30) == 1
    # The scheduler unpickles, too.
    assert client.run_on_scheduler(direct_helper.answer) == 1
    sys.modules.pop("direct_helper")


def test_another_process_connects_with_a_file(cluster: DaskCluster, tmp_path: Path) -> None:
    file = cluster.write_connection_file(tmp_path / "cluster.json")
    code = (
        "import sys; from lazycluster.cluster.dask_cluster import DaskCluster\n"
        "with DaskCluster.connect(sys.argv[1]) as client: print(client.submit(sum, [1, 2]).result())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "3"


def test_one_pair_that_is_blocked_is_named_and_auto_takes_tunnels(
    module_hosts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = module_hosts[1], module_hosts[2]
    rule = ("INPUT", "-s", source.address, "-p", "tcp", "-m", "multiport", "--dports", "25000:25100", "-j", "DROP")
    where = rf"host2 cannot reach host3 at {re.escape(target.address)}:25\d+: no answer within 2 s"
    # In a group of its own: what was proven in another one was proven without the firewall.
    with _firewall(target, *rule), ssh_group(module_hosts) as group:
        with DaskCluster(group, network="direct", **SMALL) as cluster, pytest.raises(UnreachableError, match=where):
            cluster.start()
        caplog.set_level(logging.INFO, "lazycluster")
        with DaskCluster(group, network="auto", **SMALL) as cluster:
            cluster.start()
            with cluster.get_client(timeout=30) as client:
                assert all(address.startswith("tls://127.0.0.1:") for address in _workers(client))
            assert "tunnel" in repr(cluster)
            assert re.search(where, repr(cluster))
    assert any(re.search(where, record.message) and record.levelname == "WARNING" for record in caplog.records)


def test_auto_takes_what_is_proven(group: RuntimeGroup, module_hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lazycluster")
    with DaskCluster(group, network="auto", **SMALL) as cluster:
        cluster.start(2)
        assert "direct" in repr(cluster)
        with cluster.get_client(timeout=30) as client:
            assert not any("127.0.0.1" in address for address in _workers(client))
    assert any("direct (all hosts reach each other)" in record.message for record in caplog.records)


def test_a_port_that_is_taken_between_the_probe_and_its_use(
    group: RuntimeGroup, module_hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = module_hosts[1]
    taken: list[subprocess.Popen[bytes]] = []
    come_up = Service.come_up

    async def too_late(self: Service, spec: Any, ports: Any) -> Any:
        if self.place.host == host.name and not taken:
            code = "import socket, sys; s = socket.create_server((sys.argv[1], int(sys.argv[2]))); print(flush=True)"
            place = [host.address, str(ports["worker"])]
            command = ["nsenter", "-t", str(host.pid), "-n", "python3", "-c", f"{code}; s.accept()", *place]
            taken.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            assert taken[0].stdout is not None
            taken[0].stdout.readline()
        return await come_up(self, spec, ports)

    monkeypatch.setattr(Service, "come_up", too_late)
    try:
        with DaskCluster(group, network="direct", **SMALL) as cluster:
            cluster.start()
            with cluster.get_client(timeout=30) as client:
                assert len(_workers(client)) == 3
        assert taken
    finally:
        for process in taken:
            process.kill()
            process.communicate()


def test_arguments_that_make_no_sense(group: RuntimeGroup) -> None:
    with pytest.raises(ValueError, match="network must be 'tunnel', 'direct' or 'auto', not 'fast'"):
        DaskCluster(group, network="fast")  # type: ignore[arg-type]

    class Master(MasterLauncher):
        def start(self, ports: Any, timeout: int = 3, debug: bool = False) -> list[int]:
            return []

    with pytest.raises(ClusterError, match='cannot use network="direct": a launcher of your own'):
        DaskCluster(group, None, Master, network="direct")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "fe80::1", "224.0.0.1", "host1", ""])
def test_addresses_that_no_other_host_can_reach(module_hosts: Any, address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        connect(module_hosts.config_file, ["host1"], settings={"host1": {"address": address}})


def test_one_machine_alone() -> None:
    with local_group(2) as group, DaskCluster(group, network="direct", **SMALL) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            assert len(_workers(client)) == 2
            assert client.submit(lambda: 3).result(timeout=30) == 3


def test_a_translated_address(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    inner, outer = hosts[1], f"{hosts[1].address.rpartition('.')[0]}.77"
    hosts[0].run(["ip", "route", "add", f"{outer}/32", "via", inner.address])
    inner.run(["/usr/sbin/iptables", "-t", "nat", "-A", "PREROUTING", "-d", outer, "-j", "DNAT", "--to", inner.address])
    settings = {"host2": {"address": outer}}
    with (
        connect(hosts.config_file, hosts.names, settings=settings) as group,
        DaskCluster(group, network="direct", **SMALL) as cluster,
    ):
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            info = {one["name"]: (address, one["nanny"]) for address, one in _workers(client).items()}
            assert all(address.startswith(f"tls://{outer}:") for address in info["host2-0"])
            assert set(_listening(inner).values()) == {inner.address, "127.0.0.1"}
            made = client.submit(bytes, 1000, workers=[info["host2-0"][0]])
            assert client.submit(len, made, workers=[info["host1-0"][0]]).result(timeout=30) == 1000


def test_ipv6_alone(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    for number, host in enumerate(hosts):
        host.run(["/usr/sbin/sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0"], check=False)
        host.run(["ip", "-6", "address", "add", f"fd00:2::{number + 1}/64", "dev", "eth0", "nodad"])
    for host, other in (hosts, reversed(hosts)):
        host.run(["/usr/sbin/iptables", "-A", "INPUT", "-s", other.address, "-j", "DROP"])
    with ssh_group(hosts) as group, DaskCluster(group, network="direct", **SMALL) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            assert sorted(address.rpartition(":")[0] for address in _workers(client)) == [
                "tls://[fd00:2::1]", "tls://[fd00:2::2]",
            ]  # fmt: skip
            parts = client.map(lambda number: bytes(number), [10, 20], workers=list(_workers(client)), pure=False)
            assert client.submit(lambda parts: sum(map(len, parts)), parts).result(timeout=30) == 30


def test_a_host_that_joins_is_tried_with_those_that_run(make_hosts: Any) -> None:
    hosts = make_hosts(3)
    with connect(hosts.config_file, hosts.names[:2]) as group, DaskCluster(group, network="direct", **SMALL) as cluster:
        cluster.start()
        group.add_runtime("host3")
        running = cluster._worker_launcher.workers[1].ports["worker"]
        rule = ("INPUT", "-s", hosts[2].address, "-p", "tcp", "--dport", str(running), "-j", "REJECT")
        where = rf"host3 cannot reach host2 at {hosts[1].address}:{running}: "
        with _firewall(hosts[1], *rule), pytest.raises(UnreachableError, match=where):
            cluster.scale(3)
        cluster.scale(3)
        with cluster.get_client(timeout=30) as client:
            assert {address.rpartition(":")[0] for address in _workers(client)} == {f"tls://{h.address}" for h in hosts}


def test_the_host_of_the_scheduler_that_is_lost_is_named(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    settings = {"link_timeout": 2, "reconnect": 2}
    with (
        ssh_group(hosts, connection_kwargs=settings) as group,
        DaskCluster(group, network="direct", **SMALL) as cluster,
    ):
        cluster.start()
        hosts[0].power_off()
        _until(lambda: cluster.status.name == "failed")
        with pytest.raises(ClusterError, match=r"host1: dask-scheduler: .*"):
            cluster.get_client()


def test_while_the_host_of_the_scheduler_is_not_reached_errors_say_so(
    make_hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = make_hosts(2)
    waiting = threading.Event()
    wait_for_link = Service.wait_for_link

    async def told(self: Service, within: float | None = None) -> None:
        waiting.set()
        await wait_for_link(self, within)

    with (
        ssh_group(hosts, connection_kwargs={"link_timeout": 2}) as group,
        DaskCluster(group, network="direct", **SMALL) as cluster,
        ThreadPoolExecutor() as pool,
    ):
        cluster.start()
        hosts[0].cut_off()
        _until(lambda: group.status[0].state == "interrupted")
        link = "the link to host1 has been interrupted for [0-9]+ s: "
        with pytest.raises(
            ClusterError, match=f"^the scheduler is on host1, and {link}.*\n  Next step: check that host1"
        ):
            cluster.get_client(timeout=1)

        async def in_a_loop() -> None:
            await (await cluster).get_client(timeout=1)

        cause = rf"(?s)Cause: the scheduler is on host1, and {link}.*Next step: check that host1"
        with pytest.raises(ClusterError, match=cause):
            asyncio.run(in_a_loop())
        with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(ClusterError, match=cause):
            cluster.get_logs()
        problems = [process.problem for process in [cluster.master, *cluster.workers] if process is not None]
        assert [bool(re.match(link, problem)) for problem in problems] == [True, True, False]
        assert re.search(link, str(cluster._repr_html_()))
        # One that is back in time is no error.
        monkeypatch.setattr(Service, "wait_for_link", told)
        scaling = pool.submit(cluster.scale, 1)
        assert waiting.wait(60)
        hosts[0].restore()
        scaling.result(60)
        assert len(cluster.workers) == 1
        assert cluster.master is not None and cluster.master.problem == ""


def test_workers_that_are_started_are_not_waited_for_when_the_scheduler_has_gone(
    make_hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = make_hosts(2)

    async def never(self: Service, spec: Any, ports: Any) -> None:
        if hosts[0].pid:
            hosts[0].power_off()
        await asyncio.Event().wait()

    with (
        ssh_group(hosts, connection_kwargs={"link_timeout": 2, "reconnect": 2}) as group,
        DaskCluster(group, network="direct", **SMALL) as cluster,
    ):
        cluster.start()
        monkeypatch.setattr(Service, "come_up", never)
        monkeypatch.setattr(RoundRobinLauncher, "START_LIMIT", 3600)
        with pytest.raises(ClusterError, match=r"(?s)^the cluster has failed: host1: dask-scheduler: .*cleanup\(\)"):
            cluster.scale(4)
        assert repr(cluster).startswith("<DaskCluster failed, ")


def test_a_cable_between_two_hosts_that_is_cut_for_a_while(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    with ssh_group(hosts) as group, DaskCluster(group, network="direct", **SMALL) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            by_host = {info["name"]: address for address, info in _workers(client).items()}
            made = client.submit(bytes, 100_000, workers=[by_host["host1-0"]])
            made_there = client.submit(bytes, 100_000, workers=[by_host["host2-0"]])
            with _firewall(hosts[0], "INPUT", "-s", hosts[1].address, "-j", "DROP"):
                size = client.submit(
                    lambda first, second: len(first) + len(second),
                    made,
                    made_there,
                    workers=[by_host["host2-0"]],
                    pure=False,
                )
                time.sleep(1)  # in which the cable is cut
                assert all(host.state == "open" for host in group.status)
            assert size.result(timeout=60) == 200_000


def test_links_to_the_manager_that_drop_while_hosts_reach_each_other(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    states: list[str] = []
    with (
        ssh_group(hosts, connection_kwargs={"link_timeout": 2}) as group,
        DaskCluster(group, network="direct", **SMALL) as cluster,
    ):
        cluster.start()
        group.on_state(lambda status: states.append(status.state))
        with cluster.get_client(timeout=30) as client:
            addresses = sorted(_workers(client))
            for host in hosts:
                host.run("pkill -KILL -f '^sshd: lazy'", check=False)
            _until(lambda: states.count("open") == 2)
            client.wait_for_workers(2, timeout=60)
            parts = client.map(lambda number: bytes(number), [10, 20], workers=addresses, pure=False)
            assert client.submit(lambda parts: sum(map(len, parts)), parts).result(timeout=60) == 30
            assert sorted(_workers(client)) == addresses
            assert all(worker.restarts == 0 for worker in cluster.workers)


def test_a_host_whose_address_has_changed_while_its_link_was_down(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    host, new = hosts[1], f"{hosts[1].address.rpartition('.')[0]}.66"
    states: list[str] = []
    with ssh_group(hosts) as group, DaskCluster(group, network="direct", **SMALL) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            assert f"tls://{host.address}" in {address.rpartition(":")[0] for address in _workers(client)}
        cluster.cleanup()
        group.on_state(lambda status: states.append(status.state))
        host.run("pkill -KILL -f '^sshd: lazy'", check=False)
        host.run(["ip", "address", "add", f"{new}/24", "dev", "eth0"])
        _until(lambda: "open" in states)
        # Of the old address the others see nothing any more; ssh goes through it still, as through a bastion.
        with _firewall(host, "INPUT", "-p", "tcp", "--dport", "25000:25100", "-d", host.address, "-j", "DROP"):
            cluster.start()
            with cluster.get_client(timeout=30) as client:
                assert f"tls://{new}" in {address.rpartition(":")[0] for address in _workers(client)}
