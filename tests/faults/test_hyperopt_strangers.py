"""What others can do with the database of a running search: those on the network, and other users of the machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hyperopt")
pytest.importorskip("distributed")  # the stranger speaks both languages

from knocking import NOBODY, below, here, loopback, on_host, private

from lazycluster import RuntimeGroup
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
from sshhosts import procfs

_STRANGE = ["mongo", "mongo hyperopt guess"]


@pytest.fixture(scope="module")
def cluster(module_hosts: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HyperoptCluster]:
    """A cluster on the first of three hosts; the others are strangers on the same network."""
    options = {"config_file": module_hosts.config_file}
    folder = tmp_path_factory.mktemp("search")
    for path in (folder, *folder.parents):
        if path.owner() == "root" and path.stat().st_mode & 0o077 == 0:
            path.chmod(0o755)  # so that only what the library itself does keeps others away
    with RuntimeGroup(hosts=module_hosts.names[:1], connection_kwargs=options, python=sys.executable) as group:
        group.runtimes[0].create_tempdir()
        with HyperoptCluster(group, dbpath=str(folder / "db")) as cluster:
            cluster.start()
            cluster.trials("search").handle.jobs.insert_one({"exp_key": "search", "state": 2})
            yield cluster


def _attempts(addresses: Any, cluster: HyperoptCluster, **more: Any) -> str:
    access = cluster._hyperopt.access
    assert access.identity is not None
    secrets = [access.password, access.identity.key.splitlines()[2][:40]]
    # Nobody is answered who does not ask by TLS, whatever he knows.
    ways = [*_STRANGE, f"mongo-plain hyperopt {access.password}"]
    return json.dumps({"addresses": addresses, "identities": {}, "ways": ways, "secrets": secrets, **more})


def test_who_knows_the_password_is_answered(cluster: HyperoptCluster, module_hosts: Any) -> None:
    """What the other tests rely on: the same attempts succeed for somebody who belongs there."""
    port = cluster.master_port
    assert port is not None
    way = f"mongo hyperopt {cluster._hyperopt.access.password}"
    known = {"addresses": loopback([port]), "identities": {}, "ways": [way]}
    for found in (here(os.getuid(), json.dumps(known)), on_host(module_hosts[0], "mallory", json.dumps(known))):
        assert len(found) == 1
        assert found[0].endswith("list, read, write, delete")


def test_another_user_of_the_manager_is_refused(cluster: HyperoptCluster) -> None:
    ports = procfs.listening_ports("self")
    assert cluster.master_port in ports
    files = [str(path) for path in below(Path(cluster.dbpath))]
    assert any(path.endswith(".sqlite") for path in files)
    logs = [str(service.log_file) for service in cluster._master_launcher.services]
    found = here(NOBODY, _attempts(loopback(ports), cluster, paths=[*files, *logs]))
    assert set(found) == {f"{cluster.dbpath} can be seen"}  # that it is there, and nothing of what is in it


def test_another_user_of_a_host_is_refused(cluster: HyperoptCluster, module_hosts: Any) -> None:
    host = module_hosts[0]
    ports = host.listening_ports()
    assert cluster.master_port in ports
    found = on_host(host, "mallory", _attempts(loopback(ports), cluster, paths=private(host)))
    assert set(found) - {f"{entry} can be seen" for entry in host.tmp_entries()} == set()


def test_another_host_on_the_network_reaches_nothing(cluster: HyperoptCluster, module_hosts: Any) -> None:
    addresses = [(module_hosts.manager_address, port) for port in procfs.listening_ports("self")]
    addresses += [(module_hosts[0].address, port) for port in module_hosts[0].listening_ports()]
    assert (module_hosts.manager_address, cluster.master_port) in addresses
    attempts = {"addresses": addresses, "identities": {}, "ways": ["connect"]}
    assert on_host(module_hosts[1], "root", json.dumps(attempts)) == []


def test_no_core_dump_has_the_password(cluster: HyperoptCluster, module_hosts: Any) -> None:
    """One byte: a limit of 0 is none where the kernel pipes dumps to a program."""
    inner = cluster._worker_launcher.workers[0].service.pid
    worker = next(found.pid for found in module_hosts[0].processes() if found.inner_pid == inner)
    evaluators = [found.pid for found in procfs.descendants(worker)]
    assert evaluators
    for pid in (cluster._master_launcher._service.pid, worker, *evaluators):
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
        assert [line[26:].split()[0] for line in lines if line.startswith("Max core file size")] == ["1"]
