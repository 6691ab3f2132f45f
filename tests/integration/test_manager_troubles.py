"""Troubles of the machine that the library runs on, and homes that cannot be used: named once, with what helps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazycluster import Runtime
from lazycluster.exceptions import InvalidRuntimeError


def lazycluster(
    hosts: Any, command: str, *arguments: str, before: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    argv = [*before, sys.executable, "-m", "lazycluster", command, "--config", hosts.config_file, *arguments]
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_a_machine_without_ssh(hosts: Any, tmp_path: Path) -> None:
    done = lazycluster(hosts, "run", "-w", "host[1-3]", "true", env={"PATH": str(tmp_path), "HOME": str(tmp_path)})
    assert done.returncode == 255
    assert done.stderr.count("no ssh client is installed on this machine") == 1
    code = (
        "from lazycluster import RuntimeGroup; "
        f"RuntimeGroup(hosts=['host1', 'host2'], connection_kwargs={{'config_file': {hosts.config_file!r}}})"
    )
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-2].endswith("no ssh client is installed on this machine, or it is not on the PATH")


def test_a_user_without_an_entry_in_passwd(hosts: Any) -> None:
    unshare = ("unshare", "--user", "--map-user=4711", "--map-group=4711")
    if os.getuid() or shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs root and user namespaces")
    done = lazycluster(hosts, "run", "-w", "host[1-3]", "true", before=unshare)
    assert done.returncode == 255
    assert done.stderr.count("the user id 4711 has no entry in /etc/passwd") == 1
    assert "Next step: add one" in done.stderr


def test_a_current_directory_that_was_removed(hosts: Any, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before = ("sh", "-c", f'cd {gone} && rmdir {gone} && exec "$@"', "sh")
    assert lazycluster(hosts, "run", "-w", "host1", "echo ok", before=before).stdout == "host1: ok\n"
    gone.mkdir()
    done = lazycluster(hosts, "get", "-w", "host1", "/etc/hostname", ".", before=before)
    assert done.returncode
    assert done.stderr.splitlines()[-1] == "Note: the current directory was removed: change to another one."


@pytest.mark.parametrize("spoil", ["rmdir /home/lazy", "chown root /home/lazy"], ids=["missing", "closed"])
def test_a_home_that_cannot_be_used(make_hosts: Callable[..., Any], spoil: str) -> None:
    hosts = make_hosts(1)
    hosts[0].run(f"umount /home/lazy; {spoil}; chmod 700 /home/lazy 2>/dev/null || true")
    done = lazycluster(hosts, "run", "-w", "host1", "true")
    assert "the home directory /home/lazy/ cannot be used" in done.stderr
    assert "Next step: have the host's administrator" in done.stderr
    with pytest.raises(InvalidRuntimeError, match="the home directory /home/lazy cannot be used") as caught:
        Runtime("host1", connection_kwargs={"config_file": hosts.config_file}, setup="true")
    assert "administrator" in caught.value.hint
