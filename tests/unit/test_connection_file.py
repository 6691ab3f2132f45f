"""Connection files: for their owner's eyes only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lazycluster.cluster import connection_file
from lazycluster.cluster.exceptions import ClusterError


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("what was there")
    path.chmod(0o644)
    assert connection_file.write(path, "Engine", {"key": "secret"}, "me") == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert connection_file.read(path, "Engine")["key"] == "secret"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    connection_file.remove(path, "me")
    assert not path.exists()
    connection_file.remove(path, "me")


def test_that_of_another_is_not_removed(tmp_path: Path) -> None:
    for owner in ("me", "another of this process"):
        path = connection_file.write(tmp_path / "file.json", "Engine", {}, owner)
    for text in (path.read_text(), "{}", "[]", "no JSON"):
        path.write_text(text)
        connection_file.remove(path, "me")
        assert path.exists()


def test_what_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(ClusterError, match="there is no connection file"):
        connection_file.read(path, "Engine")
    connection_file.write(path, "Engine", {}, "me")
    with pytest.raises(ClusterError, match="is of a Engine, not of a Other"):
        connection_file.read(path, "Other")
    path.chmod(0o640)
    with pytest.raises(ClusterError, match="others can read"):
        connection_file.read(path, "Engine")
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        with pytest.raises(ClusterError, match="another user"):
            connection_file.read(path, "Engine")
        os.chown(path, 0, -1)
    for text in ("", "[]", "{}", "\x00" * 100):
        path.write_text(text)
        with pytest.raises(ClusterError, match="no connection file"):
            connection_file.read(path, "Engine")
    with pytest.raises(ClusterError, match="is no file"):
        connection_file.read(tmp_path, "Engine")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ClusterError, match="is no file"):
        connection_file.read(tmp_path / "fifo", "Engine")


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connection_file.write(tmp_path / "missing" / "file.json", "Engine", {}, "me")
