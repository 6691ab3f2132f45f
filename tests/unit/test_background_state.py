"""Names and records of what goes on in the background: who has a name, who is alive, what others could have written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lazycluster.background import state
from lazycluster.background.state import NamedRecord, all_named, claim, find
from lazycluster.cli import app
from lazycluster.exceptions import LazyclusterError

_CLAIM = """
import sys
from lazycluster.background.state import NamedRecord, claim
sys.stdin.readline()
try:
    taken = claim(NamedRecord.new("cluster", "night"))
    taken.write(state="running")
    print("taken", flush=True)
    sys.stdin.readline()
except Exception as error:
    print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory; not made yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return state.directory()


def other() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_name_is_held_by_a_lock_and_given_back(folder: Path) -> None:
    assert find("night") is None
    assert all_named() == []
    taken = claim(NamedRecord.new("cluster", "night", engine="dask"))
    found = find("night")
    assert found is not None and found.is_held and found.gone == ""
    assert found.record is not None and found.record.details == {"engine": "dask"}
    assert {path.stat().st_mode & 0o777 for path in (folder, folder / "night")} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in (folder / "night").iterdir()} == {0o600}
    with pytest.raises(LazyclusterError, match="there is a cluster 'night' already, which is starting"):
        claim(NamedRecord.new("cluster", "night"))
    taken.remove()
    assert list(folder.iterdir()) == []
    claim(NamedRecord.new("cluster", "night")).remove()


def test_of_two_that_start_at_the_same_moment_one_is_refused() -> None:
    processes = [other() for _ in range(4)]
    try:
        answers = [said(process) for process in processes]
        assert sorted(answer == "taken" for answer in answers) == [False, False, False, True]
        assert all("there is a cluster 'night' already" in answer for answer in answers if answer != "taken")
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_killed_one_is_not_alive_and_its_name_is_free() -> None:
    process = other()
    assert said(process) == "taken"
    process.kill()
    process.communicate()
    found = find("night")
    assert found is not None and not found.is_held
    assert found.gone == "its process was killed"
    claim(NamedRecord.new("cluster", "night")).remove()


def test_after_a_restart_of_the_machine_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = claim(NamedRecord.new("cluster", "night"))
    taken.write(state="running", boot="another")
    taken.close()
    found = find("night")
    assert found is not None and found.gone == "the machine was restarted"


def test_a_copy_of_a_machine_is_another_machine_though_it_has_the_same_number() -> None:
    taken = claim(NamedRecord.new("cluster", "night"))
    taken.write(state="running", boot="another", host="login2")
    taken.close()
    found = find("night")
    assert found is not None and found.is_elsewhere and not found.gone
    with pytest.raises(LazyclusterError, match="login2"):
        claim(NamedRecord.new("cluster", "night"))


def test_one_of_another_machine_is_neither_called_dead_nor_replaced() -> None:
    taken = claim(NamedRecord.new("cluster", "night"))
    taken.write(machine="another", host="login2")
    taken.close()
    found = find("night")
    assert found is not None and found.is_elsewhere and found.gone == ""
    with pytest.raises(LazyclusterError, match="was started on login2"):
        claim(NamedRecord.new("cluster", "night"))
    assert found.remove()


def test_one_that_has_ended_on_another_machine_is_gone_and_leaves_its_name() -> None:
    taken = claim(NamedRecord.new("cluster", "night"))
    taken.write(machine="another", host="login2", state="ended", reason="lazycluster down")
    taken.close()
    found = find("night")
    assert found is not None and found.is_elsewhere and found.gone == "lazycluster down"
    again = claim(NamedRecord.new("cluster", "night"))
    assert again.record.machine != "another"
    again.remove()


def test_detached_work_and_clusters_share_their_names() -> None:
    claim(NamedRecord.new("work", "sweep")).close()
    with pytest.raises(LazyclusterError, match="there is detached work 'sweep' already"):
        claim(NamedRecord.new("cluster", "sweep"))


def test_an_heir_has_the_name_as_long_as_it_lives() -> None:
    taken = claim(NamedRecord.new("cluster", "night"))
    process = subprocess.Popen(["sleep", "600"], pass_fds=[taken.fd])
    taken.close()
    try:
        found = find("night")
        assert found is not None and found.is_held
        assert not found.remove()
    finally:
        process.kill()
        process.wait()
    assert found.remove()
    assert find("night") is None


@pytest.mark.parametrize("name", ["", "1", "-a", ".a", "a/b", "a b", "a\n", "ä", "x" * 64, "a\0"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        find(name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"kind": "cluster"}', b"[" * 100_000, b"\xff"])
def test_a_damaged_record_hides_no_other(content: bytes, folder: Path) -> None:
    claim(NamedRecord.new("cluster", "night")).close()
    claim(NamedRecord.new("cluster", "noon")).close()
    (folder / "night" / "record.json").write_bytes(content)
    first, second = all_named()
    assert first.record is None and "damaged" in first.gone
    assert second.record is not None
    claim(NamedRecord.new("cluster", "night")).remove()


def _set(**values: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        record = path / "record.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), **values}))

    return change


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


@pytest.mark.parametrize(
    ("damage", "file", "step"),
    [
        (_instead("lock", lambda path: path.symlink_to("nowhere")), "lock", "rm -r {}"),
        (_instead("lock", os.mkfifo), "lock", "rm -r {}"),
        (_instead("lock", Path.mkdir), "lock", "rm -r {}"),
        (_instead("record.json", os.mkfifo), "record.json", "rm -r {}"),
        (_set(started="noon"), "record.json", "lazycluster down noon"),
        (_set(started=1e300), "record.json", "lazycluster down noon"),
        (_set(until=float("inf")), "record.json", "lazycluster down noon"),
        (_set(pid="1"), "record.json", "lazycluster down noon"),
        (_set(name="night"), "record.json", "lazycluster down noon"),
        (_set(details=[]), "record.json", "lazycluster down noon"),
        (lambda path: path.chmod(0o755), "", "rm -r {}"),
    ],
)
def test_what_is_damaged_is_one_row_and_a_next_step(
    damage: Callable[[Path], object], file: str, step: str, folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("night", "noon", "spring"):
        claim(NamedRecord.new("cluster", name)).close()
    damage(folder / "noon")
    monkeypatch.setattr(sys, "argv", ["lazycluster", "ls"])
    assert app._run() == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "night", "noon", "spring"]
    assert out.splitlines()[2].split() == ["noon", "damaged"]
    problem, next_step = err.splitlines()
    assert problem.startswith(f"noon: {folder / 'noon' / file} is ")
    assert next_step.startswith("  Next step: ") and step.format(folder / "noon") in next_step
    for command in ("logs", "info", "wait", "rm"):
        monkeypatch.setattr(sys, "argv", ["lazycluster", command, "noon"])
        assert app._run() == 1
        assert next_step in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["lazycluster", "down", "noon"])
    assert app._run() == (0 if "down" in step or file == "record.json" else 1)


_ON_A_FULL_DISK = """
from lazycluster.background.state import *
old = claim(NamedRecord.new("cluster", "old"))
(old.path / "log").write_text("what it said")
old.close()
with open(old.path.parent.parent / "fill", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(1024))
    except OSError:
        pass
for kind, name in (("cluster", "old"), ("cluster", "new"), ("work", "work")):
    try:
        claim(NamedRecord.new(kind, name))
    except OSError as error:
        print(error)
print(*(named.name for named in all_named()), *(path.name for path in old.path.parent.iterdir()))
print((old.path / "log").read_text())
"""


def test_on_a_full_disk_nothing_begins_and_nothing_is_lost(tmp_path: Path, folder: Path) -> None:
    script = 'mount -t tmpfs -o size=64k,mode=700 none "$1" || exit 77; exec "$0" -c "$2"'
    argv = ["unshare", "-m", "sh", "-c", script, sys.executable, str(tmp_path), _ON_A_FULL_DISK]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip("needs the right to mount")
    *errors, names, log = done.stdout.splitlines()
    assert errors[::2] == [
        f"{folder / name} cannot be written: No space left on device" for name in ("old", "new", "work")
    ]
    assert all(step.startswith("  Next step: make room there") for step in errors[1::2])
    assert (names, log) == ("old old", "what it said")


def test_what_was_killed_before_it_was_written_down_is_nothing(folder: Path) -> None:
    claim(NamedRecord.new("work", "sweep")).close()
    (folder / "sweep" / "record.json").unlink()
    assert find("sweep") is None
    assert all_named() == []
    claim(NamedRecord.new("cluster", "sweep")).remove()


def test_records_of_other_versions_are_read(folder: Path) -> None:
    claim(NamedRecord.new("cluster", "night")).close()
    path = folder / "night" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    found = find("night")
    assert found is not None and found.record is not None and found.record.name == "night"


def test_a_directory_that_others_could_write_to_is_not_trusted(folder: Path) -> None:
    claim(NamedRecord.new("cluster", "night")).close()
    (folder / "night").chmod(0o777)
    with pytest.raises(PermissionError, match="not trusted"):
        find("night")


def test_clusters_that_ended_long_ago_are_forgotten_work_is_not(folder: Path) -> None:
    for record in (
        NamedRecord.new("cluster", "old"),
        NamedRecord.new("work", "task"),
        NamedRecord.new("cluster", "new"),
    ):
        claim(record).close()
    for name in ("old", "task"):
        os.utime(folder / name / "record.json", (0, 0))
    claim(NamedRecord.new("cluster", "another")).remove()
    assert [found.name for found in all_named()] == ["new", "task"]
