"""What the command line asks a person at a terminal: keys of hosts, passwords, hosts. Nobody there: nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patience import until
from sshhosts import PASSWORD
from terminals import Terminal

LAZYCLUSTER = [sys.executable, "-m", "lazycluster"]
_SHOWN_AT_ONCE = """
from lazycluster.cli import main
from lazycluster.output import progress
progress._SILENT, progress._EVERY = 0.0, 0.005
main()
"""


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """The ssh configuration of somebody who has never seen a host."""
    config = tmp_path / "config"
    config.write_text(f"Host *\n  UserKnownHostsFile {tmp_path}/known\n  GlobalKnownHostsFile none\n")
    make_key(tmp_path / "key")
    return config


@pytest.fixture
def strange(hosts: Any, tmp_path: Path) -> Path:
    """The configuration of somebody who has never seen these hosts."""
    config = tmp_path / "strange"
    text = re.sub(r"(?m)^\s*(StrictHostKeyChecking|UserKnownHostsFile)\b.*\n", "", Path(hosts.config_file).read_text())
    config.write_text(f"{text}\nHost *\n  UserKnownHostsFile {tmp_path}/known\n")
    return config


def fingerprint(host: Any) -> str:
    public = host.path("/run/host/host_key").read_text()
    done = subprocess.run(["ssh-keygen", "-l", "-f", "-"], input=_public(public), capture_output=True, text=True)
    return done.stdout.split()[1]


def _public(private: str) -> str:
    command = ["ssh-keygen", "-y", "-f", "/dev/stdin"]
    return subprocess.run(command, input=private, capture_output=True, text=True, check=True).stdout


def run(*arguments: object) -> tuple[int, str, str]:
    argv = [*LAZYCLUSTER, *map(str, arguments)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def added(host: Any, config: Path, *more: str) -> list[str]:
    target = f"{host.user}@{host.address}:{host.port}"
    return [*LAZYCLUSTER, "add-runtime", "new", target, "--config", str(config), *more]


# --- add-runtime -----------------------------------------------------------------------------------
def test_a_key_is_installed_with_a_password(make_hosts: Any, newcomer: Path) -> None:
    (host,) = make_hosts(1, password=True, sshd={"AuthorizedKeysFile": ".ssh/authorized_keys"})
    key = newcomer.parent / "key"
    home = {"HOME": str(newcomer.parent)}
    with Terminal(added(host, newcomer, "--id_file", str(key), "--copy-id", "--check"), home) as terminal:
        terminal.until(rf"fingerprint is {re.escape(fingerprint(host))}")
        terminal.until(r"continue connecting \(yes/no.*\? ")
        terminal.type("yes\n")
        terminal.until(r"password: ")
        terminal.type(f"{PASSWORD}\n")
        assert terminal.end() == 0, terminal.seen
    assert PASSWORD not in terminal.seen
    assert "new can be used: lazy@host1, Python 3." in terminal.seen
    assert host.path("~/.ssh/authorized_keys").read_text() == key.with_suffix(".pub").read_text()
    assert run("run", "--config", newcomer, "-w", "new", "-N", "--", "hostname") == (0, "host1\n", "")
    # Once more, and it is there, so nothing is asked.
    assert run("delete-runtime", "--config", newcomer, "new")[0] == 0
    with Terminal(added(host, newcomer, "--id_file", str(key), "--copy-id"), home) as terminal:
        assert terminal.end() == 0, terminal.seen
    assert "password" not in terminal.seen


def test_a_host_whose_key_is_declined_gets_no_password(make_hosts: Any, newcomer: Path) -> None:
    (host,) = make_hosts(1, password=True)
    home, key = {"HOME": str(newcomer.parent)}, newcomer.parent / "key"
    with Terminal(added(host, newcomer, "--id_file", str(key), "--copy-id"), home) as terminal:
        terminal.until(r"continue connecting \(yes/no.*\? ")
        terminal.type("no\n")
        assert terminal.end() == 1, terminal.seen
    assert "the key was not installed on new, which was added to the configuration nevertheless" in terminal.seen
    assert "the host key of" in terminal.seen
    assert "password:" not in terminal.seen
    assert not (newcomer.parent / "known").exists()


def test_a_wrong_password_installs_no_key(make_hosts: Any, newcomer: Path) -> None:
    (host,) = make_hosts(1, password=True)
    home, key = {"HOME": str(newcomer.parent)}, newcomer.parent / "key"
    more = ("--id_file", str(key), "--copy-id", "--accept-new-host-key", "--option", "NumberOfPasswordPrompts=1")
    with Terminal(added(host, newcomer, *more), home) as terminal:
        terminal.until("password: ")
        terminal.type("wrong\n")
        assert terminal.end() == 1, terminal.seen
    assert "authenticity" not in terminal.seen
    command = f"ssh-copy-id -i {key}.pub -F {newcomer} -o StrictHostKeyChecking=accept-new new"
    assert command in terminal.seen.replace("\n", "")


def test_who_has_no_key_is_told_how_to_make_one(newcomer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = newcomer.read_text()
    monkeypatch.setenv("HOME", str(newcomer.parent))
    status, _, err = run("add-runtime", "new", "192.0.2.1", "--config", newcomer, "--copy-id")
    assert status == 2
    assert "ssh-keygen -t ed25519" in err
    assert newcomer.read_text() == before


# --- keys of hosts ---------------------------------------------------------------------------------
def test_an_unknown_host_is_taken_with_consent_only(hosts: Any, strange: Path) -> None:
    known = strange.parent / "known"
    argv = [*LAZYCLUSTER, "run", "--config", str(strange), "-w", "host1", "--", "hostname"]
    for answer, status in (("no", 255), ("yes", 0)):
        with Terminal(argv) as terminal:
            terminal.until(rf"\[host1\] The authenticity .*[\s\S]*fingerprint is {re.escape(fingerprint(hosts[0]))}")
            terminal.until(r"continue connecting \(yes/no.*\? ")
            terminal.type(f"{answer}\n")
            assert terminal.end() == status, terminal.seen
        assert known.exists() == (answer == "yes")
        if answer == "no":
            told = terminal.seen.partition("not usable as a runtime (host_key)")[2].replace("\n", "").replace("\r", "")
            assert f"is unknown (ED25519, {fingerprint(hosts[0])})" in told
    assert "host1: host1\n" in terminal.seen
    with Terminal(argv) as terminal:
        assert terminal.end() == 0
    assert "authenticity" not in terminal.seen


def test_a_login_shell_that_waits_for_ever_is_not_waited_for_as_a_person_is(make_hosts: Any) -> None:
    hosts = make_hosts(1, rc="reads_stdin")
    argv = ["run", "--config", hosts.config_file, "--connect-timeout", "1", "-w", "host1", "--", "hostname"]
    with Terminal([*LAZYCLUSTER, *argv]) as terminal:
        assert terminal.end() == 255, terminal.seen
    assert "(shell): the login shell did not start Python within the time allowed" in terminal.seen
    assert "--connect-timeout 60" in terminal.seen


def test_where_nobody_can_be_asked_nobody_is(hosts: Any, strange: Path) -> None:
    known = strange.parent / "known"
    status, _, err = run("run", "--config", strange, "-w", "host1", "--", "hostname")
    assert (status, known.exists()) == (255, False)
    assert fingerprint(hosts[0]) in err
    assert "--accept-new-host-key" in err
    status, out, _ = run("run", "--config", strange, "-w", "host1", "--accept-new-host-key", "--", "hostname")
    assert (status, out) == (0, "host1: host1\n")
    assert hosts[0].address in known.read_text()


def test_a_host_whose_key_has_changed_is_always_refused(hosts: Any, strange: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    kind, text = (tmp_path / "other.pub").read_text().split()[:2]
    (tmp_path / "known").write_text(f"{hosts[0].address} {kind} {text}\n")
    before = (tmp_path / "known").read_text()
    argv = ["list-runtimes", "--config", str(strange), "-w", "host1", "--accept-new-host-key"]
    with Terminal([*LAZYCLUSTER, *argv]) as terminal:
        assert terminal.end() == 255
    assert "has CHANGED" in terminal.seen
    assert "(yes/no" not in terminal.seen
    status, out, _ = run("doctor", "--config", strange, "host1", "--accept-new-host-key", "--json")
    failed = [step for step in json.loads(out)[0]["steps"] if step["state"] == "failed"]
    assert status == 1
    assert [step["name"] for step in failed] == ["host key"]
    assert (tmp_path / "known").read_text() == before


def test_nothing_is_printed_behind_a_question(hosts: Any, strange: Path) -> None:
    # host3 is known, so it answers while the question about host1 stands there.
    known = next(line for line in Path(hosts.known_hosts).read_text().splitlines() if hosts[2].address in line)
    (strange.parent / "known").write_text(known + "\n")
    argv = [*LAZYCLUSTER, "run", "--config", str(strange), "-w", "host[1,3]", "--", "touch it; hostname"]
    with Terminal(argv) as terminal:
        terminal.until(r"continue connecting \(yes/no.*\? ")
        until(hosts[2].path("~/it").exists, "the other host to be done")
        terminal.type("no\n")
        assert terminal.end() == 255
    assert re.search(r"\? no\nhost3: host3\nhost1: not usable", terminal.seen), terminal.seen
    hosts[2].path("~/it").unlink()


# --- passwords, and hosts --------------------------------------------------------------------------
def test_a_password_is_asked_for_at_a_terminal(make_hosts: Any) -> None:
    hosts = make_hosts(1, password=True)
    argv = [*LAZYCLUSTER, "run", "--config", str(hosts.config_file), "-w", "host1", "--", "hostname"]
    with Terminal(argv) as terminal:
        terminal.until(r"\[host1\] .*password: ")
        terminal.type(f"{PASSWORD}\n")
        assert terminal.end() == 0, terminal.seen
    assert "host1: host1\n" in terminal.seen
    assert PASSWORD not in terminal.seen


def test_hosts_are_asked_for_at_a_terminal(hosts: Any) -> None:
    argv = [*LAZYCLUSTER, "run", "--config", str(hosts.config_file), "-N", "--", "hostname"]
    with Terminal(argv) as terminal:
        terminal.until(r"Hosts of the ssh configuration: host\[1-3\]\nOn which hosts \(@all for all\): ")
        terminal.type("host[2-3]\n")
        assert terminal.end() == 0, terminal.seen
    assert sorted(terminal.seen.splitlines()[-2:]) == ["host2", "host3"]
    with Terminal(argv) as terminal:
        terminal.until(r"On which hosts")
        assert terminal.interrupt() == 130, terminal.seen
    assert "Interrupted." in terminal.seen


# --- colours ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=["colours", "NO_COLOR"])
def test_colours_and_bars(env: dict[str, str], hosts: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x" * 20_000_000)
    words = ["list-runtimes", "--config", str(hosts.config_file), "-w", "host1,x.invalid"]
    with Terminal([*LAZYCLUSTER, *words], env) as one:
        one.end()
    assert bool(re.search(r"\x1b\[(\d+;)*3\d", one.raw)) == (not env)
    words = ["put", "--config", str(hosts.config_file), "-w", "host1", str(tmp_path / "data"), "colours"]
    with Terminal([sys.executable, "-c", _SHOWN_AT_ONCE, *words], env) as one:
        one.end()
    assert ("━" in one.raw, "\x1b[?25l" in one.raw) == (not env, not env)  # bars hide the cursor
    assert "host1: 1 file, 19M in " in one.seen
    with Terminal([*LAZYCLUSTER, *words], env) as one:
        one.end()
    assert "━" not in one.raw  # it is done at once
    hosts[0].path("~/colours").unlink()
