"""Records of the detached tasks that were started here, among files that are none, and others who write them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazycluster.tasks import detached_records

ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the records; not made yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return detached_records.directory()


def test_a_record_is_found_again_until_it_is_forgotten(folder: Path) -> None:
    assert detached_records.find(ID) is None
    detached_records.forget(ID)
    kept = detached_records.keep(ID, "me@host:22", [False, True, False, True])
    assert kept == detached_records.find(ID)
    assert (kept.host, kept.steps, kept.functions) == ("me@host:22", 4, {1, 3})
    assert [(path.name, path.stat().st_mode & 0o777) for path in folder.iterdir()] == [(f"{ID}.json", 0o600)]
    assert folder.stat().st_mode & 0o777 == 0o700
    detached_records.forget(ID)
    assert detached_records.find(ID) is None
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../x", ID.upper(), ID + "0", f"{ID}\n", "/etc/passwd", "\0", "\udc80"])
def test_a_name_that_is_none_of_ours_has_no_record(name: str) -> None:
    assert detached_records.find(name) is None
    detached_records.forget(name)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"null", b"7", b"[]", b"{}", b'{"host": 1, "steps": 1, "functions": []}',
        b'{"host": "h", "steps": "1", "functions": []}', b'{"host": "h", "steps": 1, "functions": 7}',
        b'{"host": "h", "steps": 1, "functions": ["0"]}', b"[" * 100_000, b"1" * 5000, bytes(2_000_000),
    ],
)  # fmt: skip
def test_a_damaged_record_is_an_error_and_no_knowledge(folder: Path, content: bytes) -> None:
    detached_records.keep(ID, "host", [True])
    (folder / f"{ID}.json").write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged"):
        detached_records.find(ID)
    detached_records.keep(ID, "host", [True])
    assert detached_records.find(ID) is not None


def _link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "change", [_link, _pipe, _folder, lambda path: path.chmod(0o620), lambda path: path.parent.chmod(0o770)]
)
def test_what_others_could_have_written_is_no_record(folder: Path, change: Callable[[Path], object]) -> None:
    detached_records.keep(ID, "host", [True])
    change(folder / f"{ID}.json")
    with pytest.raises((OSError, ValueError)):
        detached_records.find(ID)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's file")
def test_a_file_of_another_user_is_no_record(folder: Path) -> None:
    detached_records.keep(ID, "host", [True])
    os.chown(folder / f"{ID}.json", 12345, -1)
    with pytest.raises(ValueError, match="you alone"):
        detached_records.find(ID)


def test_their_number_is_limited_and_the_oldest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached_records, "_KEPT", 3)
    ids = [f"{number:016x}" for number in range(6)]
    for number, one in enumerate(ids):
        detached_records.keep(one, "host", [True])
        os.utime(folder / f"{one}.json", (number, number))
    assert sorted(path.stem for path in folder.iterdir()) == ids[-3:]


def test_what_a_killed_process_has_left_goes_and_what_is_being_written_stays(folder: Path) -> None:
    detached_records.keep(ID, "host", [True])
    for name, age in (("a.new", 7200), ("b.new", 60)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    detached_records.keep(ID, "host", [True])
    assert {path.name for path in folder.iterdir()} == {f"{ID}.json", "b.new"}


def test_several_write_and_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached_records, "_KEPT", 5)

    def work(number: int) -> None:
        for turn in range(30):
            one = f"{number * 1000 + turn:016x}"
            detached_records.keep(one, "host", [False, True])
            detached_records.keep(ID, f"host{number}", [True] * number)
            found = detached_records.find(ID)
            assert found is None or found.host == f"host{found.steps}"
            detached_records.forget(one)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(1, 5)))
    assert {path.suffix for path in folder.iterdir()} <= {".json"}


def test_a_task_of_very_many_steps_is_not_recorded() -> None:
    with pytest.raises(OSError, match="too long"):
        detached_records.keep(ID, "host", [True] * 300_000)
    assert detached_records.find(ID) is None


def test_a_record_holds_numbers_only(folder: Path) -> None:
    detached_records.keep(ID, "host", [True, False])
    assert json.loads((folder / f"{ID}.json").read_text()) == {"host": "host", "steps": 2, "functions": [0]}
