"""Connections to real hosts: whatever the login shell is and says, whatever the ssh configuration says."""

from __future__ import annotations

import asyncio
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

from lazycluster.core import event_loop
from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError
from lazycluster.ssh.ssh_connection import SshConnection
from patience import until

Make = Callable[..., Any]


async def run(connection: SshConnection, command: str, **params: Any) -> tuple[int | None, str]:
    out = bytearray()
    channel = connection.channel("run", {"command": command, **params}, stdout=out.extend, stderr=out.extend)
    return (await channel.result())["exit"], out.decode()


def with_connections(
    hosts: Any, body: Callable[..., Awaitable[Any]], names: list[str] | None = None, **kwargs: Any
) -> Any:
    python = kwargs.pop("python", None)

    async def whole() -> Any:
        settings = {"config_file": hosts.config_file, **kwargs}
        connections = [SshConnection(name, settings, python=python) for name in names or hosts.names]
        try:
            await asyncio.gather(*[connection.open() for connection in connections])
            return await body(*connections)
        finally:
            await asyncio.gather(*[connection.close() for connection in connections])

    return event_loop.run(whole(), timeout=90)


def refused(hosts: Any, **kwargs: Any) -> InvalidRuntimeError:
    async def body(_: SshConnection) -> None:
        raise AssertionError("it should not connect")

    with pytest.raises(InvalidRuntimeError) as caught:
        with_connections(hosts, body, hosts.names[:1], **kwargs)
    assert caught.value.host == hosts.names[0]
    assert caught.value.hint
    return caught.value


def test_three_hosts_at_once(hosts: Any) -> None:
    async def body(*connections: SshConnection) -> list[tuple[int | None, str]]:
        return list(await asyncio.gather(*[run(connection, "hostname; exit 4") for connection in connections]))

    assert with_connections(hosts, body) == [(4, f"{name}\n") for name in hosts.names]


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh"])
@pytest.mark.parametrize("rc", [None, "noisy"])
def test_login_shells(make_hosts: Make, shell: str, rc: str | None) -> None:
    async def body(connection: SshConnection) -> tuple[int | None, str]:
        return await run(connection, "printf %s \"it's\"; echo ' fine'", shell="/bin/sh")

    assert with_connections(make_hosts(1, shell=shell, rc=rc), body) == (0, "it's fine\n")


@pytest.mark.parametrize("rc", ["reads_stdin", pytest.param("eats_stdin", marks=pytest.mark.soak), "exits"])
def test_login_shells_that_do_not_let_anyone_in(make_hosts: Make, rc: str) -> None:
    error = refused(make_hosts(1, rc=rc), timeout=2)
    assert error.reason in ("shell", "python"), error


def test_hostile_ssh_configuration(make_hosts: Make, tmp_path: Path) -> None:
    lines = (
        "RemoteCommand echo hijacked",
        "RequestTTY force",
        "ControlMaster auto",
        f"ControlPath {tmp_path}/user-%C",
        "ControlPersist yes",
        "LocalForward 127.0.0.1:18999 127.0.0.1:22",
        "RemoteForward 127.0.0.1:18998 127.0.0.1:22",
        "DynamicForward 18997",
        "ExitOnForwardFailure yes",
        "PermitLocalCommand yes",
        f"LocalCommand touch {tmp_path}/hijacked",
        "ForwardX11 yes",
        "ForwardAgent yes",
        "EscapeChar ^A",
        "LogLevel QUIET",
        "ForkAfterAuthentication yes",
        "StdinNull yes",
        "SessionType none",
        "BatchMode yes",
    )

    async def body(connection: SshConnection) -> tuple[int | None, str]:
        return await run(connection, "echo ok")

    assert with_connections(make_hosts(1, ssh_config=lines), body) == (0, "ok\n")
    assert list(tmp_path.iterdir()) == []


def test_behind_a_bastion_with_the_defaults_of_sshd(make_hosts: Make) -> None:
    async def body(*connections: SshConnection) -> list[tuple[int | None, str]]:
        return list(await asyncio.gather(*[run(connection, "hostname") for connection in connections]))

    hosts = make_hosts(12, bastion=True)
    assert with_connections(hosts, body) == [(0, f"{name}\n") for name in hosts.names]


@pytest.mark.parametrize("python", ["3.8", "3.9", "3.12"])
def test_other_pythons_on_the_host(make_hosts: Make, python: str) -> None:
    async def body(connection: SshConnection) -> None:
        assert ".".join(map(str, connection.agent_info.python[:2])) == python
        assert await run(connection, "echo ok") == (0, "ok\n")
        assert (await connection.request("info"))["cpu_cores"] >= 1
        assert (await connection.request("ports", ports=[22000]))["free"] == [22000]
        assert (await connection.request("setup", script="export A=1"))["env"]["A"] == "1"

    with_connections(make_hosts(1, python=python), body)


def test_no_python(make_hosts: Make) -> None:
    error = refused(make_hosts(1, python="none"))
    assert error.reason == "python"
    assert "python3" in str(error)


def test_python_too_old(make_hosts: Make) -> None:
    hosts = make_hosts(1, python="3.7")
    error = refused(hosts, python=hosts[0].run("command -v python3").stdout.strip())
    assert error.reason == "python"
    assert "3.7" in str(error)
    assert "3.8" in str(error)


def test_password(make_hosts: Make) -> None:
    from sshhosts.options import PASSWORD

    hosts = make_hosts(1, password=True)

    async def body(connection: SshConnection) -> str:
        name = connection.agent_info.user
        commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert PASSWORD not in commands
        assert PASSWORD not in repr(vars(connection))
        return name

    assert with_connections(hosts, body, password=PASSWORD) == "lazy"
    wrong = refused(hosts, password="wrong")
    assert wrong.reason == "auth"
    assert "wrong" not in str(wrong).replace("wrong password", "")
    asked = refused(hosts)
    assert asked.reason == "auth"


def test_one_session_more_is_enough(make_hosts: Make) -> None:
    async def body(connection: SshConnection) -> None:
        (await connection.open_copy_stream()).close()
        assert await run(connection, "echo ok") == (0, "ok\n")

    with_connections(make_hosts(1, max_sessions=2), body)


@pytest.mark.parametrize("failure", [pytest.param("power_off", marks=pytest.mark.soak), "cut_off"])
def test_lost_hosts_are_noticed(make_hosts: Make, failure: str) -> None:
    hosts = make_hosts(1)

    async def body(connection: SshConnection) -> None:
        channel = connection.channel("run", {"command": "sleep 60"})
        getattr(hosts[0], failure)()
        with pytest.raises(ConnectionLostError):
            await asyncio.wait_for(channel.result(), 20)
        assert connection.state == "lost"
        with pytest.raises(ConnectionLostError):
            await connection.request("ping")

    with_connections(hosts, body, reconnect=2, link_timeout=3)
    if failure == "cut_off":
        hosts[0].restore()
        hosts[0].clear()


_MANAGER = """
    import asyncio, sys
    from lazycluster.core import event_loop
    from lazycluster.ssh.ssh_connection import SshConnection

    async def main():
        connections = [SshConnection(name, {{"config_file": {config!r}}}) for name in {names!r}]
        await asyncio.gather(*[c.open() for c in connections])
        command = "trap '' TERM HUP INT; sleep 600 & setsid sleep 600 & (setsid sleep 600 &) ; echo started; wait"
        started = [asyncio.Event() for c in connections]
        for c, event in zip(connections, started):
            c.channel("run", {{"command": command}}, stdout=lambda data, event=event: event.set())
        await asyncio.gather(*[event.wait() for event in started])
        print("ready", flush=True)
        await asyncio.sleep(600)

    event_loop.run(main())
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_when_the_manager_dies(hosts: Any, sign: signal.Signals) -> None:
    program = textwrap.dedent(_MANAGER.format(config=str(hosts.config_file), names=list(hosts.names)))
    manager = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert manager.stdout
    try:
        assert manager.stdout.readline() == "ready\n"
        for host in hosts:
            until(lambda host=host: [p.command for p in host.processes()].count("sleep 600") == 3, "what it started")
    finally:
        os.kill(manager.pid, sign)
        manager.wait()
    manager.stdout.close()
    deadline = time.monotonic() + 5
    while any(host.leftovers() for host in hosts) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [host.leftovers() for host in hosts] == [[], [], []]
    # What may be left on the manager is looked for after each test.


def test_interrupted_when_just_connected(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent is there, and is to wait for a manager whose link has dropped: it must not wait for this one."""
    bring_up = SshConnection._bring_up

    async def interrupted() -> None:
        there = asyncio.Event()

        async def hang(self: SshConnection, *arguments: Any) -> None:
            await bring_up(self, *arguments)
            assert self._agreeing is not None
            await self._agreeing
            there.set()
            await asyncio.sleep(600)

        monkeypatch.setattr(SshConnection, "_bring_up", hang)
        opening = asyncio.ensure_future(SshConnection(hosts.names[0], {"config_file": hosts.config_file}).open())
        await asyncio.wait_for(there.wait(), 60)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    event_loop.run(interrupted())


def test_interrupted_while_connecting(hosts: Any) -> None:
    async def interrupted() -> None:
        for patience in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
            connection = SshConnection(hosts.names[0], {"config_file": hosts.config_file})
            opening = asyncio.ensure_future(connection.open())
            await asyncio.wait([opening], timeout=patience)
            opening.cancel()
            await asyncio.wait([opening])
            await connection.close()

    event_loop.run(interrupted(), timeout=60)
