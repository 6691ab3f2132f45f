"""Hosts that accept a connection and say nothing: others never wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster.cli.fanout import HostOutcome, everywhere
from lazycluster.cli.options import Targets
from lazycluster.core import event_loop
from lazycluster.ssh.connect_limit import AT_ONCE, PER_JUMP_HOST
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.ssh_connection import SshConnection

_LISTEN = (
    "import socket, sys; s = socket.create_server(('127.0.0.1', 2200), backlog=99); print(flush=True); sys.stdin.read()"
)
_FOR_EVER = 3600.0


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * AT_ONCE) as server:
        yield server.getsockname()[1]


@contextlib.asynccontextmanager
async def connecting(names: list[str], settings: dict[str, Any]) -> Any:
    connections = [SshConnection(name, {**settings, "timeout": _FOR_EVER}) for name in names]
    tasks = [asyncio.ensure_future(connection.open()) for connection in connections]
    await asyncio.sleep(0)
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def opens_meanwhile(names: list[str], silent: list[str], settings: dict[str, Any]) -> None:
    async with connecting(silent, settings):
        good = [SshConnection(name, settings) for name in names]
        try:
            await asyncio.gather(*(connection.open() for connection in good))
        finally:
            await asyncio.gather(*(connection.close() for connection in good))


def with_silent(hosts: Any, tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "config"
    path.write_text("Host silent*\n  HostName 127.0.0.1\n" + "".join(f"  {line}\n" for line in lines))
    path.write_text(path.read_text() + Path(hosts.config_file).read_text())
    return str(path)


def test_more_than_are_connected_at_once(hosts: Any, tmp_path: Path, silent: int) -> None:
    config = with_silent(hosts, tmp_path, f"Port {silent}")
    names = [f"silent{number}" for number in range(AT_ONCE + 1)]
    event_loop.run(opens_meanwhile(hosts.names, names, {"config_file": config}), 90)


def test_behind_a_jump_host(make_hosts: Callable[..., Any], tmp_path: Path) -> None:
    hosts = make_hosts(1, bastion=True)
    config = with_silent(hosts, tmp_path, "Port 2200", "ProxyJump bastion")
    names = [f"silent{number}" for number in range(PER_JUMP_HOST + 1)]
    argv = hosts.bastion.inside(["python3", "-c", _LISTEN])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"\n"
        event_loop.run(opens_meanwhile(hosts.names, names, {"config_file": config}), 90)
        server.communicate()


def test_commands_on_many_hosts(hosts: Any, tmp_path: Path, silent: int) -> None:
    """A command of the command line that works on few hosts at once."""
    settings = {"config_file": with_silent(hosts, tmp_path, f"Port {silent}"), "timeout": _FOR_EVER}

    async def main() -> None:
        left = set(hosts.names)
        done = asyncio.Event()

        async def work(connection: Connection) -> HostOutcome:
            return HostOutcome(connection.host)

        def on_done(outcome: HostOutcome) -> None:
            assert outcome.kind == "done"
            left.discard(outcome.host)
            if not left:
                done.set()

        targets = Targets(["silent1", "silent2", "silent3", *hosts.names], settings=settings)
        whole = asyncio.ensure_future(everywhere(targets, work, 2, on_done))
        await done.wait()
        whole.cancel()
        await asyncio.wait({whole})

    event_loop.run(main(), 90)
