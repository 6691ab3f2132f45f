"""Changes to an ssh configuration: all the rest of it survives."""

from __future__ import annotations

import stat
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazycluster.cli.app import cli
from lazycluster.ssh.config_file import BACKUP, ConfigurationError, add_host, remove_host

_TEXT = """\
# My machines
Include extra/*.conf
AddKeysToAgent yes

Host a b   # two at once
\tHostName 192.0.2.1

# all of them
Host *
    User me
    ServerAliveInterval = 5
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config"
    path.write_text(_TEXT)
    path.chmod(0o644)
    return path


def _means(config: Path, name: str) -> dict[str, str]:
    done = subprocess.run(["ssh", "-G", "-F", str(config), name], capture_output=True, text=True, check=True)
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_a_host_is_added_before_what_holds_for_all(config: Path) -> None:
    assert add_host("gpu", {"HostName": "gpu.lab", "User": "root", "Port": "2222"}, config) == config
    text = config.read_text()
    new = "Host gpu\n    HostName gpu.lab\n    User root\n    Port 2222\n\n"
    assert text.replace(new, "") == _TEXT
    assert text.index(new) < text.index("# all of them")
    meaning = _means(config, "gpu")
    assert (meaning["hostname"], meaning["user"], meaning["port"]) == ("gpu.lab", "root", "2222")
    assert meaning["serveraliveinterval"] == "5"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert config.with_name("config" + BACKUP).read_text() == _TEXT
    assert sorted(path.name for path in config.parent.iterdir()) == ["config", "config" + BACKUP]


def test_added_and_removed_it_is_as_before(config: Path) -> None:
    add_host("gpu", {"HostName": "gpu.lab"}, config)
    remove_host("gpu", config)
    assert config.read_text() == _TEXT


def test_a_name_of_several(config: Path) -> None:
    remove_host("a", config)
    assert config.read_text() == _TEXT.replace("Host a b ", "Host b ")


def test_the_last_of_several_and_a_comment(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host a b\n  User x\nHost c # it\n  User y\n\n\n# d\nHost d\n")
    remove_host("b", config)
    remove_host("c", config)
    assert config.read_text() == "Host a\n  User x\n\n\n# d\nHost d\n"


@pytest.mark.parametrize("text", ["", "Host x\n  User y", "Host x\r\n  User y\r\n", "User me\n\n\n", "Host caf\xe9\n"])
def test_files_of_all_kinds(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep" / "config"
    if text:
        path.parent.mkdir()
        path.write_bytes(text.encode("latin-1"))
    add_host("new", {"HostName": "192.0.2.9"}, path)
    assert _means(path, "new")["hostname"] == "192.0.2.9"
    assert path.read_bytes().startswith(text.encode("latin-1").rstrip(b"\r\n"))
    assert (b"\r\n" in path.read_bytes()) == ("\r\n" in text)


def test_a_link_stays_one(config: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(config)
    add_host("gpu", {"HostName": "gpu.lab"}, link)
    assert link.is_symlink()
    assert "Host gpu" in config.read_text()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a", {"HostName": "x"}, "there already, in .*config:5"),
        ("*", {"HostName": "x"}, "pattern"),
        ("a,b", {"HostName": "x"}, "pattern"),
        ("-oProxyCommand=x", {"HostName": "x"}, "cannot be a host's name"),
        ("a\nHost b", {"HostName": "x"}, "cannot be a host's name"),
        ("", {"HostName": "x"}, "cannot be a host's name"),
        ("n" * 300, {"HostName": "x"}, "cannot be a host's name"),
        ("c", {"HostName": "x\nProxyCommand y"}, "control character"),
        ("c", {"HostName": "x", "Prot": "22"}, "ssh does not understand"),
        ("c", {"HostName": "x", "Port": "many"}, "ssh does not understand"),
        ("c", {"HostName": "x", "Match": "all"}, "no option of a host"),
    ],
)
def test_what_is_refused_changes_nothing(config: Path, name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        add_host(name, options, config)
    assert config.read_text() == _TEXT
    assert [path.name for path in config.parent.iterdir()] == ["config"]


@pytest.mark.parametrize("name", ["*", "nope", "", "a b"])
def test_removal_that_is_refused(config: Path, name: str) -> None:
    with pytest.raises(ConfigurationError):
        remove_host(name, config)
    assert config.read_text() == _TEXT


def test_a_host_of_an_included_file(tmp_path: Path) -> None:
    included = tmp_path / "more.conf"
    included.write_text("Host far\n  HostName far.lab\n")
    config = tmp_path / "config"
    config.write_text(f"Include {included}\n")
    with pytest.raises(ConfigurationError, match=r"more.conf:1: remove it there"):
        remove_host("far", config)
    with pytest.raises(ConfigurationError, match="there already"):
        add_host("far", {"HostName": "x"}, config)


def test_many_at_once(tmp_path: Path) -> None:
    config = tmp_path / "config"
    threads = [
        threading.Thread(target=add_host, args=(f"n{number}", {"HostName": f"192.0.2.{number}"}, config))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line for line in config.read_text().splitlines() if line.startswith("Host")) == [
        f"Host n{number}" for number in range(8)
    ]


def test_the_configuration_that_is_read_is_the_one_that_is_changed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYCLUSTER_SSH_CONFIG", str(config))
    done = CliRunner().invoke(cli, ["add-runtime", "new", "192.0.2.9"])
    assert done.exit_code == 0, done.output
    assert _means(config, "new")["hostname"] == "192.0.2.9"
    assert f"doctor --config {config} new" in done.output
    assert CliRunner().invoke(cli, ["delete-runtime", "new"]).exit_code == 0
    monkeypatch.setenv("LAZYCLUSTER_SSH_CONFIG", "none")
    refused = CliRunner().invoke(cli, ["add-runtime", "new", "192.0.2.9"])
    assert isinstance(refused.exception, ConfigurationError)
    assert not Path("none").exists()
