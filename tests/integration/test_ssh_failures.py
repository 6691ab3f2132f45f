"""Every way in which a host cannot be reached, with real servers: the reason, and what is said."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lazycluster import Runtime
from lazycluster.core import event_loop
from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError, TaskExecutionError
from lazycluster.ssh.ssh_connection import SshConnection
from sshhosts import PASSWORD


def failure(host, **kwargs):
    connection = SshConnection(host, kwargs)
    with pytest.raises(InvalidRuntimeError) as caught:
        event_loop.run(connection.open(), 60)
    assert caught.value.host == host
    assert caught.value.hint
    assert str(caught.value).startswith(f"{host}: ")
    return caught.value


def opens(host, **kwargs):
    connection = SshConnection(host, kwargs)
    event_loop.run(connection.open(), 60)
    event_loop.run(connection.close(), 60)


def changed(hosts, tmp_path, **options):
    """Write the hosts' configuration without its keys and its policy, and with other options."""
    path = tmp_path / "config"
    text = re.sub(r"(?m)^\s*(IdentityFile|StrictHostKeyChecking)\b.*\n", "", Path(hosts.config_file).read_text())
    path.write_text("Host *\n" + "".join(f"  {key} {value}\n" for key, value in options.items()) + text)
    return str(path)


@pytest.fixture
def key(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "sesame", "-f", str(tmp_path / "key")], check=True)
    return str(tmp_path / "key")


def test_unknown_host():
    assert failure("no-such-host.invalid", config_file="none").reason == "dns"


def test_refused(hosts):
    error = failure("127.0.0.1:1", config_file="none")
    assert error.reason == "refused"
    assert "127.0.0.1 port 1" in str(error)


def test_a_server_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        error = failure(f"127.0.0.1:{silent.getsockname()[1]}", config_file="none", timeout=1)
    assert error.reason == "timeout"
    assert time.monotonic() - start < 5


def test_a_server_that_drops_the_first_connects():
    """A full sshd does so; the connect is tried again."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for _ in range(7):  # at the first time it is asked why, by a connection more
                connection, _ = server.accept()
                seen.append(connection.close())

        thread = threading.Thread(target=serve)
        thread.start()
        error = failure(f"127.0.0.1:{server.getsockname()[1]}", config_file="none")
        thread.join(10)
    assert error.reason == "dropped"
    assert len(seen) == 7


def test_host_keys(hosts, tmp_path):
    key = re.search(r"IdentityFile (\S+)", Path(hosts.config_file).read_text())[1].strip('"')

    def config(**options):
        return changed(hosts, tmp_path, IdentityFile=key, **options)

    error = failure("host1", config_file=config(UserKnownHostsFile="/dev/null", GlobalKnownHostsFile="/dev/null"))
    assert error.reason == "host_key"
    assert re.search(r"is unknown \(\w+, SHA256:", str(error))
    known = tmp_path / "known"
    path = config(UserKnownHostsFile=known, GlobalKnownHostsFile="/dev/null")
    assert failure("host1", config_file=path, host_keys="strict").reason == "host_key"
    opens("host1", config_file=path, host_keys="accept-new")
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    kind, text = other.with_suffix(".pub").read_text().split()[:2]
    lines = [f"{line.split()[0]} {kind} {text}" for line in known.read_text().splitlines()]
    known.write_text("\n".join(lines) + "\n")
    error = failure("host1", config_file=path, host_keys="accept-new")
    assert error.reason == "host_key"
    for words in ("CHANGED", "SHA256:", f'ssh-keygen -f "{known}" -R'):
        assert words in str(error)


def test_no_key_is_accepted(hosts, key, tmp_path):
    error = failure("host1", config_file=changed(hosts, tmp_path), key_filename=key, passphrase="sesame")
    assert error.reason == "auth"
    assert "publickey" in str(error)
    assert "sesame" not in str(error)


def test_a_locked_key(make_hosts, key, tmp_path):
    hosts = make_hosts(1)
    config = changed(hosts, tmp_path)
    hosts[0].authorize(Path(key + ".pub").read_text())
    error = failure("host1", config_file=config, key_filename=key)
    assert error.reason == "auth"
    assert "ssh would have asked: Enter passphrase for key" in str(error)
    assert failure("host1", config_file=config, key_filename=key, passphrase="no").reason == "auth"
    opens("host1", config_file=config, key_filename=key, passphrase="sesame")


def test_passwords(make_hosts):
    hosts = make_hosts(1, password=True)
    error = failure("host1", config_file=hosts.config_file)
    assert error.reason == "auth"
    assert "ssh would have asked" in str(error)
    assert "Failed password" not in hosts[0].log()
    error = failure("host1", config_file=hosts.config_file, password="wrong one")
    assert "the password was not accepted" in str(error)
    assert "wrong one" not in str(error)
    opens("host1", config_file=hosts.config_file, password=PASSWORD)


def test_configuration(hosts, tmp_path):
    path = tmp_path / "config"
    path.write_text("Host x\n\n  Fooo bar\n")
    error = failure("host1", config_file=str(path))
    assert error.reason == "config"
    assert f"{path}, line 3" in str(error)
    assert failure("host1", config_file="none", ssh_options={"Fooo": "bar"}).reason == "config"


def test_python(hosts):
    connection = SshConnection("host1", {"config_file": hosts.config_file}, python="/no/such/python3")
    with pytest.raises(InvalidRuntimeError) as caught:
        event_loop.run(connection.open(), 60)
    assert caught.value.reason == "python"
    assert "/no/such/python3" in str(caught.value)


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh"])
def test_no_python_in_any_shell(make_hosts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    hosts = make_hosts(1, python="none", shell=shell)
    assert failure("host1", config_file=hosts.config_file).reason == "python"


def test_an_account_that_may_not_log_in(make_hosts):
    hosts = make_hosts(1, shell="/usr/sbin/nologin")
    error = failure("host1", config_file=hosts.config_file)
    assert error.reason == "shell"
    assert "not available" in str(error)


def test_on_the_way(make_hosts):
    hosts = make_hosts(1, bastion=True, bastion_sshd={"AllowTcpForwarding": "no"})
    error = failure("host1", config_file=hosts.config_file)
    assert error.reason == "unreachable"
    assert "AllowTcpForwarding" in str(error)
    assert "jump host" in str(error)


# What sshd prints before the login, and a start-up file of the shell after it: as much like ssh's own words as can be.
BANNER = """\
Idle sessions are timed out after 15 minutes. Accounts with a leaked host key will be revoked.
ssh: Could not resolve hostname github.com: Temporary failure in name resolution
Authenticated to nobody (via proxy).
lazy@nowhere: Permission denied (publickey).
Host key verification failed.
command-line: line 1: see the manual
bash: line 1: exec: python3: not found
kex_exchange_identification: Connection closed by remote host
Connection closed by UNKNOWN port 65535
"""
STARTUP = f"""\
cat >&2 <<'END'
{BANNER}Traceback (most recent call last):
ImportError: No module named banners
END
case "$(cat ~/mode)" in
  exit) echo 'no time today' >&2; exit 3;;
  fail) exit 255;;
  kill) kill -9 $$;;
  hang) read -r answer;;
esac
"""


def looks_like_the_banner(text):
    return [line for line in BANNER.splitlines() if line in text]


@pytest.fixture
def talkative(make_hosts):
    return make_hosts(
        1, sshd={"Banner": "/home/lazy/banner"}, files={"banner": BANNER, ".bashrc": STARTUP, "mode": "work\n"}
    )


def test_a_banner_and_start_up_files_are_no_reason(talkative, key, tmp_path):
    hosts, mode = talkative, talkative[0].path("~/mode")
    opens("host1", config_file=hosts.config_file)
    errors = {
        "key": failure("host1", config_file=changed(hosts, tmp_path), key_filename=key, passphrase="sesame"),
        "unknown": failure(
            "host1", config_file=changed(hosts, tmp_path, UserKnownHostsFile="/dev/null"), host_keys="strict"
        ),
    }
    for name, given in (("exit", {}), ("fail", {}), ("kill", {}), ("hang", {"timeout": 1})):
        mode.write_text(name)
        errors[name] = failure("host1", config_file=hosts.config_file, **given)
    mode.write_text("work")
    connection = SshConnection("host1", {"config_file": hosts.config_file}, python="/no/such/python3")
    with pytest.raises(InvalidRuntimeError) as caught:
        event_loop.run(connection.open(), 60)
    errors["python"] = caught.value
    reasons = {"key": "auth", "unknown": "host_key", "python": "python"}
    assert {name: error.reason for name, error in errors.items()} == {
        name: reasons.get(name, "shell") for name in errors
    }
    assert "no time today" in str(errors["exit"])
    assert "exit status 255" in str(errors["fail"])
    for name in ("key", "unknown", "python", "hang"):
        assert not looks_like_the_banner(str(errors[name])), name


def test_a_banner_is_no_reason_for_a_lost_link(talkative):
    hosts = talkative

    async def lose():
        connection = SshConnection("host1", {"config_file": hosts.config_file, "grace": 0})
        await connection.open()
        try:
            waiting = connection.request("run", argv=["sleep", "60"])
            for session in hosts[0].sessions():
                hosts[0].run(["kill", "-9", str(session.inner_pid)], check=False)
            await waiting
        finally:
            await connection.close()

    with pytest.raises(ConnectionLostError) as caught:
        event_loop.run(lose(), 60)
    assert not looks_like_the_banner(str(caught.value))
    assert "ImportError" not in str(caught.value)
    # Which of ssh's own words come first depends on whether it was just about to write.
    assert re.search(r"closed by remote host|Broken pipe|reset by peer", str(caught.value))


def test_the_banner_of_a_jump_host_is_no_reason(make_hosts, key, tmp_path):
    hosts = make_hosts(1, bastion=True, bastion_sshd={"Banner": "/run/host/banner"})
    hosts.bastion.path("/run/host/banner").write_text(BANNER)
    opens("host1", config_file=hosts.config_file)
    error = failure("host1", config_file=changed(hosts, tmp_path), key_filename=key, passphrase="sesame")
    assert (error.reason, "at the jump host" in str(error)) == ("auth", True)
    assert not looks_like_the_banner(str(error))
    config = Path(hosts.config_file).read_text()
    (tmp_path / "refused").write_text(config.replace("HostName 198.19.", "Port 1\n    HostName 198.19."))
    error = failure("host1", config_file=str(tmp_path / "refused"))
    assert (error.reason, "the jump host (" in str(error) or "the jump host cannot" in str(error)) == ("refused", True)


@pytest.fixture
def signed(hosts, make_hosts, tmp_path):
    """A host whose key an authority signs, as often as wanted, and a configuration that knows the authority only."""
    hosts = make_hosts(1)
    for name in ("ca", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    config = Path(hosts.config_file).read_text()
    known = Path(re.search(r"UserKnownHostsFile (\S+)", config)[1]).read_text()
    (tmp_path / "host.pub").write_text(known.partition(" ")[2])
    authority = (tmp_path / "ca.pub").read_text()

    def sign(*options, by="ca", known=f"@cert-authority {hosts[0].address} {authority}", **given):
        argv = ["ssh-keygen", "-q", "-s", str(tmp_path / by), "-I", "id", *options, str(tmp_path / "host.pub")]
        subprocess.run(argv, check=True)
        hosts[0].path("/run/host/cert.pub").write_text((tmp_path / "host-cert.pub").read_text())
        hosts[0].restart_sshd(HostCertificate="/run/host/cert.pub")
        (tmp_path / "known").write_text(known)
        path = tmp_path / "config"
        path.write_text(f"Host *\n  UserKnownHostsFile {tmp_path}/known\n  {given.get('line', '')}\n{config}")
        return str(path)

    sign.address, sign.authority, sign.key = hosts[0].address, authority, known.partition(" ")[2]
    return sign


@pytest.mark.parametrize("policy", ["yes", "ask"])
def test_host_certificates(signed, policy):
    line = f"StrictHostKeyChecking {policy}"
    name = ("-h", "-n", signed.address)
    opens("host1", config_file=signed(*name, line=line))
    for arguments, said in (
        ((*name, "-V", "20200101:20210101"), "is not valid: expired"),
        ((*name, "-V", "20990101:20990102"), "is not valid: not yet valid"),
        (("-h", "-n", "elsewhere.example"), "is not valid: name is not a listed principal"),
    ):
        error = failure("host1", config_file=signed(*arguments, line=line))
        assert error.reason == "host_key"
        assert "the certificate of the host " in str(error)
        assert said in str(error)
        assert "do not take its key on trust" in str(error)
        assert "accept-new" not in str(error)
    for revoked in (signed.key, signed.authority):
        known = f"@cert-authority {signed.address} {signed.authority}@revoked * {revoked}"
        error = failure("host1", config_file=signed(*name, known=known, line=line))
        assert (error.reason, "certificate, or the authority that signed it, is marked as revoked" in str(error)) == (
            "host_key",
            True,
        )
    error = failure("host1", config_file=signed(*name, by="other", line=line))
    assert error.reason == "host_key"
    assert "shows no certificate of an authority that" in str(error)
    assert "accept-new" not in str(error)
    # Who trusts no authority for it still hears of the usual way.
    error = failure("host1", config_file=signed(*name, known="", line=line))
    assert (error.reason, "accept-new" in str(error)) == ("host_key", True)


def test_a_user_certificate_in_place_of_a_host_certificate(signed):
    error = failure("host1", config_file=signed("-n", signed.address, line="StrictHostKeyChecking yes"))
    assert error.reason == "host_key"
    assert "not a host certificate" in str(error)
    assert "accept-new" not in str(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-n", "lazy", "-V", "20200101:20210101"), "has expired (2021-01-01T00:00:00)"),
        (("-n", "lazy", "-V", "20990101:20990102"), "is not valid before 2099-01-01T00:00:00"),
        (("-n", "other"), "names other as principals, not lazy"),
        (("-h", "-n", "lazy"), "is that of a host, not of a user"),
    ],
)
def test_user_certificates(make_hosts, tmp_path, options, said):
    hosts = make_hosts(1, sshd={"TrustedUserCAKeys": "/run/host/ca.pub"})
    for name in ("ca", "me"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    hosts[0].path("/run/host/ca.pub").write_text((tmp_path / "ca.pub").read_text())
    config, key = changed(hosts, tmp_path), str(tmp_path / "me")

    def sign(*options):
        argv = ["ssh-keygen", "-q", "-s", str(tmp_path / "ca"), "-I", "id", *options, str(tmp_path / "me.pub")]
        subprocess.run(argv, check=True)

    sign("-n", "lazy")
    opens("host1", config_file=config, key_filename=key)
    sign(*options)
    error = failure("host1", config_file=config, key_filename=key)
    assert error.reason == "auth"
    assert f"the certificate {key}-cert.pub {said}" in str(error)
    assert "have your key signed again" in error.hint


# --- keys that cannot be used --------------------------------------------------------------------
def _world_readable(key: Path) -> None:
    key.chmod(0o644)


def _with_windows_line_ends(key: Path) -> None:
    key.write_bytes(key.read_bytes().replace(b"\n", b"\r\n"))


def _public(key: Path) -> None:
    shown = subprocess.run(["ssh-keygen", "-y", "-f", str(key)], capture_output=True, check=True)
    key.write_bytes(shown.stdout)


def _missing(key: Path) -> None:
    key.unlink()


@pytest.mark.parametrize(
    ("spoil", "cause", "step"),
    [
        (_world_readable, "others may read the key file {} (mode 0644)", "chmod 600 {}"),
        (_with_windows_line_ends, "the key file {} has the line ends of Windows", "sed -i"),
        (_public, "{} is a public key", "name the right file"),
        (_missing, "the key file {} does not exist", "name the right file"),
    ],
)
def test_the_cause_of_a_key_file_comes_first(hosts, tmp_path, spoil, cause, step):
    key = tmp_path / "key"
    shutil.copy(hosts.key_file, key)  # ssh says nothing of the file where the host does not take the key
    key.chmod(0o600)
    spoil(key)
    error = failure("host1", config_file=changed(hosts, tmp_path, IdentityFile=key))
    assert error.reason == "auth"
    assert error.detail.startswith(cause.format(key))
    assert error.hint.startswith(step.format(key)) or step in error.hint


def test_a_key_and_a_password(make_hosts):
    hosts = make_hosts(1, sshd={"AuthenticationMethods": "publickey,password", "PasswordAuthentication": "yes"})
    error = failure("host1", config_file=hosts.config_file)
    assert error.detail.startswith("the key was accepted, but the host asks for more than that")
    assert "password" in error.hint
    error = failure("host1", config_file=hosts.config_file, password="wrong one")
    assert error.detail.startswith("the key was accepted, but not the password")
    opens("host1", config_file=hosts.config_file, password=PASSWORD)


def test_too_many_keys(make_hosts, tmp_path):
    hosts = make_hosts(1, sshd={"MaxAuthTries": "2"})
    keys = [str(tmp_path / f"key{number}") for number in range(3)]
    for key in keys:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    lines = "\n  IdentityFile ".join([*keys, hosts.key_file])
    error = failure("host1", config_file=changed(hosts, tmp_path, IdentityFile=lines))
    assert "too many keys" in error.detail
    assert "IdentitiesOnly yes" in error.hint


# --- shells and commands that are not what they should be ----------------------------------------
@pytest.mark.parametrize(
    ("options", "detail", "hint"),
    [
        ({"shell": "rbash"}, "the login shell of the account is a restricted one", "usermod -s"),
        ({"sshd": {"ForceCommand": "/bin/sh -c $SSH_ORIGINAL_COMMAND"}}, "exit status 0", "in quotes"),
        ({"sshd": {"ForceCommand": "echo backups only"}}, "it printed: backups only", "ForceCommand"),
        (
            {"sshd": {"ForceCommand": "/no/such/rsync"}},
            "before Python was started: bash: line 1: /no/such/rsync",
            "Force",
        ),
        ({"files": {".bashrc": "exec fish5\n"}}, ".bashrc: line 1: exec: fish5: not found", "(exec)"),
        ({"files": {".bashrc": "yes noise | head -c 2000000\n"}}, "print more than 1 MiB", "~/.bashrc"),
        (
            {"sshd": {"ForceCommand": 'script -qefc "$SSH_ORIGINAL_COMMAND" /dev/null'}},
            "runs commands on a terminal, as recordings of sessions do",
            "[ -t 0 ]",
        ),
    ],
    ids=["rbash", "unquoted", "other command", "missing command", "missing shell", "noise", "recording"],
)
def test_what_comes_in_the_place_of_python(make_hosts, options, detail, hint):
    hosts = make_hosts(1, **options)
    error = failure("host1", config_file=hosts.config_file)
    assert error.reason == "shell"
    assert detail in error.detail
    assert hint in error.hint


def test_one_session_only(make_hosts, tmp_path):
    hosts = make_hosts(1, max_sessions=1)
    with Runtime("host1", connection_kwargs={"config_file": hosts.config_file}) as runtime:
        with pytest.raises(TaskExecutionError, match="needs a further ssh session") as caught:
            runtime.send_file(__file__, "copy")
        assert "have MaxSessions in the host's sshd_config set" in str(caught.value)


def test_a_host_that_penalises_failed_logins():
    """As an sshd from OpenSSH 9.8 on does: `ssh -v` shows "banner line 0: Not allowed at this time", ssh does not."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve():
            while not ended.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.sendall(b"Not allowed at this time\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            error = failure(f"127.0.0.1:{server.getsockname()[1]}", config_file="none")
        finally:
            ended.set()
            thread.join(10)
    assert error.reason == "refused"
    assert "logins from this address have failed" in error.detail
    assert "wait" in error.hint
