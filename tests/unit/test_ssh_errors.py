"""What ssh says, sorted. The texts are those of OpenSSH 9.2 and of the shells."""

from __future__ import annotations

import pytest

from lazycluster.ssh.circumstances import Circumstances
from lazycluster.ssh.config import Settings
from lazycluster.ssh.errors import classify, is_retryable, last_words

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
        ("A banner without a newline me@h: Permission denied (publickey).\r\n", "auth", "me@h takes publickey"),
        ("Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures\r\n", "auth", "key_filename"),
        ("Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures\r\n"
         "Disconnected from 1.2.3.4 port 22\r\n", "auth", "key_filename"),
        ('Load key "/k": error in libcrypto\r\nme@h: Permission denied (publickey).\r\n', "auth", 'Load key "/k"'),
        ("/x/config: line 3: Bad configuration option: fooo\r\n/x/config: terminating, 1 bad configuration options\r\n",
         "config", "/x/config, line 3: Bad configuration option: fooo"),
        ("/x/my config: line 1: Bad configuration option: \\357\\273\\277host\r\n"
         "/x/my config: terminating, 1 bad configuration options\r\n", "config", "BF//' '/x/my config'"),
        ("/x/config line 1: no argument after keyword \"host\\302\\240a\"\r\n"
         "/x/config: terminating, 1 bad configuration options\r\n", "config", "looks like a blank"),
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
    # As they come when ssh's own words are told apart from those of others.
    said = 'Authenticated to h ([10.0.0.1]:22) using "publickey".\r\n'
    here = told(f"{said}unix_listener: cannot bind to path /tmp/l/1.jI8j: {why}\r\n", heard="", logged_in=True)
    there = told(said, 1, heard=f"noise\nlazycluster: no private directory can be made: {why}\n", logged_in=True)
    assert (here.reason, there.reason) == ("manager", "disk")
    banner = f"unix_listener: cannot bind to path /tmp/l/1: {why}\n"
    assert told(said, 3, heard=banner, logged_in=True).reason == "shell"
    assert told(DENIED, heard=banner).reason == "auth"


DENIED = "me@h: Permission denied (publickey).\r\n"
NO_PYTHON = "bash: line 1: python3: command not found\n"


@pytest.mark.parametrize(
    "banner",
    [
        "Idle sessions are timed out after 15 minutes.\n",
        "Accounts with a leaked host key will be revoked.\n",
        "ssh: Could not resolve hostname github.com: Temporary failure in name resolution\n",
        "ssh: connect to host h port 22: Connection refused\n",
        "write: Broken pipe\n",
        "command-line: line 1: see the manual\n",
        "/etc/motd: terminating, 1 bad configuration options\n",
        "Host key verification failed.\n",
        CHANGED,
        "Certificate invalid: expired\n",
        "exec request failed on channel 0\n",
        "Unable to negotiate with h port 22: no matching cipher found.\n",
        "Traceback (most recent call last):\nImportError: No module named motd\n",
        "python3: not found\n",
        "bash: fork: Resource temporarily unavailable\n" * 5 + "a\nb\nc\nd\n",
        "Authenticated to h (via proxy).\n",
        PROXY_ENDED,
    ],
)
def test_words_like_those_of_ssh_are_no_reason(banner):
    """Of the host's banner, of a start-up file, or of what the host has ssh ask; where they are told apart, and not."""
    for error in (told(banner + DENIED), told(DENIED, heard=banner), told(banner + DENIED, heard="", logged_in=True)):
        assert error.reason == "auth"
        assert "accept-new" not in str(error)
    for error in (
        told(banner + NO_PYTHON, 127, logged_in=True),
        told(banner + NO_PYTHON, 127),
        told("", 127, heard=banner + NO_PYTHON, logged_in=True),
        told("", 127, heard=banner + NO_PYTHON),
    ):
        assert error.reason == "python"
        assert str(error).partition("\n")[0].endswith(f"does not run on the host: {NO_PYTHON.strip()}")
    for status in (3, 0, 255, -1):
        assert told("", status, heard=banner, logged_in=True).reason == "shell"
    assert told("", None, heard=banner, logged_in=True, phase="timeout").reason == "shell"
    ended = told(f"Received disconnect from 10.0.0.1 port 22:11: bye\n{banner}Disconnected from 10.0.0.1 port 22\n")
    asking = told(banner, None, heard="", phase="timeout")  # as what it is to be asked by keyboard-interactive
    assert (ended.reason, asking.reason) == ("ssh", "timeout")
    error = told("", None, heard=banner, phase="timeout")
    assert (error.reason, banner.strip() in str(error)) == ("timeout", False)
    dropped = told("Connection closed by 10.0.0.1 port 22\r\n", heard=banner)
    assert (dropped.reason, banner.strip() in str(dropped)) == ("dropped", False)


def test_what_a_jump_host_says():
    """Its ssh has no log of its own, but its last words tell what failed there; its banner tells nothing."""
    known = Circumstances(proxy_is_ssh=True)
    banner = "ssh: Could not resolve hostname x: no\nme@gate: Permission denied (motd).\nWelcome.\n"
    for heard, reason, words in (
        ("ssh: connect to host gate port 22: Connection refused\n", "refused", "at the jump host"),
        (banner + "me@gate: Permission denied (publickey).\n", "auth", "me@gate takes publickey"),
        (banner + "channel 0: open failed: connect failed: No route to host\nstdio forwarding failed\n",
         "unreachable", "the jump host cannot connect"),
        (banner, "dropped", "MaxStartups"),
        (banner + "bash: line 1: motd: not found\n", "dropped", "MaxStartups"),
        ("", "dropped", "MaxStartups"),
    ):  # fmt: skip
        error = told(PROXY_ENDED, heard=heard, known=known)
        assert (error.reason, words in str(error)) == (reason, True)
        assert "motd" not in str(error)
        assert "Welcome" not in str(error)
    error = told(PROXY_ENDED, heard="nc: no such program\n")
    assert (error.reason, "nc: no such program" in str(error)) == ("proxy", True)
    # The host was reached through it, and closes the connection: what it has printed is not the jump host's word.
    error = told("Connection closed by UNKNOWN port 65535\n", heard="me@gate: Permission denied (x).\n", known=known)
    assert (error.reason, "denied" in str(error)) == ("dropped", False)


def test_an_option_that_ssh_does_not_know():
    error = told("", heard="command-line: line 0: Bad configuration option: fooo\r\n")
    assert (error.reason, "Bad configuration option: fooo" in str(error)) == ("config", True)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Authenticated to h (via proxy).\nConnection to h closed by remote host.\n", "dropped"),
        ("Timeout, server h not responding.\n", "timeout"),
        ("client_loop: send disconnect: Broken pipe\n", "dropped"),
    ],
)
def test_lost_after_the_login(said, reason):
    for status in (255, None):
        error = told(said, status, heard="Host key verification failed.\n", logged_in=True)
        assert (error.reason, "verification" in str(error)) == (reason, False)


def test_last_words():
    said = (
        "** WARNING: connection is not using a post-quantum key exchange algorithm.\r\n"
        '** This session may be vulnerable to "store now, decrypt later" attacks.\r\n'
        'Authenticated to h ([10.0.0.1]:22) using "publickey".\r\n'
        "channel 5: open failed: connect failed: Connection refused\r\nconnect_to 127.0.0.1 port 1: failed.\r\n"
    )
    assert last_words(said) == ""
    end = "Timeout, server h not responding.\r\nTransferred: sent 1, received 2 bytes, in 1.0 seconds\r\n"
    assert last_words(said + end) == "Timeout, server h not responding."


def test_certificates_of_hosts():
    error = told("Certificate invalid: expired\r\nHost key verification failed.\r\n", asked=[QUESTION])
    assert error.reason == "host_key"
    assert "the certificate of the host [h]:22022 is not valid: expired" in str(error)
    assert "accept-new" not in str(error)
    ca = Circumstances(authority="/home/me/known_hosts")
    for asked in ([QUESTION], []):
        error = told("Host key verification failed.\r\n", asked=asked, known=ca)
        assert error.reason == "host_key"
        assert "no certificate of an authority that /home/me/known_hosts names for it" in str(error)
        assert "accept-new" not in str(error)
    error = told(DENIED, known=Circumstances(certificates=("the certificate /k-cert.pub has expired (2021)",)))
    assert (error.reason, "/k-cert.pub has expired (2021)" in str(error)) == ("auth", True)
