"""Tunnels on real hosts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from lazycluster.core import event_loop
from lazycluster.exceptions import ForwardingForbiddenError, NoPortsLeftError, PortInUseError, TunnelError
from lazycluster.runtime.network import open_from_runtime, open_to_runtime, open_to_runtimes
from lazycluster.ssh import ssh_connection
from lazycluster.ssh.local_connection import LocalConnection
from lazycluster.ssh.probes import can_connect, network_of, same_network
from lazycluster.ssh.ssh_connection import SshConnection
from lazycluster.ssh.tunnels import (
    Tunnel,
    TunnelRequest,
    check_port,
    close_tunnels,
    open_tunnels,
)
from patience import until


@contextlib.contextmanager
def connected(hosts, *names):
    connections = [SshConnection(name, {"config_file": hosts.config_file}) for name in names]

    async def each(what):
        await asyncio.gather(*(getattr(connection, what)() for connection in connections))

    event_loop.run(each("open"), 60)
    try:
        yield connections
    finally:
        event_loop.run(each("close"), 60)


@contextlib.contextmanager
def service(text=b"hello", port=0):
    def serve(reader, writer):
        writer.write(text)
        writer.close()

    async def start():
        return await asyncio.start_server(serve, "127.0.0.1", port)

    async def stop():
        server.close()

    server = event_loop.run(start(), 10)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        event_loop.run(stop(), 10)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def read(port):
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        return connection.makefile("rb").read()


def on_host(host, port):
    code = f"import socket; s = socket.create_connection(('127.0.0.1', {port}), 5); print(s.recv(99).decode())"
    return host.run(f'python3 -c "{code}"').stdout.strip()


@pytest.mark.parametrize(
    ("port", "error"), [(True, TypeError), ("80", TypeError), (0, ValueError), (65536, ValueError)]
)
def test_ports_are_checked(port, error):
    with pytest.raises(error, match="port"):
        check_port(port)


def test_there_and_back(hosts):
    with connected(hosts, "host1", "host2") as (one, two), service() as port:
        assert not event_loop.run(same_network(one))
        assert event_loop.run(can_connect(one))
        with event_loop.run(open_to_runtime(one, port)) as there:
            assert (there.host, there.direction, there.local_port, there.remote_port) == (
                "host1",
                "to_runtime",
                port,
                port,
            )
            assert there.is_open
            assert on_host(hosts[0], port) == "hello"
            here = free_port()
            with event_loop.run(open_from_runtime(one, port, here)) as back:
                assert read(here) == b"hello"
                assert "open" in repr(back)
                with event_loop.run(open_to_runtime(two, back.local_port, 23456)):
                    assert on_host(hosts[1], 23456) == "hello"
            back.close()
            assert not back.is_open
            assert "closed" in repr(back)
            with pytest.raises(ConnectionRefusedError):
                read(here)
        assert hosts[0].listening_ports() == hosts[1].listening_ports() == []


def test_taken_ports(hosts):
    with connected(hosts, "host1", "host2") as (one, two), service() as port:
        with event_loop.run(open_to_runtime(one, port, 24000)):
            with pytest.raises(PortInUseError) as caught:
                event_loop.run(open_to_runtime(one, port, 24000))
            assert (caught.value.port, caught.value.host) == (24000, "host1")
            with pytest.raises(PortInUseError):
                event_loop.run(open_to_runtimes([two, one], port, 24000))
            assert hosts[1].listening_ports() == []
            with pytest.raises(NoPortsLeftError, match="host1"):
                event_loop.run(open_to_runtime(one, port, [24000]))
            tunnels = event_loop.run(open_to_runtimes([one, two], port, range(24000, 24010)))
            assert [tunnel.remote_port for tunnel in tunnels] == [24001, 24001]
            event_loop.run(close_tunnels(tunnels))
            with socket.create_server(("127.0.0.1", 0)) as blocker:
                taken = blocker.getsockname()[1]
                with pytest.raises(PortInUseError) as caught:
                    event_loop.run(open_from_runtime(one, 24000, taken))
                assert (caught.value.port, caught.value.host) == (taken, "localhost")
                free = free_port()
                with event_loop.run(open_from_runtime(one, 24000, [taken, free])) as tunnel:
                    assert tunnel.local_port == free
                    assert read(free) == b"hello"
                with pytest.raises(NoPortsLeftError):
                    event_loop.run(open_from_runtime(one, 24000, [taken]))
        with pytest.raises(NoPortsLeftError, match="empty"):
            event_loop.run(open_to_runtime(one, port, []))
        with pytest.raises(TunnelError, match="privileged on host1"):
            event_loop.run(open_to_runtime(one, port, 80))


def test_a_tunnel_asks_its_host_only_what_it_must(hosts, monkeypatch):
    """Of several ports once; and whether an sshd opens ports to its whole network once for each ssh process."""
    asked, channel = [], SshConnection.channel

    def noted(self, op, *args, **options):
        asked.append(op)
        return channel(self, op, *args, **options)

    def new():
        found = [op for op in asked if op != "tunnels"]  # that is told, whenever the number of tunnels changes
        asked.clear()
        return found

    with connected(hosts, "host1") as (one,), service() as port:
        monkeypatch.setattr(SshConnection, "channel", noted)
        with event_loop.run(open_to_runtime(one, port, range(24000, 24010))) as first:
            assert new() == ["ports", "exposed"]
            with event_loop.run(open_to_runtime(one, port, range(24000, 24010))) as second:
                assert (first.remote_port, second.remote_port) == (24000, 24001)
                assert new() == ["ports"]
            new()  # a port is closed once the host answers
            with pytest.raises(PortInUseError):
                event_loop.run(open_to_runtime(one, port, 24000))
            assert new() == ["ports"]
            event_loop.run(open_from_runtime(one, 24000, free_port())).close()
            assert new() == ["nonce"]
            event_loop.run(open_from_runtime(one, 24000, free_port())).close()
            assert new() == []
            os.kill(one._process.pid, signal.SIGKILL)
            until(lambda: one.interruptions == 1 and one.state == "open", "the link")
            new()
            event_loop.run(open_to_runtime(one, port, 24005)).close()
            assert [op for op in new() if op != "ping"] == ["ports", "exposed"]


def test_forbidden_forwarding_is_named(make_hosts):
    hosts = make_hosts(1, forwarding=False)
    with connected(hosts, "host1") as (one,), service() as port:
        assert not event_loop.run(can_connect(one))
        with pytest.raises(TunnelError, match=r"host1.*AllowTcpForwarding, PermitListen"):
            event_loop.run(open_to_runtime(one, port, 24000))
        with pytest.raises(TunnelError, match=r"host1.*AllowTcpForwarding, PermitOpen"):
            event_loop.run(open_from_runtime(one, 24000))
        assert 24000 not in hosts[0].listening_ports()


def test_one_permitted_port_is_enough(make_hosts):
    hosts = make_hosts(1, sshd={"PermitOpen": "127.0.0.1:24000", "PermitListen": "127.0.0.1:24000"})
    with connected(hosts, "host1") as (one,), service() as port:
        with pytest.raises(TunnelError, match="PermitListen"):
            event_loop.run(open_to_runtime(one, port, 24001))
        here = free_port()
        with event_loop.run(open_to_runtime(one, port, 24000)), event_loop.run(open_from_runtime(one, 24000, here)):
            assert read(here) == b"hello"


def test_gateway_ports_of_the_user_do_not_matter(make_hosts):
    hosts = make_hosts(1, ssh_config=("GatewayPorts yes", "LocalForward 23999 localhost:1"))
    with connected(hosts, "host1") as (one,), service() as port, event_loop.run(open_to_runtime(one, port, 24000)):
        here = free_port()
        with event_loop.run(open_from_runtime(one, 24000, here)):
            assert read(here) == b"hello"
            lines = Path("/proc/net/tcp").read_text().splitlines()
            listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
            assert f"0100007F:{here:04X}" in listening
            assert f"00000000:{here:04X}" not in listening
            assert all(int(address.split(":")[1], 16) != 23999 for address in listening)


def test_a_host_that_makes_every_tunnel_public_is_refused(make_hosts):
    hosts = make_hosts(1, sshd={"GatewayPorts": "yes"})
    with connected(hosts, "host1") as (one,), service() as port:
        requests = [TunnelRequest(one, "to_runtime", port, remote) for remote in (24000, 24001)]
        outcomes = event_loop.run(open_tunnels([*requests, TunnelRequest(one, "from_runtime", free_port(), 22)]))
        assert [type(outcome) for outcome in outcomes] == [ForwardingForbiddenError, ForwardingForbiddenError, Tunnel]
        assert re.search(r"host1: port 24000 .* GatewayPorts", str(outcomes[0]))
        assert hosts[0].listening_ports() == []
        outcomes[2].close()


def test_a_host_that_lets_the_client_choose_the_address_is_as_good_as_any(make_hosts):
    hosts = make_hosts(1, sshd={"GatewayPorts": "clientspecified"})
    with connected(hosts, "host1") as (one,), service() as port, event_loop.run(open_to_runtime(one, port, 24000)):
        assert on_host(hosts[0], 24000) == "hello"


def test_a_connection_that_ends_takes_its_tunnels_along(hosts):
    with service() as port:
        with connected(hosts, "host1") as (one,):
            tunnel = event_loop.run(open_to_runtime(one, port, 24000))
            assert tunnel.is_open
        assert not tunnel.is_open
        tunnel.close()
        assert hosts[0].listening_ports() == []


def test_a_port_that_cannot_be_had_again_is_lost_for_good_and_said_so(hosts, monkeypatch, caplog):
    """Somebody else has taken it while the link was down."""
    attempt, taken = SshConnection._attempt, asyncio.Event()

    async def attempt_later(self, timeout):
        await taken.wait()
        await attempt(self, timeout)

    monkeypatch.setattr(ssh_connection, "_PORTS_LIMIT", 0.0)
    with service() as port, connected(hosts, "host1") as (one,):
        there, here = event_loop.run(open_to_runtime(one, port, 24000)), free_port()
        back = event_loop.run(open_from_runtime(one, 24000, here))
        monkeypatch.setattr(SshConnection, "_attempt", attempt_later)
        os.kill(one._process.pid, signal.SIGKILL)
        until(lambda: one.state == "interrupted", "the loss of the link")
        with service(port=here):
            event_loop.get_loop().call_soon_threadsafe(taken.set)
            assert back.wait(30)
            assert not back.is_open
            until(lambda: one.state == "open", "the link")
            assert there.is_open
            assert on_host(hosts[0], 24000) == "hello"
        assert "is not forwarded any more" in caplog.text
        with event_loop.run(open_from_runtime(one, 24000, here)):  # the port is free again
            assert read(here) == b"hello"


def test_a_mesh_at_once(hosts):
    with connected(hosts, "host1", "host2", "host3") as connections, service() as port:
        start = time.perf_counter()
        requests = [TunnelRequest(c, "to_runtime", port, 21000 + n) for c in connections for n in range(100)]
        requests.append(TunnelRequest(connections[0], "to_runtime", port, 80))
        outcomes = event_loop.run(open_tunnels(requests))
        assert time.perf_counter() - start < 10
        assert [isinstance(outcome, Tunnel) for outcome in outcomes] == [True] * 300 + [False]
        assert on_host(hosts[2], 21099) == "hello"
        event_loop.run(close_tunnels(outcomes[:-1]))
        assert [host.listening_ports() for host in hosts] == [[], [], []]


def test_two_names_of_one_machine(hosts, tmp_path):
    config = tmp_path / "config"
    text = Path(hosts.config_file).read_text()
    config.write_text(re.sub(r"(?m)^Host host1\b", "Host host1 alias", text))
    connections = [SshConnection(name, {"config_file": str(config)}) for name in ("host1", "alias", "host2")]

    async def main(port):
        await asyncio.gather(*(connection.open() for connection in connections))
        try:
            assert network_of(connections[0]) == network_of(connections[1]) != network_of(connections[2])
            tunnels = await open_to_runtimes(connections, port, [24000, 24001])
            assert [tunnel.remote_port for tunnel in tunnels] == [24000] * 3
            await close_tunnels(tunnels)
        finally:
            await asyncio.gather(*(connection.close() for connection in connections))

    with service() as port:
        event_loop.run(main(port), 60)


def test_without_ssh_the_same_port_needs_nothing_and_another_is_relayed():
    connection = LocalConnection()
    event_loop.run(connection.open(), 30)
    try:
        with service() as port:
            assert event_loop.run(same_network(connection))
            with event_loop.run(open_to_runtime(connection, port)) as same:
                assert (same.remote_port, same.is_open) == (port, True)
            assert read(port) == b"hello"
            other = free_port()
            with event_loop.run(open_from_runtime(connection, port, [other])) as relayed:
                assert relayed.local_port == other
                assert read(other) == b"hello"
                with pytest.raises(PortInUseError):
                    event_loop.run(open_from_runtime(connection, port, other))
            with pytest.raises(ConnectionRefusedError):
                read(other)
            left_open = event_loop.run(open_to_runtime(connection, port, free_port()))
    finally:
        event_loop.run(connection.close(), 30)
    assert not left_open.is_open
    with pytest.raises(ConnectionRefusedError):
        read(left_open.remote_port)


def test_errors_can_be_pickled():
    for error in (PortInUseError(5, "h"), TunnelError("x"), NoPortsLeftError("y")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
