"""Copies to and from real hosts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from filetrees import make_large, make_large_there, make_tree, state
from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.local_connection import LocalConnection
from lazycluster.ssh.ssh_connection import SshConnection
from lazycluster.ssh.transfer import TransferError, get, send


def with_connections(connections: list[Connection], body: Callable[..., Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        try:
            await asyncio.gather(*[connection.open() for connection in connections])
            return await body(*connections)
        finally:
            await asyncio.gather(*[connection.close() for connection in connections])

    return event_loop.run(whole(), timeout=90)


def over_ssh(hosts: Any, body: Callable[..., Awaitable[Any]], **settings: Any) -> Any:
    settings["config_file"] = hosts.config_file
    made: list[Connection] = [SshConnection(name, settings) for name in hosts.names]
    return with_connections(made, body)


async def started(copy: Callable[..., Awaitable[Any]]) -> asyncio.Future[Any]:
    """Start a copy, and return when it is in its middle."""
    loop, moving = asyncio.get_running_loop(), asyncio.Event()

    def progress(done: int, total: int | None, files: int) -> None:
        if done > 5_000_000:
            loop.call_soon_threadsafe(moving.set)

    task = asyncio.ensure_future(copy(progress))
    waiting = asyncio.ensure_future(moving.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not task.done(), task
    return task


def settled(nothing_left: Callable[[], bool], patience: float = 5) -> bool:
    deadline = time.monotonic() + patience
    while not nothing_left():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_folder_both_ways(hosts: Any, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")

    async def body(*connections: SshConnection) -> None:
        env = {"WHERE": "in here"}
        await asyncio.gather(*[send(c, source, "$WHERE/copy", cwd="work dir", env=env) for c in connections])
        results = await asyncio.gather(
            *[get(c, "~/work dir/in here/copy", tmp_path / c.host, cwd="/", env={}) for c in connections]
        )
        again = await asyncio.gather(*[send(c, source, "$WHERE/copy", cwd="work dir", env=env) for c in connections])
        assert {result.sent for result in again} == {0}
        assert {result.files for result in results} == {again[0].files}

    over_ssh(hosts, body)
    for host in hosts:
        assert state(host.path("~/work dir/in here/copy")) == state(source)
        assert state(tmp_path / host.name) == state(source)
        subprocess.run(["rm", "-r", host.path("~/work dir")], check=True)


def test_holes_stay_holes(hosts: Any, tmp_path: Path) -> None:
    with (tmp_path / "source").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"middle")

    async def body(connection: Connection, *others: Connection) -> None:
        await send(connection, tmp_path / "source", "sparse", cwd="", env={})
        await get(connection, "sparse", tmp_path / "back", cwd="", env={})

    over_ssh(hosts, body)
    there = hosts[0].path("~/sparse")
    for copy in (there, tmp_path / "back"):
        with copy.open("rb") as file:
            assert os.pread(file.fileno(), 12, (1 << 39) - 3) == b"\0\0\0middle\0\0\0"
        assert copy.stat().st_size == 1 << 40
        assert copy.stat().st_blocks * 512 <= 1 << 20
    there.unlink()


def test_old_python_on_the_host(make_hosts: Any, tmp_path: Path) -> None:
    hosts = make_hosts(1, python="3.8")
    source = make_tree(tmp_path / "source")

    async def body(connection: SshConnection) -> None:
        assert connection.agent_info.python[:2] == (3, 8)
        await send(connection, source, "copy", cwd="", env={})
        await get(connection, "copy", tmp_path / "back", cwd="", env={})

    over_ssh(hosts, body)
    assert state(tmp_path / "back") == state(source)


def test_without_ssh(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")

    async def body(connection: LocalConnection) -> None:
        await send(connection, source, "copy", cwd=str(tmp_path), env={})
        await get(connection, "copy", tmp_path / "back", cwd=str(tmp_path), env={})
        with pytest.raises(TransferError, match="into itself"):
            await send(connection, tmp_path, tmp_path / "new", cwd="", env={})

    with_connections([LocalConnection()], body)
    assert state(tmp_path / "back") == state(source)


@pytest.mark.parametrize("shell", ["bash", "tcsh"])
def test_a_login_shell_that_prints(make_hosts: Any, tmp_path: Path, shell: str) -> None:
    (tmp_path / "file").write_bytes(os.urandom(100_000))

    async def body(connection: SshConnection) -> None:
        await send(connection, tmp_path / "file", "there", cwd="", env={})
        await get(connection, "there", tmp_path / "back", cwd="", env={})

    over_ssh(make_hosts(1, rc="noisy", shell=shell), body)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()


def test_errors_name_host_and_path(hosts: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    async def body(connection: SshConnection, *_: SshConnection) -> None:
        for copy, side, number, path in (
            (get(connection, "missing", tmp_path, cwd="", env={}), "host1", errno.ENOENT, "/home/lazy/missing"),
            (get(connection, "/etc/shadow", tmp_path, cwd="", env={}), "host1", errno.EACCES, "/etc/shadow"),
            (send(connection, tmp_path / "file", "/usr/no", cwd="", env={}), "host1", None, "/usr/no"),
            (send(connection, tmp_path / "no", cwd="", env={}), "manager", errno.ENOENT, str(tmp_path / "no")),
        ):
            with pytest.raises(TransferError) as caught:
                await copy
            error = caught.value
            assert (error.host, error.side, error.path) == ("host1", side, path)
            assert number in (None, error.errno)
            assert "Next step" in str(error)

    over_ssh(hosts, body)


def test_disk_full(make_hosts: Any, tmp_path: Path) -> None:
    hosts = make_hosts(1, tmp_size="2m")
    (tmp_path / "big").write_bytes(os.urandom(20_000_000))
    before = hosts[0].path("/tmp/big")
    before.write_text("before")
    before.chmod(0o666)

    async def body(connection: SshConnection) -> None:
        with pytest.raises(TransferError) as caught:
            await send(connection, tmp_path / "big", "/tmp/there", cwd="", env={})
        assert (caught.value.errno, caught.value.side) == (errno.ENOSPC, "host1")

    over_ssh(hosts, body)
    assert before.read_text() == "before"
    assert hosts[0].tmp_entries() == ["/tmp/big"]
    before.unlink()


@pytest.mark.parametrize("max_sessions", [2, 3])
def test_few_sessions(make_hosts: Any, tmp_path: Path, max_sessions: int) -> None:
    hosts = make_hosts(1, max_sessions=max_sessions)
    (tmp_path / "file").write_bytes(os.urandom(2_000_000))
    source = make_large(tmp_path / "huge")

    async def body(connection: SshConnection) -> None:
        copies = [send(connection, tmp_path / "file", f"copies/{i}", cwd="", env={}) for i in range(6)]
        assert [result.sent for result in await asyncio.gather(*copies)] == [1] * 6
        # What was interrupted still has its session for a moment.
        task = await started(lambda p: send(connection, source, "copies/huge", cwd="", env={}, progress=p))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await send(connection, tmp_path / "file", "copies/last", cwd="", env={})

    over_ssh(hosts, body)
    subprocess.run(["rm", "-r", hosts[0].path("~/copies")], check=True)


def test_messages_pass_a_large_copy(hosts: Any, tmp_path: Path) -> None:
    target = tmp_path / "huge"
    target.touch()

    async def body(connection: SshConnection, *_: SshConnection) -> None:
        # Into nothing: the host's disk is not what is looked at.
        task = await started(lambda progress: get(connection, "big", target, cwd="", env={}, progress=progress))
        began = time.monotonic()
        for _ in range(5):
            await connection.request("info")
        assert time.monotonic() - began < 5
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    make_large_there(hosts[0].path("~/big")).chmod(0o644)
    over_ssh(hosts, body)
    hosts[0].path("~/big").unlink()
    assert os.listdir(tmp_path) == ["huge"]


@pytest.mark.parametrize("way", ["send", "get"])
@pytest.mark.parametrize("how", ["cancel", "close", pytest.param("power", marks=pytest.mark.soak)])
def test_interrupted(make_hosts: Any, tmp_path: Path, way: str, how: str) -> None:
    hosts = make_hosts(1)
    here, there = tmp_path / "here", hosts[0].path("~/there")
    here.mkdir()
    there.mkdir()
    there.chmod(0o777)
    make_large(here / "file") if way == "send" else make_large_there(there / "file")
    ((there if way == "send" else here) / "file").write_text("before")

    async def body(connection: SshConnection) -> None:
        def copy(progress: Any) -> Any:
            if way == "send":
                return send(connection, here / "file", "there", cwd="", env={}, progress=progress)
            return get(connection, "there/file", here, cwd="", env={}, progress=progress)

        task = await started(copy)
        if how == "cancel":
            task.cancel()
        elif how == "close":
            await connection.close()
        else:
            await asyncio.to_thread(hosts[0].power_off)
        with pytest.raises((asyncio.CancelledError, LazyclusterError)) as caught:
            await task
        assert (caught.type is asyncio.CancelledError) == (how == "cancel")

    over_ssh(hosts, body, reconnect=2)
    assert os.listdir(here) == ["file"]
    if how != "power":
        assert settled(lambda: os.listdir(there) == ["file"])
        if way == "send":
            assert (there / "file").read_text() == "before"
        subprocess.run(["rm", "-r", there], check=True)


_MANAGER = """
    import os
    from lazycluster.core import event_loop
    from lazycluster.ssh.ssh_connection import SshConnection
    from lazycluster.ssh.transfer import get, send

    async def main():
        connection = SshConnection("host1", {{"config_file": {config!r}}})
        await connection.open()
        def progress(done, total, files):
            if done > 5_000_000:
                print("copying", flush=True)
        await {copy}

    event_loop.run(main())
"""


@pytest.mark.parametrize("way", ["send", "get"])
def test_manager_killed_in_the_middle(hosts: Any, tmp_path: Path, way: str) -> None:
    here, there = tmp_path / "here", hosts[0].path("~/there")
    here.mkdir()
    there.mkdir()
    there.chmod(0o777)
    source = make_large(here / "file") if way == "send" else make_large_there(there / "file")
    source.chmod(0o644)
    copy = f"send(connection, {str(here / 'file')!r}, 'there/', cwd='', env={{}}, progress=progress)"
    if way == "get":
        copy = f"get(connection, 'there/file', {str(here)!r}, cwd='', env={{}}, progress=progress)"
    program = textwrap.dedent(_MANAGER.format(config=str(hosts.config_file), copy=copy))
    manager = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with contextlib.closing(manager.stdout) as said:  # type: ignore[type-var]
        try:
            assert said.readline() == "copying\n"  # type: ignore[union-attr]
        finally:
            os.kill(manager.pid, signal.SIGKILL)
            manager.wait()
    left = [] if way == "send" else ["file"]
    assert settled(lambda: os.listdir(there) == left and not hosts[0].leftovers()), os.listdir(there)
    assert os.listdir(here) == (["file"] if way == "send" else [])
    subprocess.run(["rm", "-r", there], check=True)
