"""The manager: which hosts of an ssh configuration it takes, and what it says of the others."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from lazycluster import RuntimeManager, RuntimeTask
from lazycluster.exceptions import LazyclusterError, NoRuntimesDetectedError, NoRuntimesError
from lazycluster.utils import Environment


@pytest.fixture(autouse=True)
def _main_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "main"))


@pytest.fixture
def config(hosts: Any, tmp_path: Path) -> str:
    """A configuration with hosts of all kinds, the real ones included from another file."""
    address = hosts[0].address
    file = tmp_path / "config"
    text = f"""
        Include {hosts.config_file}
        Host same-as-first
            HostName {address}
            Port {hosts[0].port}
            User {hosts[0].user}
            IdentityFile {hosts.key_file}
            UserKnownHostsFile {hosts.known_hosts}
        Host github.com
            User git
        Host dead
            HostName 127.0.0.1
            Port 9
        Host behind
            ProxyJump jump
        Host jump
            HostName jump.invalid
        Host pattern-*
            User x
    """
    file.write_text(textwrap.dedent(text))
    return str(file)


def test_the_hosts_of_a_configuration(config: str, hosts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with RuntimeManager(config_file=config) as manager:
        assert manager.hosts == hosts.names
        inactive = manager.inactive_hosts
        assert f"another name of {hosts.names[0]}" in inactive["same-as-first"]
        assert "git" in inactive["github.com"]
        assert "refused" in inactive["dead"]
        assert "jump host" in inactive["jump"]
        assert "pattern" in inactive["pattern-*"]
        assert "behind" in inactive
        manager.print_hosts()
        printed = capsys.readouterr().out
        for name in (*hosts.names, *inactive):
            assert name in printed
        assert "refused" in printed
        manager.print_inactive_hosts()
        assert hosts.names[0] + "\n" not in capsys.readouterr().out
        manager.print_runtime_info()
        printed = capsys.readouterr().out
        assert "cores" in printed
        assert "dead" in printed


def test_groups_of_some_hosts(hosts: Any) -> None:
    one, two, three = hosts.names
    with RuntimeManager(config_file=hosts.config_file, env={"A": "x"}) as manager:
        for arguments, names in (
            ({}, [one, two, three]),
            ({"include_hosts": two}, [two]),
            ({"include_hosts": ["host[13]"]}, [one, three]),
            ({"include_hosts": "host[1, 3]"}, [one, three]),
            ({"exclude_hosts": "host{3..2}"}, [one]),
            ({"exclude_hosts": "*2"}, [one, three]),
            ({"min_memory": 1, "min_cpu_cores": 1, "installed_executables": "sh"}, [one, two, three]),
            ({"filter_commands": f'[ "$(hostname)" = {three} ] && echo true'}, [three]),
            ({"filter_commands": '[ "$A" = x ] && echo true', "include_hosts": one}, [one]),
        ):
            with manager.create_group(**arguments) as group:
                assert group.hosts == names, arguments
        for wrong in (
            {"include_hosts": one, "exclude_hosts": two},
            {"include_hosts": "unknown"},
            {"exclude_hosts": "unknown"},
            {"exclude_hosts": "host[1, 12]"},
            {"include_hosts": "host[^1]"},
            {"include_hosts": "host[1,x]"},
        ):
            with pytest.raises(ValueError, match=r"."):
                manager.create_group(**wrong)
        with pytest.raises(NoRuntimesError, match="gpu-"):
            manager.create_group(include_hosts="gpu-*")
        with pytest.raises(NoRuntimesError) as raised:
            manager.create_group(min_memory=10**9)
        for part in (one, two, three, "min_memory=1000000000", "MB"):
            assert part in str(raised.value)
        with pytest.raises(NoRuntimesError, match="no-such-program"):
            manager.create_group(installed_executables=["sh", "no-such-program"])


def test_groups_have_lives_of_their_own(hosts: Any) -> None:
    manager = RuntimeManager(config_file=hosts.config_file)
    first = manager.create_group()
    second = manager.create_group(include_hosts=hosts.names[0], working_dir="~/kept")
    assert second.runtimes[0].working_dir == f"{hosts[0].home}/kept"
    assert first.runtimes[0].working_dir != second.runtimes[0].working_dir
    task = first.execute_task(RuntimeTask().run_command("sleep 100"), host=hosts.names[0])
    temporary = first.runtimes[0].working_dir
    first.cleanup()
    assert task.status == "cancelled"
    assert not hosts[0].path(temporary).exists()
    assert second.call(os.getcwd) == {hosts.names[0]: f"{hosts[0].home}/kept"}
    manager.cleanup()
    manager.cleanup()
    with pytest.raises(LazyclusterError, match="cleanup"):
        manager.create_group()
    assert second.call(len, "ab") == {hosts.names[0]: 2}
    second.cleanup()
    hosts[0].path("~/kept").rmdir()


def test_a_group_outlives_its_manager(hosts: Any) -> None:
    group = RuntimeManager(config_file=hosts.config_file).create_group()
    gc.collect()
    assert group.call(len, "abc") == dict.fromkeys(hosts.names, 3)
    connections = [runtime._connection for runtime in group.runtimes]
    group.cleanup()
    deadline = time.monotonic() + 10
    while any(connection.state != "closed" for connection in connections) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {connection.state for connection in connections} == {"closed"}


def test_setup_and_settings(hosts: Any) -> None:
    one, two, three = hosts.names
    settings = {two: {"setup": "export A=two"}, three: {"env": {"A": "three"}}}
    options = {"connection_kwargs": {"config_file": hosts.config_file}, "setup": "export A=all", "settings": settings}
    with RuntimeManager(**options) as manager, manager.create_group() as group:
        assert group.call(os.getenv, "A") == {one: "all", two: "two", three: "three"}


def test_no_host_at_all(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(NoRuntimesDetectedError, match=str(empty)):
        RuntimeManager(config_file=empty)
    dead = tmp_path / "dead"
    dead.write_text("Host dead\n  HostName 127.0.0.1\n  Port 9\nHost other\n  User git\n")
    with pytest.raises(NoRuntimesDetectedError) as raised:
        RuntimeManager(config_file=dead)
    for part in ("dead", "refused", "other", "git"):
        assert part in str(raised.value)


def test_nothing_is_asked_and_progress_is_told(make_hosts: Any, tmp_path: Path) -> None:
    """On a terminal, with a host that wants a password and one that never answers."""
    hosts = make_hosts(1)
    config = tmp_path / "config"
    config.write_text(
        f"Include {hosts.config_file}\n"
        f"Host secret\n  HostName {hosts[0].address}\n  Port {hosts[0].port}\n  User {hosts[0].user}\n"
        f"  IdentityFile /dev/null\n  IdentitiesOnly yes\n  UserKnownHostsFile {hosts.known_hosts}\n"
        "Host silent\n  ProxyCommand sleep 100\n"
    )
    program = f"""
        from lazycluster import RuntimeManager
        with RuntimeManager(config_file={str(config)!r}, connection_kwargs={{"timeout": 4}}) as manager:
            print(manager.hosts, sorted(manager.inactive_hosts))
    """
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    out = process.communicate(timeout=60)[0]
    said = os.read(ours, 100_000).decode()
    os.close(ours)
    assert out == f"{hosts.names!r} ['secret', 'silent']\n"
    assert "waiting for silent" in said
    assert "assword" not in said
