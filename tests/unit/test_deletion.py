"""What is never removed, and removals that stay where they were asked for: all of it below temporary directories."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazycluster.agent import deletion
from lazycluster.agent.deletion import RefusedError
from lazycluster.agent.paths import meant


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory of these tests, with something in it."""
    path = tmp_path / "homes" / "lazy"
    (path / "work" / "deep").mkdir(parents=True)
    (path / "thesis").write_text("years")
    monkeypatch.setenv("HOME", str(path))
    return path


def _refusal(path: str) -> str:
    """Why a directory would not be removed. Nothing is removed here, also if the answer is wrong."""
    inode = os.stat(path)
    return deletion.protected().get((inode.st_dev, inode.st_ino), "")


def test_the_root_and_what_the_system_needs_are_refused_however_they_are_written(home: Path) -> None:
    (home / "link").symlink_to("/")
    for path in ("/", "//", "/.", "/..", "///./", "../../../../../../../..", "link/sys/..", "$NOTHING/"):
        found = meant(path, str(home), {"NOTHING": ""})
        assert "it is the root" in _refusal(found), path
    for path in ("/usr", "/etc/.", "//home", "/home/", "/bin/..", "link/usr", "link//home/../var", "/tmp"):
        assert _refusal(meant(path, str(home), {})), path


def _is_home(home: Path, path: str, cwd: str = "") -> None:
    assert "home directory" in _refusal(meant(path, cwd, {"HOME": str(home)})), path


def test_the_home_and_all_above_it_are_refused_however_they_are_written(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.symlink_to("/")
    (tmp_path / "other name").symlink_to(home.parent)
    for path in ("~", "~/", "~/.", "~/work/..", f"/{home}", f"{home}//", f"{home}/./", f"{root}{home}", "$HOME"):
        _is_home(home, path)
    for path in ("..", "../", f"{home}/..", f"/{home.parent}", f"{root}/{home.parent}", f"{tmp_path}", "~/../../"):
        _is_home(home, path, cwd=str(home))
    _is_home(home, f"{tmp_path}/other name/lazy")
    _is_home(home, ".", cwd=str(home))
    _is_home(home, "", cwd="~")
    assert not _refusal(str(home / "work"))


def test_a_home_behind_a_link_is_the_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h").symlink_to(home.parent)
    monkeypatch.setenv("HOME", str(tmp_path / "h" / "lazy"))
    for path in (home, home.parent, tmp_path / "h" / "lazy"):
        assert "home directory" in _refusal(str(path)), path


def test_the_home_that_the_system_names_is_one_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pwd.getpwuid(os.geteuid()).pw_dir
    for changed in (str(home), "/nonexistent", "", "relative"):
        monkeypatch.setenv("HOME", changed)
        assert "home directory" in _refusal(real), changed
    monkeypatch.delenv("HOME")
    assert "home directory" in _refusal(real)


def test_what_must_stay_is_named_by_who_asks(home: Path) -> None:
    kept = {"the working directory": str(home / "work" / "deep")}
    for path in ("work", "work/deep"):
        with pytest.raises(RefusedError, match="the working directory"):
            deletion.remove(str(home / path), kept)
    assert (home / "work" / "deep").is_dir()


def test_dots_after_a_link_lead_where_they_lead_the_system(home: Path, tmp_path: Path) -> None:
    (tmp_path / "far" / "below").mkdir(parents=True)
    (home / "link").symlink_to(tmp_path / "far" / "below")
    assert meant("link/../x", str(home), {}) == str(tmp_path / "far" / "x")
    assert meant("none/../x", str(home), {}) == str(home / "x")
    assert meant("work/../x/./", str(home), {}) == str(home / "x")


def test_all_of_a_directory_goes_and_nothing_else(home: Path) -> None:
    work = home / "work"
    (work / "to home").symlink_to(home)
    (work / "to thesis").symlink_to(home / "thesis")
    (work / "dangling").symlink_to("nowhere")
    os.mkfifo(work / "fifo")
    os.link(home / "thesis", work / "the same")
    (Path(os.fsdecode(os.fsencode(work) + b"/\xff"))).write_text("x")
    (work / "deep" / "read only").mkdir(mode=0o500)
    assert deletion.remove(str(work)) is None
    assert sorted(os.listdir(home)) == ["thesis"]
    assert (home / "thesis").read_text() == "years"


def test_a_link_goes_and_what_it_leads_to_stays(home: Path) -> None:
    (home / "link").symlink_to("work")
    assert deletion.remove(str(home / "link"), folder=True) is None
    assert (home / "work" / "deep").is_dir()
    for wrong in ("thesis", "dangling"):
        if wrong == "dangling":
            (home / wrong).symlink_to("nowhere")
        with pytest.raises(RefusedError, match="not a directory"):
            deletion.remove(str(home / wrong), folder=True)
        assert os.path.lexists(home / wrong)
    with pytest.raises(FileNotFoundError):
        deletion.remove(str(home / "none"))


def test_no_depth_is_too_much(home: Path) -> None:
    folder = os.open(home / "work", os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("a" * 8, dir_fd=folder)
        below = os.open("a" * 8, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    before = len(os.listdir("/proc/self/fd"))
    assert deletion.remove(str(home / "work")) is None
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (home / "work").exists()


@pytest.fixture
def before_entering(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], Any]], None]:
    """Do something in the moment before a directory of some name is opened."""

    def prepare(name: str, act: Callable[[], Any]) -> None:
        real = os.open
        left = [act]

        def watched(path: Any, *arguments: Any, **options: Any) -> int:
            if path == name and options.get("dir_fd") is not None and left:
                left.pop()()
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", watched)

    return prepare


@pytest.mark.parametrize("name", ["work", "deep"])
def test_a_directory_that_a_link_takes_the_place_of(
    name: str, home: Path, tmp_path: Path, before_entering: Callable[[str, Callable[[], Any]], None]
) -> None:
    victim = home / "work" if name == "work" else home / "work" / "deep"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("years")

    def swap() -> None:
        victim.rename(tmp_path / "aside")
        victim.symlink_to(precious)

    before_entering(name, swap)
    try:
        error = deletion.remove(str(home / "work"))
    except OSError as raised:
        error = raised
    assert error is not None
    assert (precious / "data").read_text() == "years"


def test_a_directory_that_the_home_takes_the_place_of(
    home: Path, tmp_path: Path, before_entering: Callable[[str, Callable[[], Any]], None]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    before_entering("other", lambda: (other.rmdir(), home.rename(other), home.symlink_to(other)))
    with pytest.raises(RefusedError, match="home directory"):
        deletion.remove(str(other), {"the home directory": str(home)})
    assert (other / "thesis").read_text() == "years"


def test_a_directory_that_is_moved_away_meanwhile(
    home: Path, tmp_path: Path, before_entering: Callable[[str, Callable[[], Any]], None]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir()
    (home / "work" / "deep" / "inner").mkdir()

    def move() -> None:  # what is above the directory that is being emptied becomes another one
        (home / "work" / "deep").rename(tmp_path / "elsewhere" / "moved")

    before_entering("inner", move)
    with pytest.raises(OSError, match="moved"):
        deletion.remove(str(home / "work"))
    assert (tmp_path / "elsewhere" / "deep").is_dir()


def test_what_somebody_else_removes_meanwhile_is_no_error(
    home: Path, before_entering: Callable[[str, Callable[[], Any]], None]
) -> None:
    before_entering("deep", lambda: (home / "work" / "deep").rmdir())
    assert deletion.remove(str(home / "work")) is None
    assert not (home / "work").exists()
