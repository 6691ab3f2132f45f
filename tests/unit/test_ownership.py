"""Directories that other users own, or may write to, are not used for what is run or read back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazycluster import LocalRuntime
from lazycluster.agent import directories, ownership
from lazycluster.engines.dask.programs import worker
from lazycluster.engines.hyperopt import database
from lazycluster.environments import uv
from lazycluster.exceptions import EnvironmentBuildError, InvalidRuntimeError
from lazycluster.utils import Environment, private_directory

_OTHER = 12345

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a directory of somebody else's")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user gets to, other than those of pytest."""
    made = Path(tempfile.mkdtemp(prefix="lazycluster-test-", dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def _made(path: Path, mode: int, owner: int = 0, group: int = 0) -> Path:
    path.mkdir(exist_ok=True, parents=True)
    os.chown(path, owner, group)
    path.chmod(mode)
    return path


# What somebody else could do something with, made below a directory; and what is refused of it.
_REFUSED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "another user's": (lambda top: _made(top / "a", 0o700, _OTHER), "a", "another user's"),
    "everybody writes": (lambda top: _made(top / "a", 0o777), "a", "everybody may write"),
    "everybody adds, as in /tmp": (lambda top: _made(top / "a", 0o1777), "a", "could put something into it"),
    "the group adds": (lambda top: _made(top / "a", 0o1770, 0, _OTHER), "a", "its group may write"),
    "the group writes": (lambda top: _made(top / "a", 0o775, 0, _OTHER), "a", "its group may write"),
    "another user's, the group writes": (lambda top: _made(top / "a", 0o775, _OTHER, _OTHER), "a", "another user's"),
    "on the way everybody writes": (
        lambda top: _made(_made(top / "a", 0o777) / "b", 0o700),
        "a",
        "everybody may write",
    ),
    "on the way the group writes": (
        lambda top: _made(_made(top / "a", 0o770, 0, 5) / "b", 0o700),
        "a",
        "its group may",
    ),
    "made before us": (lambda top: _made(_made(top / "a", 0o1777) / "b", 0o755, _OTHER), "a/b", "has made it"),
    "on the way made before us": (
        lambda top: _made(_made(_made(top / "a", 0o1777) / "b", 0o755, _OTHER) / "c", 0o700),
        "a/b",
        "has made it",
    ),
    "a link to it": (lambda top: _link(top / "a", _made(top / "b", 0o777)), "b", "everybody may write"),
    "a link where everybody writes": (
        lambda top: _link(_made(top / "a", 0o777) / "b", _made(top / "c", 0o700)),
        "a",
        "everybody may write",
    ),
    "a link of another user": (
        lambda top: _link(_made(top / "a", 0o1777) / "b", _made(top / "c", 0o700), _OTHER),
        "a/b",
        "has made it",
    ),
}

_USED: dict[str, Callable[[Path], Path]] = {
    "one's own": lambda top: _made(top / "a", 0o700),
    "shared for reading": lambda top: _made(top / "a", 0o755),
    "a group of one's own": lambda top: _made(top / "a", 0o775),
    "below such a one": lambda top: _made(_made(top / "a", 0o1777) / "b", 0o700),
    "below another user's": lambda top: _made(_made(top / "a", 0o755, _OTHER) / "b", 0o700),
    "where nobody else gets to": lambda top: _made(_made(top / "a", 0o700) / "b", 0o777),
    "a link": lambda top: _link(top / "a", _made(top / "b", 0o700)),
    "a link up": lambda top: _link(_made(top / "a", 0o755) / "l", Path("../b"), beside=_made(top / "b", 0o700)),
    "a link in and out of one": lambda top: _link(
        top / "l", Path("a/../c"), beside=(_made(top / "a", 0o777), _made(top / "c", 0o700))
    ),
    "one that is made": lambda top: top / "new" / "below",
}


def _link(path: Path, target: Path, owner: int = 0, beside: object = None) -> Path:
    path.symlink_to(target)
    os.chown(path, owner, owner, follow_symlinks=False)
    return path


@pytest.fixture(autouse=True)
def sent_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{worker.__package__}.ownership", ownership)


@contextlib.contextmanager
def _refused(top: Path, name: str, kind: type[Exception] = PermissionError) -> Iterator[Path]:
    make, what, why = _REFUSED[name]
    path = make(top)
    with pytest.raises(kind) as caught:
        yield path
    assert why in str(caught.value) and str(top / what) in str(caught.value)


@pytest.mark.parametrize("name", _REFUSED)
def test_what_others_could_replace_is_refused(place: Path, name: str) -> None:
    with _refused(place, name) as path:
        ownership.make(str(path), 0o700)


@pytest.mark.parametrize("name", _USED)
def test_what_is_one_s_own_is_used(place: Path, name: str) -> None:
    path = _USED[name](place)
    there = path.exists()
    assert ownership.make(str(path), 0o700) is not there
    assert path.is_dir()


def test_a_group_may_be_trusted(place: Path) -> None:
    groups = os.getgroups()
    for owner, group in ((0, _OTHER), (_OTHER, os.getegid())):
        path = _made(_made(place / str(owner), 0o775, owner, group) / "a", 0o2775, owner, group)
        with pytest.raises(PermissionError):
            ownership.check(str(path))
        ownership.check(str(path), trust_group=True)
    assert _OTHER not in groups
    for path in (
        _made(place / "b", 0o775, _OTHER, _OTHER),
        _made(place / "c", 0o755, _OTHER),
        _made(place / "d", 0o777),
    ):
        with pytest.raises(PermissionError):  # of a group that is not ours, for reading only, of everybody
            ownership.check(str(path), trust_group=True)


def test_the_owner_of_the_home_directory_is_trusted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """He may have another number, where it is mounted from another machine or into a container."""
    home = _made(place / "home", 0o755, _OTHER)
    path = _made(home / "state", 0o755, _OTHER)
    with pytest.raises(PermissionError):
        ownership.check(str(path))
    entry = ownership.pwd.getpwuid(0)
    changed = ownership.pwd.struct_passwd((*entry[:5], str(home), entry[6]))
    monkeypatch.setattr(ownership.pwd, "getpwuid", lambda _: changed)
    ownership.check(str(path))


@pytest.mark.parametrize("what", ["missing", "file/x", "loop", "dead"])
def test_what_is_no_directory(place: Path, what: str) -> None:
    (place / "file").touch()
    (place / "loop").symlink_to("loop")
    (place / "dead").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"No such file|Not a directory|Too many levels"):
        ownership.check(str(place / what))
    if what != "missing":
        with pytest.raises(OSError, match=r"File exists|Not a directory|Too many levels|No such file"):
            ownership.make(str(place / what), 0o700)


# --- whoever uses them -----------------------------------------------------------------------------
def _main_directory(path: Path) -> None:
    Environment.set_main_directory(path)
    private_directory("environments", "wheels")


def _database(path: Path) -> None:
    database.make_directory(path)


def _local_directory(path: Path) -> None:
    try:
        worker._scratch(str(path), False)
    except SystemExit as error:
        raise PermissionError(str(error)) from None


@pytest.mark.parametrize("use", [_main_directory, _database, _local_directory])
@pytest.mark.parametrize("name", ["everybody writes", "the group writes", "a link of another user"])
def test_directories_here(place: Path, use: Callable[[Path], None], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "main_directory", "")
    with _refused(place, name) as path:
        use(path)


@pytest.mark.parametrize("name", ["everybody writes", "another user's"])
def test_the_cache_of_uv(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uv")
    monkeypatch.setattr(uv, "_chosen", None)
    with _refused(place, name, EnvironmentBuildError) as path:
        monkeypatch.setenv("UV_CACHE_DIR", str(path))
        asyncio.run(uv.find_uv())
    monkeypatch.setenv("UV_CACHE_DIR", str(place / "new" / "cache"))
    asyncio.run(uv.find_uv())
    assert stat.S_IMODE((place / "new").stat().st_mode) == 0o700


def test_a_worker_writes_into_a_directory_of_its_own(place: Path) -> None:
    shared = _made(place / "scratch", 0o1777)
    path = worker._scratch(str(shared), False)
    assert os.path.dirname(path) == str(shared) and stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert "dask-scratch-space" in path  # else distributed would take another one in it
    os.chown(path, _OTHER, _OTHER)
    with pytest.raises(SystemExit, match="another user has made it"):
        worker._scratch(str(shared), False)


@pytest.mark.parametrize("name", _REFUSED)
def test_the_working_directory(place: Path, name: str) -> None:
    with _refused(place, name, InvalidRuntimeError) as path:
        LocalRuntime(working_dir=str(path))


def test_working_directories_that_are_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = _made(place / "group", 0o2775, 0, _OTHER)
    monkeypatch.setattr(Environment, "trust_group", True)
    with LocalRuntime(working_dir=str(shared)) as runtime:
        assert runtime.working_dir == str(shared)
    monkeypatch.setattr(Environment, "trust_group", False)
    with pytest.raises(InvalidRuntimeError, match="LAZYCLUSTER_TRUST_GROUP"):
        LocalRuntime(working_dir=str(shared))
    for name in ("below such a one", "one that is made"):
        with LocalRuntime(working_dir=str(_USED[name](place))) as runtime:
            assert runtime.working_dir.startswith(str(place))


@pytest.mark.parametrize("name", ["made before us", "everybody writes", "a link of another user"])
def test_the_state_of_detached_tasks(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with _refused(place, name, Exception) as path:
        monkeypatch.setenv("XDG_STATE_HOME", str(path))
        (path / "lazycluster" / "detached").mkdir(parents=True)
        with LocalRuntime() as runtime:
            runtime.detached_tasks()


@pytest.mark.parametrize("way", ["parent", "link", "owner"])
def test_temporary_directories(place: Path, way: str) -> None:
    """Those of the agent and of ssh's sockets."""
    if way == "owner":
        path = _made(_made(place / "a", 0o755, _OTHER) / "b", 0o700)
    else:
        path = _made(_made(place / "a", 0o777) / "b", 0o700)
        path = _link(place / "l", path) if way == "link" else path
    with pytest.raises(OSError, match="others could replace"):
        directories.is_safe(str(path))


def test_the_umask_lets_nobody_in(place: Path) -> None:
    """Whatever the user has set: what is made for one user is that user's."""
    program = (
        "import os, sys; os.umask(0)\n"
        "from lazycluster import LocalRuntime, RuntimeTask\n"
        "from lazycluster.utils import private_directory, new_log_file_path\n"
        "from lazycluster.engines.hyperopt import database\n"
        "from pathlib import Path\n"
        "new_log_file_path('host', 'task'); private_directory('environments', 'wheels')\n"
        "database.make_directory(Path(sys.argv[1], 'deep', 'db'))\n"
        "with LocalRuntime(working_dir=sys.argv[1] + '/work/below') as runtime:\n"
        "    task = RuntimeTask('t').run_command('umask; touch file'); runtime.execute_task(task)\n"
        "    runtime.execute_task(RuntimeTask('d').run_command('true'), detach=True).join()\n"
    )
    env = {**os.environ, "XDG_STATE_HOME": str(place / "state"), "HOME": str(place / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(place)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = [path for path in place.rglob("*") if path != place / "work" / "below" / "file"]
    assert {"wheels", "logs", "detached", "db", "below"} <= {path.name for path in made}
    for path in made:
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o022, path
        if "work" not in path.parts:
            assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
