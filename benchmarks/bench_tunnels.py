"""Bytes through an exposed port, both ways, beside plain `ssh -L` and `ssh -R` with the same configuration."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from harness import Row, in_turns, settings, ssh_hosts

from lazycluster import Runtime

SIZE = 400_000_000
SERVE = """
import socket
server = socket.create_server(("127.0.0.1", {port}))
while True:
    client = server.accept()[0]
    while client.recv(1 << 20):
        pass
    client.sendall(b"x")
    client.close()
"""
FILL = """
import socket
client = socket.create_connection(("127.0.0.1", {port}))
block = bytes(1 << 20)
for _ in range({count}):
    client.sendall(block)
client.shutdown(1)
client.recv(1)
"""


def push(port: int) -> None:
    """Send SIZE bytes to a port here, and wait until the sink has read them all."""
    block = bytes(1 << 20)
    with socket.create_connection(("127.0.0.1", port)) as sink:
        for _ in range(SIZE >> 20):
            sink.sendall(block)
        sink.shutdown(socket.SHUT_WR)
        assert sink.recv(1) == b"x"


@contextlib.contextmanager
def sink() -> Iterator[int]:
    """Serve a port here that swallows bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = server.accept()[0]
                    while client.recv(1 << 20):
                        pass
                    client.sendall(b"x")
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def until_listening(port: int) -> None:
    """Wait until a port here takes connections."""
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def plain(hosts: Any, *forward: str) -> Iterator[None]:
    process = subprocess.Popen(["ssh", "-F", str(hosts.config_file), "-N", *forward, hosts.names[0]])
    try:
        until_listening(7102)
        yield
    finally:
        process.terminate()
        process.wait()


def rows() -> Iterator[Row]:
    with ssh_hosts(1) as hosts, Runtime(hosts.names[0], connection_kwargs=settings(hosts)) as runtime, sink() as here:
        server = subprocess.Popen(hosts[0].inside(["python3", "-c", SERVE.format(port=7001)]))
        runtime.expose_port_from_runtime(7001, 7101)
        runtime.expose_port_to_runtime(here, 7201)

        def pull(port: int) -> None:
            program = FILL.format(port=port, count=SIZE >> 20)
            subprocess.run(hosts[0].inside(["python3", "-c", program]), check=True)

        with plain(hosts, "-L", "7102:127.0.0.1:7001", "-R", f"7202:127.0.0.1:{here}"):
            times = in_turns(
                5,
                to_ours=lambda: push(7101),
                to_ssh=lambda: push(7102),
                ours=lambda: pull(7201),
                ssh=lambda: pull(7202),
            )
        server.kill()
        server.wait()
    for what, mine, theirs, peer in (
        ("bytes to a host through an exposed port", "to_ours", "to_ssh", "ssh -L"),
        ("bytes from a host through an exposed port", "ours", "ssh", "ssh -R"),
    ):
        rate, other = SIZE / times[mine] / 1e6, SIZE / times[theirs] / 1e6
        yield Row(what, rate, "MB/s", ">= 0.9 x", peer, other, rate >= 0.9 * other)
