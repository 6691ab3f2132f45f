"""Private directories are made where nobody else can replace them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lazycluster.agent import bootstrap
from lazycluster.ssh import workspace


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o757])
def test_a_place_that_others_may_write_to_is_not_used(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to a directory without a sticky bit may rename ours, and put his own in its place."""
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(OSError, match="others could replace"):
        bootstrap.is_safe(str(place))
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
        assert bootstrap.is_safe(str(tmp_path))


def test_a_place_of_another_user_is_not_used(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory of somebody else's")
    os.chown(tmp_path, 65534, 65534)
    tmp_path.chmod(0o700)
    with pytest.raises(OSError, match="others could replace"):
        bootstrap.is_safe(str(tmp_path))


def test_what_is_made_is_private_and_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    made = [bootstrap.private_directory(), bootstrap.private_directory(), workspace.private_directory()]
    try:
        assert len(set(made)) == 3
        for path in made:
            assert stat.S_IMODE(os.lstat(path).st_mode) == 0o700
    finally:
        for path in made:
            os.rmdir(path)
