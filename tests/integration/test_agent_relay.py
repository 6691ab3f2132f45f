"""Tunnels through the agent, on hosts whose sshd carries none."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lazycluster import RuntimeGroup
from lazycluster.exceptions import PortInUseError, TunnelError
from lazycluster.runtimes import Runtime
from lazycluster.ssh import workspace
from lazycluster.ssh.agent_relay import AgentRelay

_SIZE = 6_000_000

# Takes all that comes until its end, then answers with the same.
_ECHO = """
import os, socket, sys, threading
def serve(sock):
    with sock:
        data = b"".join(iter(lambda: sock.recv(65536), b""))
        sock.sendall(data)
def accept(server):
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
server = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=300)
print("up", flush=True)
threading.Thread(target=accept, args=(server,), daemon=True).start()
sys.stdin.read()
os._exit(0)
"""

_CLIENT = """
import hashlib, random, socket, sys
data = random.Random(5).randbytes(int(sys.argv[2]))
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20) as sock:
    import threading
    threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR))).start()
    back = b"".join(iter(lambda: sock.recv(65536), b""))
print("same" if back == data else "different", len(back))
"""


def _runtime(hosts: Any, **options: Any) -> Runtime:
    return Runtime("host1", connection_kwargs={"config_file": hosts.config_file, "relay": "agent", **options})


@contextlib.contextmanager
def _echo(host: Any, port: int) -> Iterator[None]:
    """A service that listens on a port of a host, or with None on this machine."""
    argv = [sys.executable if host is None else "python3", "-c", _ECHO, str(port)]
    argv = argv if host is None else host.inside(argv)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            yield
        finally:
            process.stdin.close()  # it ends then


def _exchange(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 20) as sock:

        def send() -> None:
            with contextlib.suppress(OSError):  # that it has ended is seen below
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        back = b"".join(iter(lambda: sock.recv(65536), b""))
        sender.join()
        return back


def _until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_bytes_arrive_both_ways(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False, max_sessions=2, rc="noisy")
    data = random.Random(1).randbytes(_SIZE)
    with _runtime(hosts) as runtime, _echo(hosts[0], 5001), _echo(None, 5002):
        runtime.expose_port_from_runtime(5001, 6001)
        runtime.expose_port_to_runtime(5002, 6002)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((hosts[0].address, 6002), 2)  # on loopback only
        assert hashlib.sha256(_exchange(6001, data)).digest() == hashlib.sha256(data).digest()
        said = hosts[0].run(f"python3 -c '{_CLIENT}' 6002 {_SIZE}").stdout
        assert said == f"same {_SIZE}\n"
        with ThreadPoolExecutor(32) as pool:
            small = [str(number).encode() * 100 for number in range(250)]
            assert list(pool.map(lambda one: _exchange(6001, one), small)) == small
        assert runtime.call(sum, [1, 2]) == 3


def test_who_reads_slowly_holds_up_nobody_else(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False)
    with _runtime(hosts) as runtime, _echo(hosts[0], 5001):
        runtime.expose_port_from_runtime(5001, 6001)
        data = random.Random(2).randbytes(4 * _SIZE)
        with socket.create_connection(("127.0.0.1", 6001), 20) as slow:
            slow.sendall(data)
            slow.shutdown(socket.SHUT_WR)
            # All of it is under way back, and nobody takes it.
            assert _exchange(6001, b"quick") == b"quick"
            assert b"".join(iter(lambda: slow.recv(65536), b"")) == data


def test_what_is_not_there_is_said(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False)
    with _runtime(hosts) as runtime, _echo(hosts[0], 5001):
        key = runtime.expose_port_from_runtime(5009, 6009)
        with socket.create_connection(("127.0.0.1", 6009), 20) as sock:
            assert sock.recv(1) == b""  # nobody listens there: as with ssh, the connection ends
        with pytest.raises(PortInUseError, match="5001"):
            runtime.expose_port_to_runtime(5002, 5001)
        with socket.create_server(("127.0.0.1", 6010)), pytest.raises(PortInUseError, match="6010"):
            runtime.expose_port_from_runtime(5001, 6010)
        runtime.stop_process(key)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", 6009), 20)
        runtime.expose_port_to_runtime(5002, 6009)
        _until(lambda: 6009 in hosts[0].listening_ports())
    _until(lambda: 6009 not in hosts[0].listening_ports())


def test_nobody_is_relayed_unasked(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False)
    with _runtime(hosts, relay=None) as runtime:
        for expose in (runtime.expose_port_from_runtime, runtime.expose_port_to_runtime):
            with pytest.raises(TunnelError, match=r'not forbidden on purpose.*"relay": "agent"'):
                expose(5001, 6001)


def test_a_host_without_room_for_a_session(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False, max_sessions=1)
    with _runtime(hosts) as runtime, pytest.raises(TunnelError, match="MaxSessions 2"):
        runtime.expose_port_from_runtime(5001, 6001)


def test_a_host_that_forwards_is_not_relayed(hosts: Any) -> None:
    with _runtime(hosts) as runtime:
        before = len(hosts[0].sessions())
        runtime.expose_port_from_runtime(5001, 6001)
        assert runtime.get_processes(only_alive=True)
        assert len(hosts[0].sessions()) == before


def test_a_runtime_that_ends_while_a_port_is_exposed(make_hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    async def hang(_: AgentRelay) -> None:
        begun.set()
        await asyncio.sleep(600)

    monkeypatch.setattr(AgentRelay, "_start", hang)
    with _runtime(make_hosts(1, forwarding=False)) as runtime, ThreadPoolExecutor() as pool:
        exposing = pool.submit(runtime.expose_port_from_runtime, 5001, 6001)
        assert begun.wait(60)
        runtime.cleanup()
        with pytest.raises(TunnelError, match="the connection was closed"):
            exposing.result(60)


def test_a_relay_that_ends_comes_back_with_its_tunnels(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False)
    with _runtime(hosts) as runtime, _echo(hosts[0], 5001):
        agent = runtime._connection.agent_info.pid
        before = _children(runtime, agent)
        runtime.expose_port_from_runtime(5001, 6001)
        assert _exchange(6001, b"before") == b"before"
        (victim,) = set(_children(runtime, agent)) - set(before)
        with socket.create_connection(("127.0.0.1", 6001), 20) as sock:
            runtime.call(os.kill, victim, signal.SIGKILL)
            assert sock.recv(1) == b""
        _until(lambda: _works(6001))


def test_a_keeper_that_is_killed_takes_it_along_and_the_next_one_brings_it_back(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False)
    with _runtime(hosts) as runtime, _echo(hosts[0], 5001):
        runtime.expose_port_from_runtime(5001, 6001)
        assert _works(6001)
        [space] = workspace._spaces.values()
        os.kill(space.keeper.agent_info.pid, signal.SIGKILL)
        _until(lambda: space.keeper.generation == 2 and _works(6001))


def test_a_link_that_drops_takes_it_along_and_brings_it_back(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False)
    with _runtime(hosts) as runtime, _echo(hosts[0], 5001), _echo(None, 5002):
        runtime.expose_port_from_runtime(5001, 6001)
        key = runtime.expose_port_to_runtime(5002, 6002)
        closed = runtime.expose_port_from_runtime(5001, 6003)
        with socket.create_connection(("127.0.0.1", 6001), 20) as sock:
            for session in hosts[0].sessions():
                os.kill(session.pid, signal.SIGKILL)
            runtime.stop_process(closed)
            assert sock.recv(1) == b""
        _until(lambda: _works(6001))
        _until(lambda: 6002 in hosts[0].listening_ports())
        assert runtime.get_process(key).is_alive()
        assert not _works(6003)


def test_a_host_that_has_gone_takes_its_tunnels_along(make_hosts: Any) -> None:
    hosts = make_hosts(1, forwarding=False)
    with _runtime(hosts, grace=0, link_timeout=2) as runtime:
        key = runtime.expose_port_from_runtime(5001, 6001)
        hosts[0].power_off()
        _until(lambda: not runtime.get_process(key).is_alive())
        _until(lambda: _refused(6001))


def _works(port: int) -> bool:
    try:
        return _exchange(port, b"after") == b"after"
    except OSError:
        return False


def _refused(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def _children(runtime: Runtime, pid: int) -> list[int]:
    """The processes that an agent has forked and not handed on: those of functions are their zygotes'."""

    def look() -> list[int]:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]

    return list(runtime.call(look))


def test_a_dask_cluster_where_nothing_is_forwarded(make_hosts: Any) -> None:
    pytest.importorskip("distributed")
    pytest.importorskip("cryptography")
    from lazycluster.cluster.dask_cluster import DaskCluster

    hosts = make_hosts(2, forwarding=False)
    options = {"connection_kwargs": {"config_file": hosts.config_file, "relay": "agent"}, "python": sys.executable}
    with RuntimeGroup(hosts=["host1", "host2"], **options) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            first = client.submit(bytes, 3_000_000, workers=["host1-0"], pure=False)
            assert client.submit(len, first, workers=["host2-0"], pure=False).result(timeout=30) == 3_000_000
            cluster.scale(1)
            assert client.submit(len, first, pure=False).result(timeout=30) == 3_000_000
