"""What others can do with a running cluster: those on the network, and other users of the same machines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from knocking import NOBODY, below, here, loopback, on_host, private

from lazycluster import Environment, RuntimeGroup, RuntimeTask
from lazycluster.cluster.certificates import make_credentials
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.sent.auth_limit import LINES, MOST_SILENT
from lazycluster.core.certificates import Identity
from lazycluster.exceptions import LazyclusterError
from patience import until
from sshhosts import PASSWORD, procfs

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    before = Environment.main_directory
    Environment.set_main_directory(folder)
    yield folder
    Environment.set_main_directory(before)


@pytest.fixture(scope="module")
def cluster(module_hosts: Any, logs: Path) -> Iterator[DaskCluster]:
    """A cluster on the first two of three hosts; the third is a stranger on the same network."""
    options = {"config_file": module_hosts.config_file}
    with RuntimeGroup(hosts=module_hosts.names[:2], connection_kwargs=options, python=sys.executable) as group:
        for runtime in group.runtimes:
            runtime.create_tempdir()
        with DaskCluster(group) as cluster:
            cluster.start()
            with cluster.get_client(timeout=30) as client:
                assert client.submit(sum, [1, 2]).result(timeout=30) == 3
                yield cluster


def _secrets(cluster: DaskCluster) -> list[str]:
    credentials = cluster._dask.access.credentials
    identities = (credentials.scheduler, credentials.worker, credentials.client)
    # The middle of a key: how its lines are broken does not matter.
    return [cluster._dask.access.prefix, *(identity.key.splitlines()[2][:40] for identity in identities)]


def _as_json(identity: Identity) -> dict[str, str]:
    return {"certificate": identity.certificate, "key": identity.key}


def _attempts(addresses: Any, **more: Any) -> str:
    identities = {"no certificate": None, "another cluster's": _as_json(make_credentials().client)}
    return json.dumps({"addresses": addresses, "identities": identities, **more})


def test_those_who_belong_are_answered(cluster: DaskCluster, module_hosts: Any) -> None:
    """What the other tests rely on: the same attempts succeed with a certificate of the cluster."""
    workers = cluster._worker_launcher.workers
    ports = [cluster.master_port, *(worker.ports[use] for worker in workers for use in ("worker", "nanny"))]
    identity = {"ours": _as_json(cluster._dask.access.credentials.client)}
    attempts = json.dumps({"addresses": loopback(ports), "identities": identity, "ways": ["ours"]})
    found = here(os.getuid(), attempts)
    assert {int(re.split("[: ]", line)[1]) for line in found} == set(ports)
    prefix = f"{cluster._dask.access.prefix}/status"
    dashboard = int(cluster.dashboard_link.split("/")[2].split(":")[1])
    found = here(NOBODY, json.dumps({"addresses": loopback([dashboard]), "identities": {}, "ways": [prefix]}))
    assert "HTTP/1.1 200" in found[0] or "HTTP/1.1 302" in found[0]


def test_nothing_can_be_reached_over_the_network(cluster: DaskCluster, module_hosts: Any) -> None:
    inside, stranger = module_hosts[:2], module_hosts[2]
    addresses = [(module_hosts.manager_address, port) for port in procfs.listening_ports("self")]
    addresses += [(host.address, port) for host in inside for port in host.listening_ports()]
    assert len(addresses) > 15
    found = on_host(stranger, "root", json.dumps({"addresses": addresses, "identities": {}, "ways": ["connect"]}))
    assert found == []
    sshd = [(inside[0].address, inside[0].port)]
    found = on_host(stranger, "root", json.dumps({"addresses": sshd, "identities": {}, "ways": ["connect"]}))
    assert len(found) == 1  # so whoever listens is found in this way


def test_all_listen_on_loopback(cluster: DaskCluster, module_hosts: Any) -> None:
    for pid, allowed in (("self", set()), *((host.pid, {host.port}) for host in module_hosts[:2])):
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                address, port = line.split()[1].split(":")
                if line.split()[3] == "0A" and int(port, 16) not in allowed:
                    assert address in _LOOPBACK, line


def test_another_user_of_a_host_is_refused(cluster: DaskCluster, module_hosts: Any) -> None:
    for host in module_hosts[:2]:
        ports, paths = host.listening_ports(), private(host)
        assert len(ports) >= 4
        assert any(path.endswith("agent.sock") for path in paths)
        attempts = _attempts(loopback(ports), paths=paths, secrets=_secrets(cluster))
        found = on_host(host, "mallory", attempts)
        # That a directory is there cannot be hidden; what is in it is.
        top = {f"{entry} can be seen" for entry in host.tmp_entries()}
        assert set(found) - top == set()


def test_another_user_of_the_manager_is_refused(cluster: DaskCluster) -> None:
    ports = procfs.listening_ports("self")
    assert len(ports) >= 8
    folder = Path(cluster._group.runtimes[0]._connection._space.directory)
    keeper = Path(cluster._master_launcher._service.place.connection.agent_info.directory)
    paths = [str(path) for top in (folder, keeper) for path in below(top)]
    assert {"askpass.sock", "agent.sock"} <= {os.path.basename(path) for path in paths}
    found = here(NOBODY, _attempts(loopback(ports), paths=paths, secrets=_secrets(cluster)))
    assert set(found) - {f"{top} can be seen" for top in (folder, keeper)} == set()


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _soft_limit(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line[26:].split()[0] for line in lines if line.startswith(f"Max {name}"))


def _outer(host: Any, inner: int) -> int:
    """Return the number by which the system outside knows a process of a host."""
    return next(int(found.pid) for found in host.processes() if found.inner_pid == inner)


def _listening(cluster: DaskCluster, host: Any) -> Iterator[tuple[str, int, int]]:
    """What listens, beside tunnels: what it is, its port, and the process."""
    scheduler = cluster._master_launcher._service.pid
    yield "scheduler", cluster.master_port, scheduler
    yield "dashboard", int(cluster.dashboard_link.split("/")[2].split(":")[1]), scheduler
    worker = cluster._worker_launcher.workers[0]
    nanny = _outer(host, worker.service.pid)
    yield "nanny", worker.ports["nanny"], nanny
    listeners = {port: found.pid for found in host.processes() for port in _ports_of(found.pid)}
    for use in ("worker", "dashboard"):
        yield f"{use} of the worker", worker.ports[use], listeners[worker.ports[use]]


def _ports_of(pid: int) -> set[int]:
    with contextlib.suppress(OSError):
        inodes = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        return {int(line[1].split(":")[1], 16) for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes}
    return set()


def test_idle_connections_do_not_use_up_descriptors(cluster: DaskCluster, module_hosts: Any) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for what, port, pid in _listening(cluster, module_hosts[0]):
        before = _descriptors(pid)
        assert _soft_limit(pid, "open files") == str(min(most, 65600)), what
        too_many = 100 if what in ("scheduler", "dashboard") else 0  # the others have the same door
        with contextlib.ExitStack() as stack:
            idle = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
                for _ in range(MOST_SILENT + too_many if too_many else 100)
            ]
            for one in idle[:too_many]:
                assert one.recv(1) == b"", what  # ended, since there are too many
            assert _descriptors(pid) < before + MOST_SILENT + 20, what
            with cluster.get_client(timeout=30) as client:
                assert client.submit(sum, [1, 2], pure=False).result(timeout=30) == 3
                assert all(client.run(os.getpid).values())
        until(lambda: _descriptors(pid) < before + 20, f"the {what} to have let go of all")  # noqa: B023


def test_many_who_belong_may_come_at_once(cluster: DaskCluster) -> None:
    context = cluster.security.get_connection_args("client")["ssl_context"]
    with contextlib.ExitStack() as stack:
        came = [
            stack.enter_context(socket.create_connection(("127.0.0.1", cluster.master_port), timeout=30))
            for _ in range(300)  # as when a link that many workers are behind is there again
        ]
        for one in came:
            stack.enter_context(context.wrap_socket(one)).do_handshake()


def test_strangers_do_not_fill_the_log(cluster: DaskCluster) -> None:
    log = cluster._master_launcher._service.log_file
    before = log.read_bytes().count(b"\n")
    dashboard = int(cluster.dashboard_link.split("/")[2].split(":")[1])
    for number in range(100):
        for port in (cluster.master_port, dashboard):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as one:
                one.sendall(b"GET /%d HTTP/1.1\r\nConnection: close\r\n\r\n" % number)
                while one.recv(4096):
                    pass
    with cluster.get_client(timeout=30) as client:
        assert client.submit(sum, [1, 2], pure=False).result(timeout=30) == 3
    written = log.read_bytes().count(b"\n") - before
    assert written < 3 * LINES  # of 200 that were wrong


def test_core_dumps_of_those_who_have_secrets(cluster: DaskCluster, module_hosts: Any) -> None:
    """One byte: a limit of 0 is none where the kernel pipes dumps to a program."""
    processes = {pid: what for what, _, pid in _listening(cluster, module_hosts[0])}
    processes[cluster._master_launcher._service.place.connection.agent_info.pid] = "keeper"
    processes[_outer(module_hosts[0], cluster._group.runtimes[0]._connection.agent_info.pid)] = "agent"
    assert len(processes) == 5
    for pid, what in processes.items():
        assert _soft_limit(pid, "core file size") == "1", what
    # What the user runs has the limits that his processes have on the host.
    theirs = module_hosts[0].run("ulimit -c; ulimit -Hc", user="lazy").stdout
    task = RuntimeTask("limits").run_command("ulimit -c; ulimit -Hc")
    runtime = cluster._group.runtimes[0]
    runtime.execute_task(task, execute_async=False)
    assert "".join(task.execution_log).split() == theirs.split()
    limits = runtime.call(resource.getrlimit, resource.RLIMIT_CORE)
    assert ["unlimited" if limit == resource.RLIM_INFINITY else str(limit // 512) for limit in limits] == theirs.split()


def test_sockets_without_a_file_are_nobodys(cluster: DaskCluster, module_hosts: Any) -> None:
    """Abstract sockets have no permissions: whoever is on the machine could connect to them."""
    for pid in ("self", *(host.pid for host in module_hosts[:2])):
        names = [line.split()[-1] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
        assert [name for name in names if name.startswith("@")] == []


def _environments(hosts: Any) -> Iterator[tuple[str, bytes]]:
    ours = {os.getpid(), *(host.pid for host in hosts), *(hosts.supervisor_pid,)}
    for pid in set(procfs.pids()) - ours:
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                yield f"/proc/{pid}/{name}", Path(f"/proc/{pid}/{name}").read_bytes()


def test_secrets_are_in_memory_only(cluster: DaskCluster, module_hosts: Any, logs: Path, capsys: Any) -> None:
    cluster.print_log()
    seen = dict(_environments(module_hosts))
    seen["print_log"] = capsys.readouterr().out.encode()
    assert b"Registered to" in seen["print_log"]
    seen |= {str(path): path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    for host in module_hosts[:2]:
        for path in private(host):
            with contextlib.suppress(OSError):
                seen[f"{host.name}:{path}"] = Path(f"/proc/{host.pid}/root{path}").read_bytes()
    for thing in (cluster, cluster._group, *cluster._group.runtimes, cluster._dask, cluster._dask.access.credentials):
        seen[f"repr of {type(thing).__name__}"] = f"{thing!r} {thing}".encode()
    for thing in (cluster, cluster._master_launcher, cluster._worker_launcher):
        seen[f"vars of {type(thing).__name__}"] = repr(vars(thing)).encode()
    secrets = _secrets(cluster)
    assert [(where, secret[:4]) for where, text in seen.items() for secret in secrets if secret.encode() in text] == []


def test_logs_are_for_their_owner(cluster: DaskCluster, logs: Path) -> None:
    files = [path for path in logs.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE((logs / "logs").stat().st_mode) == 0o700


def test_a_password_is_in_memory_only(make_hosts: Any, tmp_path: Path) -> None:
    hosts = make_hosts(1, password=True)
    options = {"config_file": hosts.config_file, "password": PASSWORD, "passphrase": "a phrase that passes"}
    with RuntimeGroup(hosts=["host1"], connection_kwargs=options, python=sys.executable) as group:
        runtime = group.runtimes[0]
        runtime.call(os.getpid)
        seen = dict(_environments(hosts))
        things = (group, runtime, runtime._connection, runtime._connection.settings, vars(runtime), vars(group))
        seen |= {f"repr of {type(thing).__name__}": repr(thing).encode() for thing in things}
        for path in below(Path(runtime._connection._space.directory)):
            # The sources of these tests' own modules, which have it, are there for another test's cluster.
            if path.is_file() and "/modules-" not in str(path):
                seen[str(path)] = path.read_bytes()
    for secret in (PASSWORD, "a phrase that passes"):
        assert [where for where, text in seen.items() if secret.encode() in text] == []


def test_a_cluster_is_not_made_public_by_its_hosts(make_hosts: Any) -> None:
    hosts = make_hosts(2, sshd={"GatewayPorts": "yes"})
    options = {"config_file": hosts.config_file}
    with RuntimeGroup(hosts=hosts.names, connection_kwargs=options, python=sys.executable) as group:
        with DaskCluster(group) as cluster, pytest.raises(LazyclusterError, match="GatewayPorts") as caught:
            cluster.start()
        assert "host1" in str(caught.value)
        assert [port for host in hosts for port in host.listening_ports()] == []
