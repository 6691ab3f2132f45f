"""Private directories are made where nobody else can replace them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from lazycluster import utils
from lazycluster.agent import directories
from lazycluster.ssh import workspace
from lazycluster.utils import Environment, new_log_file_path


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o757])
def test_a_place_that_others_may_write_to_is_not_used(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to a directory without a sticky bit may rename ours, and put his own in its place."""
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(OSError, match="others could replace"):
        directories.is_safe(str(place))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    made = workspace.private_directory()
    try:
        assert not made.startswith(str(place))
        assert list(place.iterdir()) == []
    finally:
        os.rmdir(made)


def test_places_that_are_used(tmp_path: Path) -> None:
    for mode in (0o700, 0o755, 0o1777):
        tmp_path.chmod(mode)
        assert directories.is_safe(str(tmp_path))


def test_a_place_of_another_user_is_not_used(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of somebody else's")
    os.chown(tmp_path, 65534, 65534)
    tmp_path.chmod(0o700)
    with pytest.raises(OSError, match="others could replace"):
        directories.is_safe(str(tmp_path))


def test_what_is_made_is_private_and_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    agents = (
        directories.private_directory(directories.parent_directories(), 60, directories.note_host) for _ in range(2)
    )
    made = [*agents, workspace.private_directory()]
    try:
        assert len(set(made)) == 3
        for path in made:
            assert stat.S_IMODE(os.lstat(path).st_mode) == 0o700
    finally:
        for path in made:
            shutil.rmtree(path)


def test_a_link_leads_to_the_place_itself(tmp_path: Path) -> None:
    """Whoever may change the link later changes nothing for what was made."""
    (tmp_path / "place").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("place")
    made = directories.private_directory([str(tmp_path / "link")], 1000, directories.note_host)
    assert Path(made).parent == tmp_path.resolve() / "place"


@pytest.mark.parametrize("umask", [0o777, 0o177])
def test_an_umask_takes_nothing_from_the_user_himself(umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    before = os.umask(umask)
    try:
        made = workspace.private_directory()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(made).st_mode) == 0o700
    os.rmdir(made)


def test_a_sticky_place_of_another_user_is_not_used(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of somebody else's")
    tmp_path.chmod(0o1777)
    for owner in (12345, 65534):
        os.chown(tmp_path, owner, owner)
        if owner == 65534:  # the owner of /tmp in containers that do not know the system's users
            assert directories.is_safe(str(tmp_path))
        else:
            with pytest.raises(OSError, match="others could replace"):
                directories.is_safe(str(tmp_path))


@pytest.mark.parametrize("first", ["state", "state/logs", "state/logs/host"])
def test_what_another_user_made_where_all_may_write_is_not_used_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of somebody else's")
    shared = tmp_path / "shared"
    monkeypatch.setattr(Environment, "main_directory", str(shared / "state"))
    (shared / first).mkdir(parents=True)
    for directory in (shared / first, *(shared / first).parents):
        if directory == tmp_path:
            break
        directory.chmod(0o1777)
    assert new_log_file_path("host", "task").parent == shared / "state" / "logs" / "host"
    monkeypatch.setattr(utils, "_known", set())
    os.chown(shared / first, 12345, 12345)
    with pytest.raises(PermissionError, match="another user has made it") as caught:
        new_log_file_path("host", "task")
    assert caught.value.filename == str(shared / first)


def test_a_home_directory_whose_owner_has_another_number_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of somebody else's")
    os.chown(tmp_path, 12345, 12345)  # as one that is mounted into a container
    tmp_path.chmod(0o755)
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "state"))
    assert new_log_file_path("host", "task").parent.is_dir()
