"""Connection files: for their owner's eyes only."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazycluster.cluster import connection_file
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    connection_file.check(path)
    assert connection_file.write(path, "Engine", {"key": "an earlier one"}, "another") == path
    path.chmod(0o644)
    connection_file.check(path)
    assert connection_file.write(path, "Engine", {"key": "secret"}, "me") == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert connection_file.read(path, "Engine")["key"] == "secret"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    connection_file.remove(path, "me")
    assert not path.exists()
    connection_file.remove(path, "me")


def test_long_names(tmp_path: Path) -> None:
    for name in ("a" * 255, "\U0001f600" * 63):
        for _ in range(2):
            path = connection_file.write(tmp_path / name, "Engine", {}, "me")
        connection_file.remove(path, "me")
        assert list(tmp_path.iterdir()) == []


def test_that_of_another_is_not_removed(tmp_path: Path) -> None:
    for owner in ("me", "another of this process"):
        path = connection_file.write(tmp_path / "file.json", "Engine", {}, owner)
    for text in (path.read_text(), "", "{}", "[]", "no JSON", '{"owner": ["me"]}', "[" * 100_000):
        path.write_text(text)
        connection_file.remove(path, "me")
        assert path.read_text() == text


def _state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """What lies in a directory: the kind, the number and the content of each."""
    found = {}
    for path in folder.iterdir():
        inode = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(inode.st_mode) else b""
        found[path.name] = (inode.st_mode, inode.st_ino, content)
    return found


def _places(folder: Path) -> dict[str, str]:
    """Make what may have a name already; returns what an error says of each."""
    (folder / "thesis.ipynb").write_text('{"cells": [], "nbformat": 4, "owner": "somebody"}')
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "nested").write_text("[" * 100_000)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "socket", stat.S_IFSOCK | 0o600)
    (folder / "link").symlink_to("thesis.ipynb")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    connection_file.write(folder / "ours", "Engine", {}, "me")
    (folder / "to ours").symlink_to("ours")
    known = {"folder": "is a directory", "fifo": "is a FIFO", "socket": "is a socket"}
    links = dict.fromkeys(("link", "dangling", "loop", "to ours"), "is a symbolic link")
    return {
        **dict.fromkeys(("thesis.ipynb", "empty", "binary", "nested"), "is not a connection file"),
        **known,
        **links,
    }


def _write(path: Path) -> None:
    connection_file.write(path, "Engine", {}, "me")


def test_nothing_else_is_replaced_or_removed(tmp_path: Path) -> None:
    places = _places(tmp_path)
    before = _state(tmp_path)
    for name, why in places.items():
        for refuse in (connection_file.check, _write):
            with pytest.raises(ClusterError, match=rf"{name} .*{why}(.|\n)*Next step: name another file"):
                refuse(tmp_path / name)
        connection_file.remove(tmp_path / name, "me")
    assert _state(tmp_path) == before


def test_what_takes_the_place_of_a_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for name in _places(tmp_path):
        _write(path)
        path.unlink()
        (tmp_path / name).rename(path)
        before = _state(tmp_path)
        connection_file.remove(path, "me")
        assert _state(tmp_path) == before
        path.rename(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_that_of_another_user_is_not_replaced(tmp_path: Path) -> None:
    path = connection_file.write(tmp_path / "file.json", "Engine", {}, "another")
    os.chown(path, 12345, -1)
    for refuse in (connection_file.check, _write):
        with pytest.raises(ClusterError, match="belongs to another user"):
            refuse(path)


@pytest.fixture
def before_renaming(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], Any]], None]:
    """Do something in the last moment before a file is moved aside (``rename``), or gets its name (``link``)."""

    def prepare(name: str, act: Callable[[], Any]) -> None:
        real, left = getattr(os, name), [act]

        def watched(*arguments: Any, **options: Any) -> Any:
            if left:
                left.pop()()
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, watched)

    return prepare


@pytest.mark.parametrize("name", ["thesis.ipynb", "link", "fifo", "folder", "dangling", "in place"])
@pytest.mark.parametrize("action", ["remove", "write", "write anew"])
def test_what_takes_the_name_in_the_last_moment_stays(
    action: str, name: str, tmp_path: Path, before_renaming: Callable[[str, Callable[[], Any]], None]
) -> None:
    _places(tmp_path)
    path = tmp_path / "file.json"
    if action != "write":
        _write(path)
    before: dict[str, Any] = {}

    def take() -> None:
        if name == "in place":  # the same file, with other content
            path.write_text("years")
        else:
            path.unlink(missing_ok=True)
            os.replace(tmp_path / name, path)
        before.update(_state(tmp_path))

    before_renaming("link" if action == "write" else "rename", take)
    if action == "remove":
        connection_file.remove(path, "me")
    else:
        with pytest.raises(ClusterError, match="is not replaced"):
            _write(path)
    hidden = {entry for entry in before if entry.startswith(".")}
    assert _state(tmp_path) == {entry: what for entry, what in before.items() if entry not in hidden}


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "file.json"
    for owner in ("me", "another"):
        connection_file.write(path, "Engine", {}, owner)
        assert connection_file.read(path, "Engine")["owner"] == owner
        assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    path.write_text("years")
    with pytest.raises(ClusterError, match="is not a connection file"):
        _write(path)
    assert path.read_text() == "years"


def test_many_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.json"

    def again(number: int) -> None:
        for _ in range(20):
            connection_file.write(path, "Engine", {}, f"{number}")
            connection_file.remove(path, f"{number}")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(again, range(4)))
    assert [entry.name for entry in tmp_path.iterdir() if entry != path] == []


def test_what_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(ClusterError, match="no such connection file"):
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
    for text in ("", "[]", "{}", "\x00" * 100, "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ClusterError, match="is not a connection file"):
            connection_file.read(path, "Engine")
    with pytest.raises(ClusterError, match="is not a file"):
        connection_file.read(tmp_path, "Engine")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ClusterError, match="is not a file"):
        connection_file.read(tmp_path / "fifo", "Engine")


def _document(path: Path, engine: str, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": 1, "engine": engine, **content}))
    path.chmod(0o600)
    return path


_NO_KEYS = {"tls_ca_file": "x\ny", "tls_client_key": "x\ny", "tls_client_cert": "x\ny"}
_OLD = {"scheduler": "tcp://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("engine", "content", "why"),
    [
        (DaskCluster, {}, "scheduler is missing"),
        (DaskCluster, _OLD, "security is missing"),
        (DaskCluster, {**_OLD, "security": None}, "security is not an object"),
        (DaskCluster, {**_OLD, "security": {"tls_ca_file": ["x"]}}, "security.tls_ca_file is"),
        (DaskCluster, {**_OLD, "security": {}, "manager": "7"}, "manager is '7'"),
        (DaskCluster, {"scheduler": 7, "security": {}}, "scheduler is 7"),
        (DaskCluster, {"scheduler": "", "security": {}}, "cannot be used"),
        (DaskCluster, {"scheduler": "new://x", "security": {}}, "cannot be used"),
        (DaskCluster, {"scheduler": "127.0.0.1:1", "security": {"require_encryption": True}}, "encryption required"),
        (DaskCluster, {"scheduler": "tls://127.0.0.1:1", "security": {"option": "new"}}, "cannot be used"),
        (DaskCluster, {"scheduler": "tls://127.0.0.1:1", "security": {}}, "cannot be used"),
        (DaskCluster, {"scheduler": "tls://127.0.0.1:1", "security": _NO_KEYS}, "cannot be used"),
        (HyperoptCluster, {}, "mongo_trial_url is missing"),
        (HyperoptCluster, {"mongo_trial_url": None}, "mongo_trial_url is None"),
        (HyperoptCluster, {"mongo_trial_url": "mongo://u:secret"}, "not the address of a database"),
        (
            HyperoptCluster,
            {"mongo_trial_url": "mongo://u:secret@127.0.0.1:secret/a/b"},
            "not the address of a database",
        ),
    ],
)
def test_a_document_of_another_shape(
    tmp_path: Path, engine: type[DaskCluster | HyperoptCluster], content: dict[str, Any], why: str
) -> None:
    path = _document(tmp_path / "file.json", engine.__name__, content)
    with pytest.raises(ClusterError, match=why) as caught:
        engine.connect(path)
    assert str(path) in str(caught.value) and "another version of lazycluster" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("more", "process"), [({}, "the process, which"), ({"manager": 77}, "the process 77, which")])
def test_a_cluster_that_does_not_answer(tmp_path: Path, more: dict[str, Any], process: str) -> None:
    """Also one whose file is of a version that does not tell its process."""
    path = _document(tmp_path / "file.json", "DaskCluster", {**_OLD, "security": {}, **more})
    with pytest.raises(ClusterError, match="does not answer") as caught:
        DaskCluster.connect(path, timeout=0.2)
    assert process in str(caught.value)


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connection_file.write(tmp_path / "missing" / "file.json", "Engine", {}, "me")


@pytest.mark.parametrize("path", ["/", "..", "."])
def test_what_can_only_be_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match="is a directory"):
        connection_file.check(path)
    with pytest.raises(ClusterError, match="is a directory"):
        connection_file.write(path, "Engine", {}, "me")


@pytest.mark.parametrize("address", ["new://x", "tcp://127.0.0.1:1"])
def test_a_client_that_could_not_connect_is_closed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Else the garbage collector closes it, and waits for ever if it does so while another client starts its loop."""
    distributed = pytest.importorskip("distributed")
    made, start = [], distributed.Client.start

    def noted(client: Any, **options: Any) -> None:
        made.append(client)
        start(client, **options)

    monkeypatch.setattr(distributed.Client, "start", noted)
    path = _document(tmp_path / "file.json", "DaskCluster", {"scheduler": address, "security": {}})
    with pytest.raises(ClusterError):
        DaskCluster.connect(path, timeout=0.2)
    assert [client.status for client in made] == ["closed"]
    assert not made[0]._loop_runner.is_started()
