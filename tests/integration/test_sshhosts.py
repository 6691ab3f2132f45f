"""The throw-away hosts themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sshhosts import PASSWORD, Hosts, procfs


def ssh(hosts: Hosts, name: str, command: str) -> str:
    client = ["ssh", "-F", hosts.config_file, "-o", "BatchMode=yes", name, command]
    done = subprocess.run(client, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_host_is_a_machine_of_its_own(make_hosts):
    hosts = make_hosts(3)
    for host in hosts:
        assert ssh(hosts, host.name, "hostname; whoami; pwd").split() == [host.name, "lazy", "/home/lazy"]
        ssh(hosts, host.name, "echo mine > only-here; touch /tmp/x")
        assert host.path("~/only-here").read_text() == "mine\n"
        assert host.tmp_entries() == ["/tmp/x"]
        assert host.run("hostname; id -u", user="lazy").stdout.split() == [host.name, "1000"]
        host.clear()
    assert not Path("/tmp/x").exists()


def test_python_of_the_host_does_not_see_the_library(hosts):
    said = ssh(hosts, "host1", "python3 -c 'import sys; print(sys.version_info[:2]); import lazycluster' 2>&1 || true")
    assert str(sys.version_info[:2]) in said
    assert "ModuleNotFoundError" in said


def test_what_runs_is_seen_and_cleared(make_hosts):
    (host,) = hosts = make_hosts(1)
    listener = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 9999)); print(1, flush=True); time.sleep(99)"
    )
    client = subprocess.Popen(
        ["ssh", "-F", hosts.config_file, "host1", f'exec python3 -c "{listener}"'], stdout=subprocess.PIPE
    )
    assert client.stdout and client.stdout.readline() == b"1\n"
    assert host.listening_ports() == [9999]
    assert len(host.processes()) == 1
    assert len(host.leftovers()) >= 3
    host.clear()
    client.communicate()
    assert host.leftovers() == []


def test_power_and_cable(make_hosts):
    hosts = make_hosts(2)
    first, second = hosts
    ping = ["-o", "ConnectTimeout=1"]
    first.power_off()
    second.cut_off()
    for host in hosts:
        assert subprocess.run(
            ["ssh", "-F", hosts.config_file, *ping, host.name, "true"], capture_output=True
        ).returncode
    first.power_on()
    second.restore()
    assert ssh(hosts, "host1", "hostname") == "host1"
    assert ssh(hosts, "host2", "hostname") == "host2"


def test_narrow_link(make_hosts):
    hosts = make_hosts(1)
    hosts[0].slow(rate="8mbit")
    start = time.monotonic()
    client = ["ssh", "-F", hosts.config_file, "host1", "cat > /dev/null"]
    subprocess.run(client, input=bytes(1_000_000), check=True)
    assert time.monotonic() - start > 0.7


def test_slow_link(make_hosts):
    hosts = make_hosts(1)
    hosts[0].slow(delay_ms=30)
    start = time.monotonic()
    ssh(hosts, "host1", "true")
    assert time.monotonic() - start > 0.15
    hosts[0].slow(loss=1)
    lost = ["ssh", "-F", hosts.config_file, "-o", "ConnectTimeout=1", "host1", "true"]
    assert subprocess.run(lost, capture_output=True).returncode == 255
    hosts[0].restore()
    assert ssh(hosts, "host1", "hostname") == "host1"


@pytest.mark.parametrize("place", ["/tmp", "~"])
def test_full_disk(make_hosts, place):
    hosts = make_hosts(1)
    write = f"head -c 1000000 /dev/zero 2>&1 > {place}/big; rm {place}/big"
    hosts[0].fill_disk(place)
    assert "No space left" in ssh(hosts, "host1", write)
    hosts[0].free_disk(place)
    assert ssh(hosts, "host1", write) == ""


def test_bastion_is_the_only_way(make_hosts):
    hosts = make_hosts(2, bastion=True)
    assert [ssh(hosts, name, "hostname") for name in hosts.names] == hosts.names
    direct = ["ssh", "-F", hosts.config_file, "-o", "ProxyJump=none", "-o", "ConnectTimeout=1", "host1", "true"]
    assert subprocess.run(direct, capture_output=True).returncode == 255


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.12"])
def test_other_python(make_hosts, version):
    hosts = make_hosts(1, python=version)
    assert ssh(hosts, "host1", "python3 --version").startswith(f"Python {version}.")


def test_no_python(make_hosts):
    hosts = make_hosts(1, python="none")
    assert ssh(hosts, "host1", "command -v python3 || echo none; ls -d /") == "none\n/"


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh"])
def test_login_shell_with_noise(make_hosts, shell):
    hosts = make_hosts(1, shell=shell, rc="noisy")
    said = ssh(hosts, "host1", "ps -o comm= -p $$" if shell != "fish" else "ps -o comm= -p $fish_pid")
    assert said.split()[-1] in (shell, "ps")
    assert "noise" in said or shell == "dash"
    assert ssh(hosts, "host1", "python3 -c 'print(41 + 1)'").endswith("42")


def test_sshd_options(make_hosts):
    hosts = make_hosts(1, forwarding=False, max_sessions=2, port=2222)
    assert ssh(hosts, "host1", "echo $SSH_CONNECTION").endswith(" 2222")
    hosts[0].restart_sshd(SetEnv="GREETING=hello")
    assert ssh(hosts, "host1", "echo $GREETING") == "hello"


def test_password(make_hosts, tmp_path):
    hosts = make_hosts(1, password=True)
    with pytest.raises(AssertionError, match="Permission denied"):
        ssh(hosts, "host1", "true")
    helper = tmp_path / "askpass"
    helper.write_text(f"#!/bin/sh\necho '{PASSWORD}'\n")
    helper.chmod(0o700)
    environment = {**os.environ, "SSH_ASKPASS": str(helper), "SSH_ASKPASS_REQUIRE": "force"}
    command = ["ssh", "-F", hosts.config_file, "host1", "hostname"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "host1\n"


def test_root_and_shared_home(make_hosts):
    assert ssh(make_hosts(1, user="root"), "host1", "id -u; pwd") == "0\n/root"
    hosts = make_hosts(2, shared_home=True)
    ssh(hosts, "host1", "echo shared > file")
    assert ssh(hosts, "host2", "cat file") == "shared"


def test_nothing_is_left_when_the_owner_is_killed(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); from sshhosts import Hosts; import signal\n"
    script += "h = Hosts(2).start(); print(h.supervisor_pid, h[0].pid, h.directory, flush=True); signal.pause()"
    tests = str(Path(__file__).parents[1])
    owner = subprocess.Popen(
        [sys.executable, "-c", script, tests], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout and owner.stderr
    line = owner.stdout.readline()
    if not line:
        pytest.skip(owner.communicate()[1].strip().splitlines()[-1])
    supervisor, first, directory = line.split()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(procfs.process(int(pid)) for pid in (supervisor, first)):
        time.sleep(0.01)
    assert not procfs.process(int(supervisor))
    assert not procfs.process(int(first))
    assert not Path(directory).exists()
