"""Which hosts reach each other: the probe, on hosts with firewalls, several addresses, and strangers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lazycluster.core import event_loop
from lazycluster.runtime.reachability import ProbedHost, Reachability, ReachabilityCache, probe
from lazycluster.ssh.ssh_connection import SshConnection

PORTS = (25001, 25002)


@pytest.fixture(scope="module")
def connections(module_hosts: Any) -> Iterator[list[SshConnection]]:
    with connected(module_hosts) as connections:
        yield connections


@contextlib.contextmanager
def connected(hosts: Any, **settings: Any) -> Iterator[list[SshConnection]]:
    connections = [SshConnection(name, {"config_file": hosts.config_file, **settings}) for name in hosts.names]

    async def each(what: str) -> None:
        await asyncio.gather(*(getattr(connection, what)() for connection in connections))

    event_loop.run(each("open"), 60)
    try:
        yield connections
    finally:
        event_loop.run(each("close"), 60)


def found(connections: Sequence[SshConnection], ports: tuple[int, ...] = PORTS, **addresses: str) -> Reachability:
    hosts = [ProbedHost(one.host, one, ports, address=addresses.get(one.host)) for one in connections]
    return event_loop.run(probe(hosts), 30)


@contextlib.contextmanager
def firewall(host: Any, *rule: str) -> Iterator[None]:
    """Have a host drop or refuse what comes in."""
    host.run(["/usr/sbin/iptables", "-I", "INPUT", "-p", "tcp", *rule])
    try:
        yield
    finally:
        host.run(["/usr/sbin/iptables", "-D", "INPUT", "-p", "tcp", *rule])


@contextlib.contextmanager
def further_address(host: Any, address: str) -> Iterator[None]:
    host.run(["ip", "address", "add", address, "dev", "eth0"])
    try:
        yield
    finally:
        host.run(["ip", "address", "del", address, "dev", "eth0"])


@contextlib.contextmanager
def listening(host: Any, address: str, port: int, greeting: str = "") -> Iterator[None]:
    """Have somebody else's service listen on a host; it repeats what it is told."""
    code = (
        "import socket, sys\n"
        f"server = socket.create_server(({address!r}, {port}))\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    caller = server.accept()[0]\n"
        "    caller.sendall(caller.recv(99))\n"
        "    caller.close()\n"
    )
    command = ["nsenter", "-t", str(host.pid), "-n", "python3", "-c", code]
    service = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert service.stdout is not None
        assert service.stdout.readline() == b"ready\n"
        yield
    finally:
        service.kill()
        service.communicate()


def test_hosts_of_one_network_reach_each_other(connections: list[SshConnection], module_hosts: Any) -> None:
    outcome = found(connections)
    assert outcome.is_proven
    assert {host: one.address for host, one in outcome.addresses.items()} == {h.name: h.address for h in module_hosts}
    assert all(one.bind == one.address for one in outcome.addresses.values())
    # Nothing is left of it: the services that come next listen on the same ports.
    for connection in connections:
        assert event_loop.run(connection.request("ports", ports=list(PORTS)), 10)["free"] == list(PORTS)


@pytest.mark.parametrize(
    ("action", "why"), [(("REJECT", "--reject-with", "tcp-reset"), "refused"), (("DROP",), "no answer within 2 s")]
)
def test_one_direction_that_is_blocked_is_named(
    connections: list[SshConnection], module_hosts: Any, action: tuple[str, ...], why: str
) -> None:
    first, second = module_hosts[0], module_hosts[1]
    for source, target in ((first, second), (second, first)):
        with firewall(target, "-s", source.address, "--dport", str(PORTS[1]), "-j", *action):
            outcome = found(connections)
        wanted = f"{source.name} cannot reach {target.name} at {target.address}:{PORTS[1]}: {why}"
        assert str(outcome) == wanted
        assert target.name not in outcome.addresses


def test_a_port_that_one_host_uses_is_dialed_by_that_one(connections: list[SshConnection], module_hosts: Any) -> None:
    """As that of a nanny, to which none but the scheduler connects: others may be kept from it."""
    target = module_hosts[2]
    only_from = {PORTS[1]: connections[0]}
    hosts = [ProbedHost(one.host, one, PORTS, only_from=only_from) for one in connections]
    for source, is_asked in ((module_hosts[0], True), (module_hosts[1], False)):
        rule = "-s", source.address, "--dport", str(PORTS[1]), "-j", "REJECT", "--reject-with", "tcp-reset"
        with firewall(target, *rule):
            outcome = event_loop.run(probe(hosts), 30)
        refused = f"{source.name} cannot reach {target.name} at {target.address}:{PORTS[1]}: refused"
        assert [str(one) for one in outcome.obstacles] == [refused] * is_asked


def test_of_two_addresses_the_one_that_works_is_taken(connections: list[SshConnection], module_hosts: Any) -> None:
    host = module_hosts[2]
    others = host.address.rpartition(".")[0]
    with (
        further_address(host, f"{others}.99/24"),
        firewall(host, "-d", host.address, "--dport", f"{PORTS[0]}:{PORTS[1]}", "-j", "DROP"),
    ):
        outcome = found(connections)
        assert outcome.is_proven
        assert outcome.addresses[host.name].address == f"{others}.99"


def test_an_address_that_is_stated_is_the_only_one(connections: list[SshConnection], module_hosts: Any) -> None:
    host, others = module_hosts[0], module_hosts[0].address.rpartition(".")[0]
    with further_address(host, f"{others}.97/24"):  # one that nobody had before: neighbours remember that
        outcome = found(connections, **{host.name: f"{others}.97"})
        assert outcome.addresses[host.name].address == f"{others}.97"
    outcome = found(connections, **{host.name: f"{others}.98"})
    assert f"cannot reach {host.name} at {others}.98:{PORTS[0]}: no " in str(outcome)  # answer, or route to it


def test_an_address_of_somebody_elses_machine_proves_nothing(
    connections: list[SshConnection], module_hosts: Any
) -> None:
    # It is stated for host1, but it is that of the manager's machine, where a service repeats what it is told.
    with socket.create_server((module_hosts.manager_address, PORTS[0])) as server:
        server.settimeout(30)

        def repeat() -> None:
            with contextlib.suppress(OSError):
                while True:
                    caller = server.accept()[0]
                    caller.sendall(caller.recv(99))
                    caller.close()

        thread = threading.Thread(target=repeat)
        thread.start()
        try:
            outcome = found(connections[:2], PORTS[:1], host1=module_hosts.manager_address)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert [obstacle.why for obstacle in outcome.obstacles] == ["something else than our listener answers there"]
    assert outcome.obstacles[0].target == "host1"


def test_another_host_of_the_group_is_not_taken_for_the_one_that_is_meant(
    connections: list[SshConnection], module_hosts: Any
) -> None:
    outcome = found(connections, PORTS[:1], host1=module_hosts[1].address)
    assert {str(obstacle) for obstacle in outcome.obstacles} == {
        f"host2 cannot reach host1 at {module_hosts[1].address}:{PORTS[0]}: host2 has that address, too",
        f"host3 cannot reach host1 at {module_hosts[1].address}:{PORTS[0]}: host2 answers there",
    }


def test_a_port_that_is_taken_is_told_apart_from_one_that_is_blocked(
    connections: list[SshConnection], module_hosts: Any
) -> None:
    with listening(module_hosts[1], module_hosts[1].address, PORTS[0]):
        outcome = found(connections)
    assert outcome.taken == {"host2": (PORTS[0],)}
    assert not outcome.obstacles


def test_a_service_that_runs_is_only_connected_to(connections: list[SshConnection], module_hosts: Any) -> None:
    with listening(module_hosts[1], module_hosts[1].address, 25003):
        hosts = [ProbedHost(one.host, one, PORTS, running=(25003,) * (one.host == "host2")) for one in connections]
        assert event_loop.run(probe(hosts), 30).is_proven
    outcome = event_loop.run(probe(hosts), 30)
    assert {(one.target, one.port, one.why) for one in outcome.obstacles} == {("host2", 25003, "refused")}


def test_strangers_get_no_answer(connections: list[SshConnection], module_hosts: Any) -> None:
    host = module_hosts[0]
    listens = asyncio.Event()

    async def ask() -> bytes:
        params = {"key": "00" * 32, "me": 0, "ports": [PORTS[0]], "address": ""}
        channel = connections[0].channel("reach", params, event=lambda _: listens.set())
        await listens.wait()
        try:
            reader, writer = await asyncio.open_connection(host.address, PORTS[0])
            writer.write(b"x" * 32)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return answer
        finally:
            channel.close()

    assert event_loop.run(ask(), 20) == b""


def test_ipv6_alone(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    for number, host in enumerate(hosts):
        host.run(["/usr/sbin/sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0"], check=False)
        host.run(["ip", "-6", "address", "add", f"fd00:1::{number + 1}/64", "dev", "eth0", "nodad"])
    with (
        connected(hosts) as connections,
        firewall(hosts[0], "-s", hosts[1].address, "-j", "DROP"),
        firewall(hosts[1], "-s", hosts[0].address, "-j", "DROP"),
    ):
        outcome = found(connections)
    assert {host: one.address for host, one in outcome.addresses.items()} == {
        "host1": "fd00:1::1",
        "host2": "fd00:1::2",
    }


def test_equal_private_addresses_behind_different_bastions(make_hosts: Any) -> None:
    sets = [make_hosts(1, bastion=True), make_hosts(1, bastion=True)]
    for hosts in sets:
        hosts[0].run(["ip", "address", "add", "192.168.1.5/24", "dev", "eth0"])
    with connected(sets[0]) as first, connected(sets[1]) as second:
        both = [*first, *second]
        stated = [ProbedHost(f"site{n}", one, PORTS[:1], address="192.168.1.5") for n, one in enumerate(both)]
        outcome = event_loop.run(probe(stated), 30)
        assert {str(one) for one in outcome.obstacles} == {
            "site1 cannot reach site0 at 192.168.1.5:25001: site1 has that address, too",
            "site0 cannot reach site1 at 192.168.1.5:25001: site0 has that address, too",
        }


def test_what_was_proven_is_asked_again_when_a_host_joins_or_comes_back_with_another_address(
    make_hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[list[str]] = []

    async def counted(hosts: Sequence[ProbedHost]) -> Reachability:
        probes.append([one.host for one in hosts])
        return await probe(hosts)

    monkeypatch.setattr("lazycluster.runtime.reachability.probe", counted)
    hosts = make_hosts(3)
    with connected(hosts, link_timeout=2) as connections:
        cache = ReachabilityCache()

        def prove(count: int, ports: tuple[int, ...] = PORTS, master: SshConnection | None = None) -> Reachability:
            only_from = {} if master is None else {ports[-1]: master}
            asked = [ProbedHost(one.host, one, ports, only_from=only_from) for one in connections[:count]]
            return event_loop.run(cache.prove(asked), 30)

        assert prove(2).is_proven
        assert prove(2, PORTS[:1]).is_proven
        assert probes == [["host1", "host2"]]
        assert prove(3).is_proven
        assert prove(3, (25009,)).is_proven
        assert probes[1:] == [["host1", "host2", "host3"]] * 2
        # What one host has dialed is known of that one; what all have, of each.
        for master, count in (
            (connections[0], 4),
            (connections[0], 4),
            (connections[1], 5),
            (None, 6),
            (connections[2], 6),
        ):
            assert prove(3, (25011,), master).is_proven
            assert len(probes) == count
        # The link of host2 drops; meanwhile it gets another address.
        new = f"{hosts[1].address.rpartition('.')[0]}.88"
        interrupted, back = asyncio.Event(), asyncio.Event()
        connections[1].on_state(lambda state, _: (interrupted if state == "interrupted" else back).set())
        hosts[1].run("pkill -KILL -f 'sshd: lazy'", check=False)
        event_loop.run(asyncio.wait_for(interrupted.wait(), 30), 40)
        hosts[1].run(["ip", "address", "add", f"{new}/24", "dev", "eth0"])
        event_loop.run(asyncio.wait_for(back.wait(), 30), 40)
        with firewall(hosts[1], "-d", hosts[1].address, "--dport", str(PORTS[0]), "-j", "DROP"):
            outcome = prove(3)
        assert len(probes) == 7
        assert outcome.addresses["host2"].address == new
