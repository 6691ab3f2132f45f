"""Environments that are kept on a host, and what is written there: without a host."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.agent import environment_cache, environments
from lazycluster.agent.environment_program import MANIFEST
from lazycluster.environments.build import Builder

_ID = "py313-" + "0" * 20


def test_what_another_build_is_about_to_use_is_not_pruned(tmp_path: Path) -> None:
    wheel, unpacked = tmp_path / "wheels" / ("a" * 64) / "x.whl", tmp_path / "cache" / "archive-v0" / "abc" / "file"
    for path in (wheel, unpacked):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(100_000))
    (tmp_path / "envs").mkdir()
    building = environments.lock(str(tmp_path / "envs" / f"{_ID}.build"), fcntl.LOCK_EX)
    assert building is not None
    environments.claim(str(tmp_path))
    environment_cache.prune_environments(str(tmp_path), 1000, None)
    assert wheel.exists()
    assert unpacked.exists()
    os.close(building)
    environment_cache.prune_environments(str(tmp_path), 1000, None)
    assert not wheel.exists()
    assert not unpacked.exists()


def test_a_list_of_packages_may_be_longer_than_an_argument(tmp_path: Path) -> None:
    class Here:
        host = "here"

        async def run(self, argv: Sequence[str], env: Mapping[str, str], what: str) -> str:
            return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    text = "".join(f"line {number}: 'quoted' \"twice\" %s \\n ü\n" for number in range(20_000))
    here: Any = Here()
    nothing: Any = None
    maker = Builder(here, nothing, nothing, nothing)
    for _ in range(2):  # a file that is there is written anew
        asyncio.run(maker._write(text, str(tmp_path / "file")))
        assert (tmp_path / "file").read_text() == text


# --- what is ours, and what is not -----------------------------------------------------------------
def _made(root: Path, name: str, **manifest: Any) -> Path:
    """An environment as earlier versions have made them: with a lock, a manifest, and no word of its own name."""
    prefix = root / "envs" / name
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").write_bytes(bytes(50_000))
    (prefix / MANIFEST).write_text(json.dumps({"listing": [], "made": 1, "size": 50_000, "packages": {}, **manifest}))
    for suffix in (".build", ".use"):
        Path(f"{prefix}{suffix}").touch()
    return prefix


def _foreign(root: Path) -> list[Path]:
    """What others keep in a directory, under names that are near to ours."""
    conda = _made(root, "work")
    copied = _made(root, "py313-" + "c" * 20, id=_ID)
    (root / "envs" / ".git").mkdir(parents=True)
    (root / "envs" / ".work-abcdefgh").mkdir()
    (root / "envs" / ("py313-" + "b" * 20)).mkdir()
    for path in (".git/config", ".work-abcdefgh/data", f"py313-{'b' * 20}/data"):
        (root / "envs" / path).write_bytes(bytes(50_000))
    elsewhere = _made(root / "elsewhere", "py313-" + "d" * 20)
    (root / "envs" / elsewhere.name).symlink_to(elsewhere)
    packages = [root / "wheels" / name for name in ("mine/x.whl", f"{'a' * 24}/notes", f"{'a' * 24}/x.whl")]
    for path in packages:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(50_000))
    (root / "wheels" / ("e" * 24)).symlink_to(root / "wheels" / "mine")
    others = (".git/config", ".work-abcdefgh/data", f"py313-{'b' * 20}/data", elsewhere.name)
    pythons = [prefix / "bin" / "python" for prefix in (conda, copied, elsewhere)]
    return [*pythons, *packages, *(root / "envs" / path for path in others)]


def test_only_what_carries_our_manifest_is_listed_and_removed(tmp_path: Path) -> None:
    root = str(tmp_path)
    environments.claim(root, make=True)
    ours = _made(tmp_path, _ID)
    left = tmp_path / "envs" / f".{_ID}-abcd_f12"
    left.mkdir()
    sent = tmp_path / "wheels" / ("f" * 24) / "x.whl"
    sent.parent.mkdir(parents=True)
    sent.write_bytes(bytes(50_000))
    foreign = _foreign(tmp_path)
    locks = sorted(path.name for path in (tmp_path / "envs").glob("*.use"))
    told = environment_cache.list_environments(root)
    assert [one["id"] for one in told["environments"]] == [_ID]
    assert 100_000 <= told["size"] < 150_000
    names = ["work", "py313-" + "c" * 20, "py313-" + "b" * 20, "..", ".", "", "../wheels", ".git", "py313-" + "d" * 20]
    assert environment_cache.remove_environments(root, names) == {"removed": [], "in_use": [], "unknown": names}
    assert environment_cache.remove_damaged(root, ["mine", "", "..", ".", "a" * 24, "e" * 24]) == []
    told = environment_cache.prune_environments(root, 0, 0)
    assert told["removed"] == [_ID]
    assert told["after"] == 0
    for gone in (ours, left, sent):
        assert not gone.exists(), gone
    for path in foreign:
        assert path.exists(), path
    assert sorted(path.name for path in (tmp_path / "envs").glob("*.use")) == locks


def test_one_that_lost_its_manifest_while_it_was_being_locked_stays(tmp_path: Path) -> None:
    prefix = _made(tmp_path, _ID)
    (prefix / MANIFEST).unlink()
    environment_cache.remove(str(tmp_path), _ID)
    assert (prefix / "bin" / "python").exists()


@pytest.mark.parametrize("marker", ["none", "link", "fifo", "folder"])
def test_a_root_that_is_not_ours_is_refused(marker: str, tmp_path: Path) -> None:
    for path in ("envs/work/bin/python", "wheels/mine/x.whl", "cache/archive-v0/abc/file", "envs/.git/config"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    if marker == "link":
        (tmp_path / environments.MARKER).symlink_to("envs/work/bin/python")
    elif marker == "fifo":
        os.mkfifo(tmp_path / environments.MARKER)
    elif marker == "folder":
        (tmp_path / environments.MARKER).mkdir()
    before = sorted(tmp_path.rglob("*"))
    for make in (False, True):
        with pytest.raises(environments.NotOursError, match=f"is not empty.*touch {tmp_path}"):
            environments.claim(str(tmp_path), make)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_new_or_empty_root_is_marked(tmp_path: Path) -> None:
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    environments.claim(str(tmp_path / "empty"))
    environments.claim(str(tmp_path / "new"))
    assert not (tmp_path / "empty" / environments.MARKER).exists()  # nothing was to be made there
    assert not (tmp_path / "new").exists()
    for name in ("disk", "empty", "new/below"):
        environments.claim(str(tmp_path / name), make=True)
        assert environments.is_exclusive(str(tmp_path / name))
        (tmp_path / name / "file").touch()
        environments.claim(str(tmp_path / name), make=True)


@pytest.mark.parametrize("evidence", ["environment", "lock"])
@pytest.mark.parametrize("others", [False, True])
def test_a_root_of_an_earlier_version_is_recognised(evidence: str, others: bool, tmp_path: Path) -> None:
    prefix = _made(tmp_path, _ID)
    if evidence == "lock":
        (prefix / MANIFEST).unlink()
    unpacked = tmp_path / "cache" / "archive-v0" / "abc" / "file"
    unpacked.parent.mkdir(parents=True)
    unpacked.write_bytes(bytes(50_000))
    if others:
        (tmp_path / "thesis").touch()
    environments.claim(str(tmp_path))
    assert (tmp_path / environments.MARKER).is_file()
    environment_cache.prune_environments(str(tmp_path), 0, None)
    assert unpacked.exists() is others  # with others' files beside, it may be a cache of theirs
    assert prefix.exists() is (evidence == "lock")


def test_a_root_that_was_marked_by_hand_is_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()
    (tmp_path / environments.MARKER).touch()
    environments.claim(str(tmp_path), make=True)
    assert not environments.is_exclusive(str(tmp_path))


def test_a_manifest_is_a_file(tmp_path: Path) -> None:
    prefix = _made(tmp_path, _ID)
    text = (prefix / MANIFEST).read_text()
    assert environments.is_ours(str(prefix))
    (prefix / MANIFEST).rename(tmp_path / "moved")
    (prefix / MANIFEST).symlink_to(tmp_path / "moved")
    assert not environments.is_ours(str(prefix))
    (prefix / MANIFEST).unlink()
    os.mkfifo(prefix / MANIFEST)  # nobody waits for it
    assert not environments.is_ours(str(prefix))
    (prefix / MANIFEST).unlink()
    for wrong in ("", "[]", "{}", "null", "\0", text.replace("{", '{"id": "work", ')):
        (prefix / MANIFEST).write_text(wrong)
        assert not environments.is_ours(str(prefix)), wrong


@pytest.mark.parametrize("path", ["", " ", "a\0b", None])
def test_a_variable_that_is_not_set_does_not_name_the_default_directory(path: Any) -> None:
    with RuntimeGroup([LocalRuntime()]) as group:
        for act in (group.list_environments, group.prune_environments):
            with pytest.raises(ValueError, match="cache_dir must be a directory"):
                act(cache_dir=path)
        with pytest.raises(ValueError, match="cache_dir must be a directory"):
            group.remove_environments([_ID], cache_dir=path)
