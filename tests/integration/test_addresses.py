"""Hosts that are named by an IPv6 address, with a zone where the address is one of the link."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazycluster import Runtime
from patience import until
from sshhosts.loopback import LoopbackHosts


@pytest.fixture
def address(hosts: Any) -> str:
    """The link-local address of the first host."""
    if isinstance(hosts, LoopbackHosts):
        pytest.skip("a link between hosts needs namespaces")
    shown = hosts[0].run("ip -6 -o addr show scope link").stdout
    number = re.search(r"inet6 (fe80:[0-9a-f:]+)/", shown)
    own = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    link = re.search(rf"^[0-9]+: (\S+) +inet {re.escape(hosts.manager_address)}/", own, re.MULTILINE)
    if number is None or link is None:
        pytest.skip("the hosts have no IPv6")
    found = f"{number[1]}%{link[1]}"

    def answers() -> bool:
        try:
            socket.create_connection((found, 22), 10).close()
        except OSError:  # at first it is tried whether somebody else has the address
            return False
        return True

    until(answers, found)
    return found


@pytest.fixture
def config(hosts: Any, tmp_path: Path) -> str:
    """A configuration without aliases."""
    path = tmp_path / "config"
    known, key = f"{tmp_path}/known_hosts", hosts.key_file
    path.write_text(f"Host *\n  User lazy\n  IdentityFile {key}\n  UserKnownHostsFile {known}\n  IdentitiesOnly yes\n")
    return str(path)


def lazycluster(command: str, *arguments: str) -> str:
    argv = [sys.executable, "-m", "lazycluster", command, *arguments]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("form", ["{}", "[{}]", "[{}]:22", "lazy@[{}]:22", "ssh://lazy@[{}]:22/"])
def test_commands(address: str, config: str, form: str) -> None:
    host = form.format(address)
    options = ("--config", config, "--accept-new-host-key", "-w", host)
    assert lazycluster("run", *options, "--", "echo ok") == f"{host}: ok\n"
    with Runtime(host, connection_kwargs={"config_file": config}) as runtime:
        assert runtime.echo("ok").strip() == "ok"


def test_the_configuration_gets_it_as_ssh_reads_it(address: str, config: str) -> None:
    lazycluster("add-runtime", "--config", config, "--accept-new-host-key", "six", f"lazy@[{address}]:22")
    assert f"HostName {address.replace('%', '%%')}\n" in Path(config).read_text()
    assert lazycluster("run", "--config", config, "-w", "six", "--", "echo ok") == "six: ok\n"
