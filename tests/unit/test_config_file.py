"""Changes to an ssh configuration: all the rest of it survives."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
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

_ADD = (
    """import os, sys; from lazycluster.ssh.config_file import *; add_host("gpu", {"HostName": "gpu"}, sys.argv[1])"""
)


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
    assert stat.S_IMODE(config.stat().st_mode) == 0o644
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


def test_names_in_quotes_and_twice_on_a_line(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text('Host "a" b a  # a\n  User x\nHost c "d"\n')
    remove_host("a", config)
    remove_host("d", config)
    assert config.read_text() == "Host b  # a\n  User x\nHost c\n"


def test_names_that_differ_in_case_are_different(config: Path) -> None:
    add_host("A", {"HostName": "upper"}, config)
    assert _means(config, "A")["hostname"] == "upper"
    assert _means(config, "a")["hostname"] == "192.0.2.1"


@pytest.mark.parametrize("blank", [b"\x0b", b"\xc2\xa0", b"\x0c", b"\xe2\x80\xa8", b"\r"])
def test_what_only_looks_like_a_blank_is_none(tmp_path: Path, blank: bytes) -> None:
    config = tmp_path / "config"
    text = b"# a" + blank + b"Host *\nHost x" + blank + b"y z\n  User me\n"
    config.write_bytes(text)
    for name in ("x", "y"):
        with pytest.raises(ConfigurationError, match="has no host"):
            remove_host(name, config)
    add_host("gpu", {"HostName": "gpu.lab"}, config)
    assert config.read_bytes() == text + b"\nHost gpu\n    HostName gpu.lab\n"
    remove_host("z", config)
    assert b"\nHost x" + blank + b"y\n" in config.read_bytes()


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_bytes(b"\xef\xbb\xbfHost a\n")
    with pytest.raises(ConfigurationError, match="byte order mark"):
        add_host("gpu", {"HostName": "gpu.lab"}, config)
    assert config.read_bytes() == b"\xef\xbb\xbfHost a\n"


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


@pytest.mark.parametrize("link", ["../dotfiles/config", "one"])
def test_the_file_of_a_repository_is_changed_and_its_links_stay(tmp_path: Path, link: str) -> None:
    for folder in ("dotfiles", "ssh"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dotfiles" / "config").write_text(_TEXT)
    (tmp_path / "ssh" / "one").symlink_to("../dotfiles/config")
    config = tmp_path / "ssh" / "config"
    config.symlink_to(link)
    done = CliRunner().invoke(cli, ["delete-runtime", "a", "--config", str(config)])
    assert done.exit_code == 0, done.output
    assert config.readlink() == Path(link)
    assert "Host b " in (tmp_path / "dotfiles" / "config").read_text()
    backup = tmp_path / "dotfiles" / ("config" + BACKUP)
    assert backup.read_text() == _TEXT and str(backup) in done.output
    assert sorted(path.name for path in config.parent.iterdir()) == ["config", "one"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.symlink_to("new")
    add_host("gpu", {"HostName": "gpu.lab"}, config)
    assert config.is_symlink() and "Host gpu" in (tmp_path / "new").read_text()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigurationError, match="a link that leads to itself"):
        add_host("gpu", {"HostName": "gpu.lab"}, tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize(
    ("mode", "after"), [(0o600, 0o600), (0o644, 0o644), (0o640, 0o640), (0o664, 0o644), (0o666, 0o644), (0o700, 0o700)]
)
@pytest.mark.parametrize("names", [1, 2])
def test_the_mode_and_other_names_are_kept(config: Path, tmp_path: Path, mode: int, after: int, names: int) -> None:
    """But ssh refuses a configuration that others may write to: what is in it is run."""
    config.chmod(mode)
    if names == 2:
        (tmp_path / "other").hardlink_to(config)
    add_host("gpu", {"HostName": "gpu.lab"}, config)
    assert stat.S_IMODE(config.stat().st_mode) == after
    assert config.stat().st_nlink == names
    assert _means(config, "gpu")["hostname"] == "gpu.lab"
    remove_host("gpu", config)
    assert config.read_text() == _TEXT


def test_owner_group_and_attributes_are_kept(config: Path) -> None:
    try:
        os.setxattr(config, "user.mine", b"kept")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")
    if os.geteuid() == 0:
        os.chown(config, 12345, 23456)
    before = config.stat()
    add_host("gpu", {"HostName": "gpu.lab"}, config)
    after = config.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert os.getxattr(config, "user.mine") == b"kept"


def test_what_cannot_be_given_to_another_file_is_written_in_place(config: Path) -> None:
    """The owner of a file that somebody else may write to, say."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    for folder in (config.parent, *config.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    config.parent.chmod(0o777)
    os.chown(config, 12345, 65534)
    config.chmod(0o664)
    program = _ADD.replace("; add", "; os.setgroups([]); os.setgid(65534); os.setuid(65534); add")
    done = subprocess.run([sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inode = config.stat()
    assert (inode.st_uid, inode.st_gid, stat.S_IMODE(inode.st_mode)) == (12345, 65534, 0o664)
    assert "Host gpu" in config.read_text()
    assert sorted(path.name for path in config.parent.iterdir()) == ["config", "config" + BACKUP]


def test_a_file_that_is_mounted(config: Path) -> None:
    """Nothing can be put in its place."""
    script = 'mount --bind "$1" "$1" || exit 77; exec "$0" -c "$2" "$1"'
    argv = ["unshare", "-m", "sh", "-c", script, sys.executable, str(config), _ADD]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip("needs the right to mount")
    assert done.returncode == 0, done.stderr
    assert _means(config, "gpu")["hostname"] == "gpu"
    assert sorted(path.name for path in config.parent.iterdir()) == ["config", "config" + BACKUP]


@pytest.mark.parametrize(
    ("mount", "why"),
    [
        ('mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"', "config is read-only"),
        ('mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"', "new cannot be changed: Read-only"),
        ('mount -t tmpfs -o size=8k none "$1" && head -c 4096 /dev/zero | tr "\\0" "#" > "$1/config"', "No space left"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(config: Path, mount: str, why: str) -> None:
    """The configuration is as before, and nothing is left beside it."""
    name = "new" if "new" in why else "config"
    program = (
        "import os, sys; from lazycluster.ssh.config_file import *; before = sorted(os.listdir(sys.argv[1]))\n"
        f"try: add_host('gpu', {{'HostName': 'gpu'}}, sys.argv[1] + '/{name}')\n"
        "except ConfigurationError as error: print(error); print(sorted(os.listdir(sys.argv[1])) == before)"
    )
    script = f'{{ {mount}; }} || exit 77; exec "$0" -c "$2" "$1"'
    argv = ["unshare", "-m", "sh", "-c", script, sys.executable, str(config.parent), program]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip("needs the right to mount")
    assert why in done.stdout, done.stderr
    assert "Next step: " in done.stdout and "chmod" not in done.stdout
    assert done.stdout.endswith("True\n")


@pytest.mark.parametrize("mode", [0o400, 0o444])
@pytest.mark.parametrize("arguments", [["add-runtime", "gpu", "gpu.lab"], ["delete-runtime", "a"]])
def test_a_read_only_file_is_not_changed(config: Path, mode: int, arguments: list[str]) -> None:
    config.chmod(mode)
    done = CliRunner().invoke(cli, [*arguments, "--config", str(config)])
    assert isinstance(done.exception, ConfigurationError)
    assert "read-only" in str(done.exception) and f"chmod u+w {config}" in str(done.exception)
    assert (config.read_text(), stat.S_IMODE(config.stat().st_mode)) == (_TEXT, mode)
    assert [path.name for path in config.parent.iterdir()] == ["config"]


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
        ("c", {"HostName": "x", "Prot": "22"}, "ssh rejects the new configuration"),
        ("c", {"HostName": "x", "Port": "many"}, "ssh rejects the new configuration"),
        ("c", {"HostName": "x", "Match": "all"}, "not an option of a host"),
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
