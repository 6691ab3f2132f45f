"""Connection settings, and the command line that they become."""

from __future__ import annotations

import subprocess

import pytest

from lazycluster.ssh.config import Settings, parse_destination, ssh_argv, ssh_version


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("alias", (None, "alias", None)),
        ("me@host", ("me", "host", None)),
        ("me@host:2222", ("me", "host", 2222)),
        ("ssh://me@host:2222", ("me", "host", 2222)),
        ("ssh://host/", (None, "host", None)),
        ("[::1]:22", (None, "::1", 22)),
        ("me@[fe80::1%eth0]:22", ("me", "fe80::1%eth0", 22)),
        ("::1", (None, "::1", None)),
        ("me@corp@host", ("me@corp", "host", None)),
        ("DOMAIN\\me@host", ("DOMAIN\\me", "host", None)),
    ],
)
def test_destinations(text, parts):
    assert tuple(parse_destination(text)) == parts


@pytest.mark.parametrize(
    "text",
    [
        "", "-oProxyCommand=x", "me@-oProxyCommand=x", "ssh://-oProxyCommand=x", "a\x1b[2J", "a\u202eb", "a\x9b",
        "me@-x", "-x@host", "a b", "a\n", "a\x00b", "a;b", "$(x)", "`x`", "@host", "me@",
        "host:", "host:0", "host:65536", "host:http", "[::1", "[::1]x", "ssh://", "*", "a?",
    ],
)  # fmt: skip
def test_hostile_destinations_are_refused(text):
    with pytest.raises(ValueError, match=r"host|user|name"):
        parse_destination(text)


@pytest.mark.parametrize("host", [None, 5, b"host"])
def test_a_host_is_a_string(host):
    with pytest.raises(TypeError):
        parse_destination(host)


def test_unknown_keys_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'pasword'.*did you mean 'password'"):
        Settings.parse("host", {"pasword": "x"})
    with pytest.raises(ValueError, match=r"'colour'.*there are: user, port"):
        Settings.parse("host", {"colour": "red"})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"port": True}, TypeError),
        ({"port": "22"}, TypeError),
        ({"port": 0}, ValueError),
        ({"port": 65536}, ValueError),
        ({"user": "-x"}, ValueError),
        ({"user": 3}, TypeError),
        ({"user": ""}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": "5"}, TypeError),
        ({"key_filename": "/no/such/key"}, ValueError),
        ({"key_filename": []}, ValueError),
        ({"config_file": "/no/such/file"}, ValueError),
        ({"config_file": "/"}, ValueError),
        ({"password": "a\nb"}, ValueError),
        ({"password": 3}, TypeError),
        ({"proxy_jump": "-x"}, ValueError),
        ({"proxy_jump": "a,,b"}, ValueError),
        ({"host_keys": "no"}, ValueError),
        ({"host_keys": True}, TypeError),
        ({"ssh_options": "Compression=yes"}, TypeError),
        ({"ssh_options": ["Compression"]}, ValueError),
        ({"ssh_options": {"LocalForward": "1 x:1"}}, ValueError),
        ({"ssh_options": {"controlmaster": "no"}}, ValueError),
        ({"ssh_options": {"Compression": 1.5}}, TypeError),
        ({"ssh_options": {"Compression": "a\nb"}}, ValueError),
        ({"ssh_options": {"ProxyCommand": "nc %h %p"}, "proxy_jump": "b"}, ValueError),
        ({"user": "other"}, ValueError),
        ({"port": 23}, ValueError),
    ],
)
def test_bad_values_are_refused(given, error):
    with pytest.raises(error, match="me@host:22"):
        Settings.parse("me@host:22", given)


def test_none_means_not_given_and_equal_values_agree():
    settings = Settings.parse("me@host:22", {"user": "me", "port": None, "password": None})
    assert (settings.user, settings.port, settings.password) == ("me", 22, None)


def test_secrets_are_never_shown(tmp_path):
    settings = Settings.parse("host", {"password": "sesame", "passphrase": "mellon"})
    argv = ssh_argv(settings, "/tmp/x", "true", (9, 2))
    for text in (repr(settings), str(settings), " ".join(argv)):
        assert "sesame" not in text
        assert "mellon" not in text


def test_the_command_line(tmp_path):
    key = tmp_path / "key"
    key.write_text("")
    settings = Settings.parse(
        "me@host:2222",
        {"key_filename": key, "proxy_jump": ["a", "u@b:3"], "host_keys": "accept-new", "timeout": 2.5,
         "ssh_options": {"Compression": True, "ServerAliveInterval": 9}, "config_file": "none"},
    )  # fmt: skip
    argv = ssh_argv(settings, "/tmp/50%/x", "exec true", (9, 2))
    assert argv[:7] == ["ssh", "-F", "none", "-M", "-S", "/tmp/50%%/x", "-T"]
    assert argv[-3:] == ["--", "host", "exec true"]
    assert argv[-11:-3] == ["-l", "me", "-p", "2222", "-i", str(key), "-J", "a,u@b:3"]
    options = [argv[n + 1] for n, word in enumerate(argv) if word == "-o"]
    for option in (
        "ConnectTimeout=3", "IdentitiesOnly=yes", "StrictHostKeyChecking=accept-new", "Compression=yes",
        "ServerAliveInterval=9", "ServerAliveCountMax=4", "SessionType=default",
    ):  # fmt: skip
        assert option in options
    assert "ServerAliveInterval=2" not in options
    assert "SessionType=default" not in ssh_argv(settings, "/tmp/x", "true", (8, 4))


@pytest.mark.parametrize("path", ["relative", "/" + "x" * 80, "/tmp/${HOME}"])
def test_control_paths_are_checked(path):
    with pytest.raises(ValueError, match="control path"):
        ssh_argv(Settings.parse("host"), path, "true", (9, 2))


def test_ssh_itself_takes_the_command_line_and_what_could_harm_is_overridden(tmp_path):
    config = tmp_path / "config"
    config.write_text(
        "Host *\n RemoteCommand evil\n RequestTTY force\n SessionType none\n ForkAfterAuthentication yes\n"
        " StdinNull yes\n ControlMaster auto\n ControlPath /tmp/other-%C\n ControlPersist 1h\n LogLevel QUIET\n"
        " LocalForward 1234 localhost:1\n PermitLocalCommand yes\n LocalCommand evil\n Tunnel yes\n ForwardX11 yes\n"
        " ForwardAgent yes\n EscapeChar ~\n BatchMode yes\n GatewayPorts yes\n ExitOnForwardFailure yes\n User me\n"
        " ServerAliveInterval 0\n"
    )
    settings = Settings.parse("host", {"config_file": str(config)})
    argv = ssh_argv(settings, "/tmp/ours", "true", ssh_version())
    said = subprocess.run([argv[0], "-G", *argv[1:-1]], capture_output=True, text=True, check=True).stdout
    got = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
    assert got["user"] == "me"
    assert got["controlpath"] == "/tmp/ours"
    assert (got["controlmaster"], got["controlpersist"]) == ("true", "no")
    expected = {
        "requesttty": "false", "sessiontype": "default", "forkafterauthentication": "no", "stdinnull": "no",
        "loglevel": "INFO", "permitlocalcommand": "no", "tunnel": "false", "forwardx11": "no", "forwardagent": "no",
        "batchmode": "no", "gatewayports": "no", "exitonforwardfailure": "no", "clearallforwardings": "yes",
        "serveraliveinterval": "2", "escapechar": "none",
    }  # fmt: skip
    assert {key: got[key] for key in expected} == expected
    assert "remotecommand" not in got
    assert "localforward" not in got
