"""Clusters of an engine that consists of other programs: what goes wrong when they start, and what is left then."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cluster_groups import local_group, ssh_group

from lazycluster.cluster import versions
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.master_launcher import ServiceMasterLauncher
from lazycluster.engine import Endpoint, Engine, EngineCluster, Port, ServiceSpec
from lazycluster.exceptions import ForwardingForbiddenError
from patience import until

_MASTER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listening", flush=True)
while True:
    server.accept()[0].sendall(b"here")
"""
_WORKER = """
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
assert connection.recv(4) == b"here"
print("working", flush=True)
time.sleep(600)
"""


class Small(Engine):
    name, cluster = "small", "SmallCluster"

    def master(self, at: Endpoint) -> ServiceSpec:
        return ServiceSpec("master", command=(at.python, "-c", _MASTER, str(at.port)), ready="listening")

    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        return ServiceSpec("worker", command=(at.python, "-c", _WORKER, str(master.port)), ready="working")


class SmallCluster(EngineCluster):
    engine_class = Small


class SmallOnHost(EngineCluster):
    engine_class = type("Engine", (Small,), {"master_on": "host"})


@pytest.mark.parametrize("process", ["master", "worker"])
def test_an_error_of_the_engine_s_own_is_told_as_such(process: str) -> None:
    def fail(self: Engine, *endpoints: Endpoint) -> ServiceSpec:
        return {}["no such key"]  # type: ignore[no-any-return]

    class BrokenCluster(EngineCluster):
        engine_class = type("Broken", (Small,), {process: fail})

    failing = pytest.raises(ClusterError, match="'small' failed: Broken")
    with local_group(1) as group, BrokenCluster(group) as cluster, failing as caught:
        cluster.start()
    lines = str(caught.value).splitlines()
    assert f"Broken.{process}() raised KeyError: 'no such key'" in str(caught.value)
    assert any(line.strip().startswith(f'File "{__file__}", line ') and line.endswith(", in fail") for line in lines)
    assert "Next step: report it to those who maintain" in str(caught.value)


def _answer(port: int | None) -> bytes:
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        return connection.recv(4)


def test_the_end_of_a_cluster_whose_hosts_do_not_tell_their_software(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Small, "packages", ("click",))
    monkeypatch.setattr(versions, "_LIMIT", 3600.0)
    hanging, asked, python = tmp_path / "hanging", tmp_path / "asked", tmp_path / "python"
    hang = f"touch {asked} && exec sleep 600"
    python.write_text(f'#!/bin/sh\n[ -e {hanging} ] && {hang}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    told: list[ClusterError] = []

    def start() -> None:
        try:
            cluster.start()
        except ClusterError as error:
            told.append(error)

    with local_group(1, python=str(python)) as group, SmallCluster(group) as cluster:
        hanging.touch()
        starting = threading.Thread(target=start)
        starting.start()
        until(asked.exists, "the host to be asked for its software")
        cluster.cleanup()
        starting.join(60)
        assert "the cluster was ended meanwhile" in str(told[0])
        assert cluster.status in ("closed", "failed")
        assert cluster.master_port is None


def test_the_end_of_a_cluster_while_its_master_gets_its_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing, told = threading.Event(), []
    choose = ServiceMasterLauncher._choose_ports

    async def slow(self: ServiceMasterLauncher, *arguments: Any) -> dict[str, int]:
        choosing.set()
        await asyncio.sleep(1)
        return await choose(self, *arguments)

    def start() -> None:
        try:
            cluster.start()
        except Exception as error:  # noqa: BLE001
            told.append(error)

    monkeypatch.setattr(ServiceMasterLauncher, "_choose_ports", slow)
    with local_group(1) as group, SmallCluster(group) as cluster:
        starting = threading.Thread(target=start)
        starting.start()
        choosing.wait(10)
        with pytest.raises(ClusterError, match="the cluster is being started"):
            cluster.scale(2)
        cluster.cleanup()
        starting.join(10)
        assert [type(error) for error in told] == [ClusterError]
        assert "the cluster was ended meanwhile" in str(told[0])
        assert cluster.master_port is None


def test_the_host_of_a_master_that_forbids_to_forward_is_named(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    hosts[0].restart_sshd(AllowTcpForwarding="no")
    with ssh_group(hosts) as group, SmallOnHost(group, min_workers=1) as cluster:
        with pytest.raises(ForwardingForbiddenError, match="host1"):
            cluster.start()
        assert cluster.status == "failed"


def test_another_host_that_forbids_to_forward_costs_its_own_worker(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    hosts[1].restart_sshd(AllowTcpForwarding="no")
    with ssh_group(hosts) as group:
        with SmallOnHost(group) as cluster, pytest.raises(ForwardingForbiddenError, match="host2"):
            cluster.start()
        with SmallOnHost(group, min_workers=1) as cluster:
            cluster.start()
            assert [worker.host for worker in cluster.workers] == ["host1"]
            assert _answer(cluster.master_port) == b"here"


_SERVES = """
import socket, sys
bind, port, *others = sys.argv[1:]
if others:  # a worker, which the master is there for already
    assert socket.create_connection((others[0], int(others[1])), 10).recv(4) == b"here"
server = socket.create_server((bind, int(port)))
while True:
    server.accept()[0].sendall(b"here")
"""


class Direct(Engine):
    name, cluster, direct, worker_ports = "straight", "DirectCluster", "open", (Port("worker"),)

    def master(self, at: Endpoint) -> ServiceSpec:
        command = (at.python, "-c", _SERVES, at.bind, str(at.port))
        return ServiceSpec("master", command=command, ready_port="master", ready_host=at.bind)

    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        command = (at.python, "-c", _SERVES, at.bind, str(at.port), master.address, str(master.port))
        return ServiceSpec("worker", command=command, ready_port="worker", ready_host=at.bind)


class DirectCluster(EngineCluster):
    engine_class = Direct


@pytest.mark.parametrize("network", ["direct", "auto", "tunnel"])
def test_an_engine_that_listens_where_it_is_told_to(make_hosts: Any, network: Any) -> None:
    hosts = make_hosts(2)
    with ssh_group(hosts) as group, DirectCluster(group, network=network) as cluster:
        cluster.start()
        assert [worker.state for worker in cluster.workers] == ["ready", "ready"]
        # What is not encrypted goes from host to host only if that is asked for by name.
        expected = hosts[0].address if network == "direct" else "127.0.0.1"
        assert cluster._master_launcher.at.bind == expected  # type: ignore[attr-defined]
        assert _answer(cluster.master_port) == b"here"


def test_an_engine_that_knows_loopback_only_is_refused() -> None:
    with local_group(1) as group:
        with pytest.raises(ClusterError, match="its processes listen on loopback only"):
            SmallCluster(group, network="direct")
        assert SmallCluster(group, network="auto")._network.direct.uses == "tunnel"
