"""What ssh says, sorted. The texts are those of OpenSSH 9.2 and of the shells."""

from __future__ import annotations

import pytest

from lazycluster.ssh.config import Settings
from lazycluster.ssh.errors import classify, is_retryable

PROXY_ENDED = (
    "kex_exchange_identification: Connection closed by remote host\r\nConnection closed by UNKNOWN port 65535\r\n"
)
FORWARDING = "stdio forwarding failed\r\n" + PROXY_ENDED
CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r
The fingerprint for the ED25519 key sent by the remote host is\nSHA256:uM9f5jZ7.\r
Please contact your system administrator.\r
Add correct host key in /home/me/known_hosts to get rid of this message.\r
Offending ED25519 key in /home/me/known_hosts:1\r
Host key for [h]:22022 has changed and you have requested strict checking.\r
Host key verification failed.\r
"""
QUESTION = (
    "The authenticity of host '[h]:22022 ([10.0.0.1]:22022)' can't be established.\n"
    "ED25519 key fingerprint is SHA256:uM9f5jZ7.\nThis key is not known by any other names.\n"
    "Are you sure you want to continue connecting (yes/no/[fingerprint])?"
)


def told(said, status=255, kwargs=None, **more):
    return classify(Settings.parse("me@h", {"config_file": "none", **(kwargs or {})}), said, status, **more)


@pytest.mark.parametrize(
    ("said", "reason", "words"),
    [
        ("ssh: Could not resolve hostname h: Name or service not known\r\n", "dns", "the name h is not known"),
        ("ssh: connect to host h port 22: Connection refused\r\n", "refused", "h port 22"),
        ("ssh: connect to host h port 22: Connection timed out\r\n", "timeout", "timed out"),
        ("ssh: connect to host h port 22: No route to host\r\n", "unreachable", "No route"),
        ("Connection timed out during banner exchange\r\nConnection to h port 22 timed out\r\n", "timeout", "in time"),
        ("Host key verification failed.\r\n", "host_key", "unknown"),
        (CHANGED, "host_key", "CHANGED: it now shows ED25519, SHA256:uM9f5jZ7"),
        (CHANGED, "host_key", 'ssh-keygen -f "/home/me/known_hosts" -R "[h]:22022"'),
        ("me@h: Permission denied (publickey).\r\n", "auth", "ssh-copy-id -F none me@h"),
        ("Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures\r\n", "auth", "key_filename"),
        ('Load key "/k": error in libcrypto\r\nme@h: Permission denied (publickey).\r\n', "auth", 'Load key "/k"'),
        ("/x/config: line 3: Bad configuration option: fooo\r\n/x/config: terminating, 1 bad configuration options\r\n",
         "config", "/x/config, line 3: Bad configuration option: fooo"),
        ("command-line: line 0: Bad configuration option: fooo\r\n", "config", "ssh_options"),
        ("Bad owner or permissions on /home/me/.ssh/config\r\n", "config", "chmod go-w /home/me/.ssh/config"),
        ("kex_exchange_identification: Connection closed by remote host\r\nConnection closed by h port 22\r\n",
         "dropped", "MaxStartups"),
        ("kex_exchange_identification: read: Connection reset by peer\r\n", "dropped", "reset"),
        ("ssh_dispatch_run_fatal: Connection to h port 22: Broken pipe\r\n", "dropped", "Broken pipe"),
        ("Unable to negotiate with h port 22: no matching key exchange method found.\r\n", "protocol", "negotiate"),
        ("something new\r\n", "ssh", "something new"),
        ("", "ssh", "nothing"),
        # on the way
        ("ssh: connect to host gate port 22: Connection refused\r\n" + PROXY_ENDED, "refused", "at the jump host"),
        ("me@gate: Permission denied (publickey).\r\n" + PROXY_ENDED, "auth", "at the jump host"),
        ("channel 0: open failed: connect failed: Connection refused\r\n" + FORWARDING,
         "refused", "the jump host cannot connect to it"),
        ("channel 0: open failed: administratively prohibited: open failed\r\n" + FORWARDING,
         "unreachable", "AllowTcpForwarding"),
        ("channel 0: open failed: connect failed: Name or service not known\r\n" + FORWARDING,
         "dns", "jump host"),
        ("/bin/bash: line 1: exec: nosuch: not found\r\n" + PROXY_ENDED, "proxy", "nosuch"),
        (PROXY_ENDED, "dropped", "jump host"),
    ],
)  # fmt: skip
def test_ssh_itself_failed(said, reason, words):
    error = told(said)
    assert error.reason == reason
    assert words in str(error)
    assert error.hint
    assert str(error).startswith("me@h: ")
    assert is_retryable(error) == (reason == "dropped")


@pytest.mark.parametrize(
    ("said", "status", "output", "reason", "words"),
    [
        ("bash: line 1: exec: python3: not found\n", 127, "", "python", "python3 does not run"),
        ("bash: line 1: python3: command not found\n", 127, "noise\n", "python", "python3 does not run"),
        ("sh: 1: exec: python3: not found\n", 127, "", "python", "does not run"),
        ("zsh:1: command not found: python3\n", 127, "", "python", "does not run"),
        ("fish: Unknown command: python3\n", 127, "", "python", "does not run"),
        ("python3: Command not found.\n", 1, "", "python", "does not run"),
        ("bash: line 1: /opt/x/python3: No such file or directory\n", 127, "", "python", "does not run"),
        ("bash: line 1: exec: python3: cannot execute: Permission denied\n", 126, "", "python", "does not run"),
        ('  File "<string>", line 1\nSyntaxError: invalid syntax\n', 1, "", "python", "SyntaxError"),
        ("", 1, "This account is currently not available.\n", "shell", "not available"),
        ("", 1, "", "shell", "exit status 1"),
        ("exec request failed on channel 0\n", 255, "", "shell", "allowed to run commands"),
    ],
)
def test_the_login_shell_failed(said, status, output, reason, words):
    error = told(said, status, output=output)
    assert error.reason == reason
    assert words in str(error)


def test_time_is_up():
    assert told("", None, phase="timeout").reason == "timeout"
    error = told("", None, phase="timeout", logged_in=True)
    assert (error.reason, "printed nothing" in str(error)) == ("shell", True)
    error = told("", None, phase="timeout", output="your name? ")
    assert error.reason == "shell"
    assert "your name?" in str(error)


def test_an_unknown_host_key_that_was_asked_about():
    error = told("Host key verification failed.\r\n", asked=[QUESTION])
    assert error.reason == "host_key"
    for words in ("[h]:22022 is unknown", "ED25519, SHA256:uM9f5jZ7", "ssh -F none -l me h", "accept-new"):
        assert words in str(error)
    assert "keyscan" not in str(error)


@pytest.mark.parametrize(
    ("asked", "answered", "words"),
    [
        (["me@h's password:"], [], ["ssh would have asked: me@h's password:", "ssh-copy-id"]),
        ([], ["me@h's password:"], ["the password was not accepted", "check user and password"]),
        (["Enter passphrase for key '/k':", "me@h's password:"], [], ["locked by a passphrase", "ssh-add"]),
        ([], ["Enter passphrase for key '/k':"], ["the passphrase does not unlock"]),
        (["(me@h) Verification code:"], [], ["Verification code"]),
    ],
)
def test_what_was_asked(asked, answered, words):
    error = told(
        "me@h: Permission denied (publickey,password).\r\n" if answered else "", -15, asked=asked, answered=answered
    )
    assert error.reason == "auth"
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("why", ["No space left on device", "Disk quota exceeded", "Read-only file system"])
def test_whose_disk_is_full(why):
    error = told(f"unix_listener: cannot bind to path /tmp/l/1.jI8jHOENlFmbC222: {why}\r\n")
    assert (error.host, error.reason) == ("localhost", "manager")
    assert f"this machine, the manager: /tmp/l/1.jI8jHOENlFmbC222: {why}" in str(error)
    error = told(f"noise\nlazycluster: no private directory can be made: /tmp: {why}; /var/tmp: {why}\n", 1)
    assert (error.host, error.reason) == ("me@h", "disk")
    assert f"on the host: /tmp: {why}; /var/tmp: {why}\n  Next step: free some space" in str(error)
    assert not is_retryable(error)
