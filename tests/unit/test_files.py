"""Copies against a real process of the agent's code on a stream, without ssh."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import pickle
import random
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

import lazycluster.agent
from filetrees import make_large, make_tree, state
from lazycluster.agent import directory_tree, holes
from lazycluster.agent import stream as frames
from lazycluster.agent.files import destination
from lazycluster.agent.path_expansion import absolute, expand
from lazycluster.agent.receiver import Receiver
from lazycluster.agent.sender import COMPARE, RESUME, WANTED, Sender, digest
from lazycluster.exceptions import ConnectionLostError, LazyclusterError
from lazycluster.ssh.transfer import TransferError, TransferResult, get, send

AGENT = Path(lazycluster.agent.__file__).parent
SERVE = "import sys; sys.path.insert(0, sys.argv[1]); from agent.files import serve; serve(0, 1)"


def old_python() -> str | None:
    found = sorted(Path.home().glob(".pyenv/versions/3.8.*/bin/python3"))
    return str(found[0]) if found else None


class FakeConnection:
    """What a connection offers to copies; the host is a process here."""

    host = "host1"
    interruptions = 0

    def problem_since(self, moment: float) -> str:
        return ""

    async def wait_until_it_answers(self) -> None:
        """The host always answers at once."""

    def __init__(self, python: str = sys.executable, pipes: bool = False, unnamed: bool = True) -> None:
        self.at_close: list = []
        self.on_lost: list = []
        self.state = "open"
        self.processes: list[subprocess.Popen] = []
        self._python = python
        self._pipes = pipes
        self._code = (
            SERVE if unnamed else SERVE.replace("; serve", "; import agent.directory_tree as t; t._UNNAMED = 0; serve")
        )

    def check(self) -> None:
        if self.state != "open":
            raise ConnectionLostError(self.host)

    async def open_copy_stream(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        command = [self._python, "-IS", "-c", self._code, str(AGENT.parent)]
        with theirs:
            if self._pipes:
                command = ["sh", "-c", 'cat | "$0" "$@" | cat', *command]
            self.processes.append(
                subprocess.Popen(command, stdin=theirs, stdout=theirs, start_new_session=True, close_fds=True)
            )
        return ours

    def close(self) -> None:
        for call in self.at_close:
            call()
        for process in self.processes:
            process.wait(5)


@pytest.fixture(params=["now", "3.8", "pipes", "named"])
def any_host(request):
    python = sys.executable
    if request.param == "3.8":
        python = old_python()
        if python is None:
            pytest.skip("no Python 3.8 here")
    connection = FakeConnection(python, request.param == "pipes", request.param != "named")
    yield connection
    connection.close()


@pytest.fixture
def host():
    connection = FakeConnection()
    yield connection
    connection.close()


def run(work, timeout=60):
    return asyncio.run(asyncio.wait_for(work, timeout))


def do_send(host, local, remote=None, cwd="", env=None, **more) -> TransferResult:
    return run(send(host, local, remote, cwd=str(cwd), env=env or {}, **more))


def do_get(host, remote, local=None, cwd="", env=None, **more) -> TransferResult:
    return run(get(host, remote, local, cwd=str(cwd), env=env or {}, **more))


# --- both ways -------------------------------------------------------------------------------------
def test_folder_both_ways(any_host, tmp_path):
    source = make_tree(tmp_path / "source")
    result = do_send(any_host, source, "remote", cwd=tmp_path)
    assert result.path == str(tmp_path / "remote")
    assert state(tmp_path / "remote") == state(source)
    back = do_get(any_host, "remote", str(tmp_path / "back"), cwd=tmp_path)
    assert state(tmp_path / "back") == state(source)
    assert (back.files, back.bytes, back.sent, back.skipped) == (result.files, result.bytes, result.files, 0)
    assert len(any_host.processes) == 1


def test_again_sends_only_what_has_changed(any_host, tmp_path):
    source = make_tree(tmp_path / "source")
    first = do_send(any_host, source, tmp_path / "there")
    again = do_send(any_host, source, tmp_path / "there")
    assert (again.sent, again.skipped, again.bytes) == (0, first.files, first.bytes)
    assert state(tmp_path / "there") == state(source)
    (source / "plain").write_text("changed")
    (source / "with space").chmod(0o700)
    (source / "link").unlink()
    (source / "link").symlink_to("elsewhere")
    (source / "read only").chmod(0o755)
    (source / "read only" / "new").write_text("new")
    (source / "read only").chmod(0o555)
    again = do_send(any_host, source, tmp_path / "there")
    assert again.sent == 2
    then, now = state(source), state(tmp_path / "there")
    # The folder itself was there before: its own mode and time are left alone.
    assert {**now, b".": None} == {**then, b".": None}
    assert do_get(any_host, str(tmp_path / "there"), str(source)).sent == 0


def test_written_again_in_the_same_instant_is_noticed(host, tmp_path):
    source = tmp_path / "file"
    source.write_text("one")
    # No clock can be trusted to be that much finer than the writes: a little ahead is in the same instant for sure.
    instant = time.time_ns() + 5 * 10**9
    os.utime(source, ns=(instant, instant))
    do_send(host, source, tmp_path / "there")
    source.write_text("two")
    os.utime(source, ns=(instant, instant))
    assert do_send(host, source, tmp_path / "there").sent == 1
    assert (tmp_path / "there").read_text() == "two"


@pytest.mark.parametrize("name", ["/proc/cpuinfo", "/proc/self/environ", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_what_has_no_size_is_not_taken_for_empty(host, tmp_path, name):
    if not Path(name).is_file():
        pytest.skip("this system has none")
    for copy in (do_send, do_get):
        with pytest.raises(TransferError, match="has no size: print it with a command"):
            copy(host, name, str(tmp_path / "there"))
        assert not (tmp_path / "there").exists()


def test_folder_is_merged(host, tmp_path):
    source, there = tmp_path / "source", tmp_path / "there"
    for folder in (source, there):
        (folder / "sub").mkdir(parents=True)
    (source / "sub" / "new").write_text("new")
    (there / "sub" / "old").write_text("old")
    there.chmod(0o700)
    do_send(host, source, there)
    assert sorted(os.listdir(there / "sub")) == ["new", "old"]
    assert stat.S_IMODE(there.stat().st_mode) == 0o700


@pytest.mark.parametrize("seed", range(3))
def test_random_trees(host, tmp_path, seed):
    dice = random.Random(seed)
    folders = [tmp_path / "source"]
    folders[0].mkdir()
    for i in range(900):
        path = dice.choice(folders) / f"{i}{dice.choice('äß ☃$*')}"
        kind = dice.random()
        if kind < 0.1:
            path.mkdir(mode=dice.choice([0o700, 0o755, 0o500]))
            folders.append(path)
        elif kind < 0.2:
            path.symlink_to(dice.choice(["..", "/etc/passwd", str(i), "x/y"]))
        else:
            path.write_bytes(dice.randbytes(int(2 ** dice.uniform(0, 16))))
            path.chmod(dice.choice([0o400, 0o644, 0o000, 0o751]))
    do_send(host, tmp_path / "source", tmp_path / "there")
    assert state(tmp_path / "there") == state(tmp_path / "source")
    do_get(host, str(tmp_path / "there"), tmp_path / "back")
    assert state(tmp_path / "back") == state(tmp_path / "source")


# --- what source and destination mean --------------------------------------------------------------
def test_where_a_file_goes(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "file.txt"
    source.write_text("x")
    work = tmp_path / "not" / "yet"
    cases = {
        None: "not/yet/file.txt",
        "other": "not/yet/other",
        "new/": "not/yet/new/file.txt",
        "new": "not/yet/new/file.txt",
        "deep/er/name": "not/yet/deep/er/name",
        str(tmp_path / "abs"): "abs",
        "~/home": "home/home",
        "$WHERE/x": "in the env/x",
        "${WHERE}/y": "in the env/y",
        "$UNDEFINED_HERE": "not/yet/$UNDEFINED_HERE",
        "~": "home/file.txt",
        "../up": "not/up",
    }
    (tmp_path / "home").mkdir()
    env = {"HOME": str(tmp_path / "home"), "WHERE": str(tmp_path / "in the env")}
    for remote, wanted in cases.items():
        result = do_send(host, "file.txt", remote, cwd=work, env=env)
        assert (tmp_path / wanted).read_text() == "x", remote
        assert os.path.samefile(result.path, tmp_path / wanted)


def test_where_a_folder_goes(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    work = tmp_path / "work"
    for remote, wanted in {None: "folder/x", "a/b": "a/b/x", "a/": "a/folder/x", "./": "folder/x"}.items():
        do_send(host, "folder/", remote, cwd=work)
        assert (work / wanted).exists(), remote


def test_where_what_is_fetched_goes(host, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (there / "folder").mkdir(parents=True)
    (there / "folder" / "x").write_text("x")
    (there / "$name").write_text("literal")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HERE", "in")
    assert do_get(host, "folder/x", cwd=there).path == str(here / "x")
    assert do_get(host, "folder", cwd=there).path == str(here / "folder")
    assert do_get(host, "folder/x", "$HERE/", cwd=there).path == str(here / "in" / "x")
    assert do_get(host, "$name", cwd=there, env={"name": "folder/x"}).path == str(here / "$name")
    (here / "x").unlink()
    assert do_get(host, "$F", cwd=there, env={"F": "folder/x"}).path == str(here / "x")
    assert do_get(host, ".", "all/", cwd=there).path == str(here / "all" / "there")
    assert (here / "$name").read_text() == "literal"


def test_links_that_are_named_are_followed(host, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    do_send(host, tmp_path / "link", tmp_path / "there")
    assert not (tmp_path / "there").is_symlink()
    assert (tmp_path / "there").read_text() == "x"


def test_expand():
    env = {"HOME": "/h", "A": "/a b", "T": "~"}
    assert expand(b"~/x", env) == b"/h/x"
    assert expand(b"$A/${A}$", env) == b"/a b//a b$"
    assert expand(b"$T/\xff", env) == b"~/\xff"
    assert expand(b"~root", {}) == os.path.expanduser(b"~root")
    assert expand(b"~nobody-of-that-name/x", {}) == b"~nobody-of-that-name/x"
    assert absolute(b"x", b"~/w", env) == b"/h/w/x"
    assert absolute(b"x", b"", env) == b"/h/x"


_SUB, _ALL_SUBS = {"sub/x", "sub/deep/a.pyc"}, {"sub/x", "sub/deep/a.pyc", "deep/sub/x"}


_PATTERNS = [
    ("sub", _ALL_SUBS),
    ("sub/", _ALL_SUBS),
    ("./sub", _SUB),
    ("./sub/", _SUB),
    ("project/sub", _SUB),
    ("./project//sub/", _SUB),
    ("../{here}/project/sub", _SUB),
    ("{tmp}/project/sub", _SUB),
    ("{tmp}/project/../project/sub", _SUB),
    ("{tmp}/link/sub", _SUB),
    ("link/sub", _SUB),
    ("$THERE/project/sub", _SUB),
    ("/sub", _SUB),
    ("deep/sub", {"deep/sub/x"}),
    ("./deep/./sub/x", {"deep/sub/x"}),
    ("project/*/*.pyc", {"sub/deep/a.pyc"}),
    ("{tmp}/project/s*", _SUB),
    ("**/sub", _ALL_SUBS),
    ("*.pyc", {"a.pyc", "sub/deep/a.pyc"}),
    ("[1]", {"[1]"}),
    ("nothing", set()),
    ("./deep/a.pyc", set()),
    ("../sub", set()),
    ("{tmp}/sub", set()),
    ("{tmp}/project", set()),
    (".", set()),
    ("/", set()),
    ("", set()),
    ("{tmp}/project-not/sub", set()),
]


@pytest.mark.parametrize("way", ["send", "get"])
@pytest.mark.parametrize("source", ["project", "link/", "{tmp}/project"])
def test_what_is_left_out(host, tmp_path, monkeypatch, way, source):
    names = {"a.pyc", "keep", "sub/x", "sub/deep/a.pyc", "deep/sub/x", "[1]"}
    for name in names:
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "link").symlink_to("project")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THERE", str(tmp_path))
    copy = do_send if way == "send" else do_get
    for number, (pattern, gone) in enumerate(_PATTERNS):
        written = pattern.format(tmp=tmp_path, here=tmp_path.name)
        copied = tmp_path / f"copy{number}"
        result = copy(host, source.format(tmp=tmp_path), str(copied), cwd=tmp_path, exclude=[written])
        found = {str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()}
        assert found == names - gone, pattern
        assert result.unused == (() if gone else (written,))


@pytest.mark.parametrize("way", ["send", "get"])
def test_patterns_that_leave_nothing_out_are_told(host, tmp_path, way):
    """But not those of what others have left out already, nor twice."""
    (tmp_path / "project" / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "project" / "file").touch()
    copy = do_send if way == "send" else do_get
    patterns = ["sub", "./sub/deep", "s*", "other", "other", "./subb", "caf\u00e9", "\udcff", "sub\0"]
    result = copy(host, tmp_path / "project", str(tmp_path / "copy"), cwd=tmp_path, exclude=patterns)
    assert result.unused == ("other", "other", "./subb", "caf\u00e9", "\udcff", "sub\0")
    assert os.listdir(tmp_path / "copy") == ["file"]
    result = copy(host, tmp_path / "project" / "file", str(tmp_path / "one"), cwd=tmp_path, exclude=["file"])
    assert result.unused == ("file",)  # what was named itself is copied


# --- errors ----------------------------------------------------------------------------------------
def fails(call, *args, **more) -> TransferError:
    with pytest.raises(TransferError) as caught:
        call(*args, **more)
    assert isinstance(caught.value, LazyclusterError) and isinstance(caught.value, OSError)
    assert "host1" in str(caught.value)
    return caught.value


def test_missing_source(host, tmp_path):
    error = fails(do_send, host, tmp_path / "missing", tmp_path / "there")
    assert (error.errno, error.side, error.path) == (errno.ENOENT, "manager", str(tmp_path / "missing"))
    error = fails(do_get, host, "missing", tmp_path / "there", cwd=tmp_path)
    assert (error.errno, error.side, error.path) == (errno.ENOENT, "host1", str(tmp_path / "missing"))
    assert "Next step" in str(error)
    (tmp_path / "dangling").symlink_to("nothing")
    assert "link to nothing" in str(fails(do_send, host, tmp_path / "dangling", tmp_path / "there"))
    assert sorted(os.listdir(tmp_path)) == ["dangling"]
    assert len(host.processes) == 1


def test_what_is_in_the_way(host, tmp_path):
    (tmp_path / "file").write_text("file")
    (tmp_path / "folder" / "file").mkdir(parents=True)
    assert fails(do_send, host, tmp_path / "file", tmp_path / "folder").errno == errno.EISDIR
    assert fails(do_send, host, tmp_path / "folder", tmp_path / "file").errno == errno.ENOTDIR
    assert fails(do_get, host, str(tmp_path / "file"), tmp_path / "file" / "x").errno == errno.ENOTDIR
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("other")
    error = fails(do_send, host, tmp_path / "folder", tmp_path / "other")
    assert (error.errno, error.path) == (errno.ENOTDIR, str(tmp_path / "other" / "file"))
    assert fails(do_send, host, tmp_path / "other", tmp_path / "folder").errno == errno.EISDIR
    assert (tmp_path / "other" / "file").read_text() == "other"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "file").symlink_to("/tmp")
    assert "symbolic link" in str(fails(do_send, host, tmp_path / "folder", tmp_path / "linked"))


def test_name_too_long(host, tmp_path):
    (tmp_path / "file").write_text("x")
    error = fails(do_send, host, tmp_path / "file", "n" * 256, cwd=tmp_path)
    assert (error.errno, error.side) == (errno.ENAMETOOLONG, "host1")
    assert do_send(host, tmp_path / "file", "n" * 255, cwd=tmp_path).sent == 1


def test_empty_and_impossible_names(host, tmp_path):
    for bad in ("", "a\0b"):
        with pytest.raises(ValueError, match="_path"):
            do_send(host, bad)
        with pytest.raises(ValueError, match="_path"):
            do_get(host, bad)
    (tmp_path / "file").touch()
    assert fails(do_send, host, tmp_path / "file", "x/..", cwd=tmp_path).errno in (errno.EISDIR, errno.ENOENT)


def test_special_files(host, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "named pipe" in str(fails(do_send, host, tmp_path / "pipe", tmp_path / "there"))
    assert "device" in str(fails(do_get, host, "/dev/zero", tmp_path / "there"))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe")
    (tmp_path / "folder" / "file").write_text("x")
    for call, source in ((do_send, tmp_path / "folder"), (do_get, str(tmp_path / "folder"))):
        result = call(host, source, tmp_path / "there")
        assert result.left_out == (f"{tmp_path}/folder/pipe is a named pipe",)
        assert os.listdir(tmp_path / "there") == ["file"]
    # They are not replaced, either, not even through a link.
    assert "not replaced" in str(fails(do_send, host, tmp_path / "folder" / "file", tmp_path / "pipe"))
    (tmp_path / "null").symlink_to("/dev/null")
    assert "not replaced" in str(fails(do_send, host, tmp_path / "folder" / "file", tmp_path / "null"))


def test_not_into_itself(host, tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    assert "into itself" in str(fails(do_send, host, tmp_path / "folder", tmp_path / "folder" / "sub" / "copy"))
    assert "onto itself" in str(fails(do_send, host, tmp_path / "folder", tmp_path / "folder"))
    (tmp_path / "file").write_text("x")
    assert do_send(host, tmp_path / "file", tmp_path / "file").sent == 0
    assert (tmp_path / "file").read_text() == "x"


class Nobody(FakeConnection):
    """The host's process runs as another user."""

    async def open_copy_stream(self):
        become = "import os, hashlib; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
        self._code = SERVE.replace("serve(0", become + "serve(0")
        return await super().open_copy_stream()


@pytest.fixture
def nobody():
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    connection = Nobody()
    yield connection
    connection.close()


def test_no_permission(nobody, tmp_path):
    host = nobody
    (tmp_path / "file").write_text("secret")
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "mine").mkdir(mode=0o755)
    (tmp_path / "mine" / "file").write_text("before")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 5 != 5 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    error = fails(do_get, host, str(tmp_path / "file"), tmp_path / "there")
    assert (error.errno, error.side, error.path) == (errno.EACCES, "host1", str(tmp_path / "file"))
    error = fails(do_send, host, tmp_path / "file", tmp_path / "mine" / "file")
    assert (error.errno, error.side, error.path) == (errno.EACCES, "host1", str(tmp_path / "mine" / "file"))
    assert "permissions" in error.hint
    assert fails(do_send, host, tmp_path / "file", tmp_path / "mine" / "new" / "x").errno == errno.EACCES
    assert (tmp_path / "mine" / "file").read_text() == "before"
    assert not (tmp_path / "there").exists()


@pytest.fixture
def small_disk(tmp_path):
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "disk"
    path.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip("needs root, to mount a small disk")
    yield path
    libc.umount2(os.fsencode(path), 2)


@pytest.mark.parametrize("unnamed", [True, False])
def test_disk_full(tmp_path, small_disk, unnamed):
    host = FakeConnection(unnamed=unnamed)
    (tmp_path / "big").write_bytes(os.urandom(30_000_000))
    (small_disk / "big").write_text("before")
    error = fails(do_send, host, tmp_path / "big", small_disk)
    assert (error.errno, error.side, error.path) == (errno.ENOSPC, "host1", str(small_disk / "big"))
    error = fails(do_get, host, str(tmp_path / "big"), small_disk)
    assert (error.errno, error.side) == (errno.ENOSPC, "manager")
    assert (small_disk / "big").read_text() == "before"
    assert os.listdir(small_disk) == ["big"]
    assert os.statvfs(small_disk).f_bfree > 250
    # The stream is still good.
    assert do_send(host, tmp_path / "big", tmp_path / "copy").sent == 1
    assert len(host.processes) == 1
    host.close()


def copies(host, way, source, destination, **more):
    return (
        do_send(host, source, destination, **more) if way == "send" else do_get(host, str(source), destination, **more)
    )


@pytest.mark.parametrize("way", ["send", "get"])
@pytest.mark.parametrize("folder", [False, True])
def test_of_a_file_that_grows_what_was_there_is_copied(host, tmp_path, way, folder):
    (tmp_path / "source").mkdir()
    log, empty = tmp_path / "source" / "log", tmp_path / "source" / "empty"
    log.write_bytes(os.urandom(20_000_000))
    empty.touch()
    before = log.read_bytes()
    written = log.stat().st_mtime_ns

    def grow(done, total, files):
        for path in (log, empty):
            with path.open("ab") as file:
                file.write(b"a line\n" * 100)

    result = copies(host, way, log.parent if folder else log, tmp_path / "there", progress=grow)
    copied = tmp_path / "there" / "log" if folder else tmp_path / "there"
    assert log.stat().st_size > len(before)
    assert copied.read_bytes() == log.read_bytes()[: copied.stat().st_size]
    assert len(before) <= copied.stat().st_size < log.stat().st_size
    assert result.sent == 1 + folder
    # The rest comes with the next copy, since the copy is as old as what it holds.
    if copied.stat().st_size == len(before):
        assert copied.stat().st_mtime_ns == written
    copies(host, way, log.parent if folder else log, tmp_path / "there")
    assert copied.read_bytes() == log.read_bytes()


def shrink(path):
    os.truncate(path, 100)


def rewrite(path):
    with path.open("r+b") as file:
        file.write(b"other")
        file.seek(0, os.SEEK_END)
        file.write(b"more")


@pytest.mark.parametrize("way", ["send", "get"])
@pytest.mark.parametrize(("change", "said"), [(shrink, "shrank"), (rewrite, "rewritten")])
def test_a_source_that_changes(host, tmp_path, way, change, said):
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "file"
    (tmp_path / "source" / "first").touch()  # the first progress is that of the large file
    (tmp_path / "source" / "last").touch()
    (tmp_path / "there").write_text("before")

    def progress(done, total, files):
        if done > 1000:
            change(source)

    for whole in (False, True):
        source.write_bytes(bytes(20_000_000))
        destination = tmp_path / ("folder" if whole else "there")
        error = fails(copies, host, way, source.parent if whole else source, destination, progress=progress)
        side = "manager" if way == "send" else "host1"
        assert (error.side, error.path) == (side, str(source)) and said in str(error)
        assert "copy it again" in error.hint
    assert (tmp_path / "there").read_text() == "before"
    assert sorted(os.listdir(tmp_path / "folder")) == ["first", "last"]
    assert sorted(os.listdir(tmp_path)) == ["folder", "source", "there"]
    # The stream is still good.
    assert copies(host, way, source.parent, tmp_path / "folder").sent == 1
    assert len(host.processes) == 1


@pytest.mark.parametrize("way", ["send", "get"])
def test_what_vanishes_from_a_folder_keeps_nothing_else_from_being_copied(host, tmp_path, way):
    source = tmp_path / "source"
    for name in ("a", "b", "c"):
        (source / name).mkdir(parents=True)
        (source / name / "large").write_bytes(os.urandom(3_000_000))
        for number in range(40):
            (source / name / f"{number}").write_text(str(number))
    gone = []

    def vanish(done, total, files):
        if not gone:
            folder = next(path for path in source.iterdir() if not (tmp_path / "there" / path.name / "0").exists())
            gone.append(folder)
            subprocess.run(["rm", "-r", folder], check=True)

    error = fails(copies, host, way, source, tmp_path / "there", progress=vanish)
    assert "vanished" in str(error) and "have arrived" in error.hint and error.errno == errno.ENOENT
    missed = {error.path, *(line.rpartition(": ")[0] for line in error.others)}
    assert all(path.startswith(str(gone[0])) for path in missed)
    for name in {"a", "b", "c"} - {gone[0].name}:
        assert state(tmp_path / "there" / name) == state(source / name)
    assert copies(host, way, source, tmp_path / "there").sent == 0
    assert len(host.processes) == 1


def test_what_cannot_be_read_keeps_nothing_else_from_being_copied(nobody, tmp_path):
    source = tmp_path / "source"
    (source / "closed").mkdir(parents=True)
    (source / "closed" / "file").write_text("x")
    (source / "closed").chmod(0o700)
    for number in range(200):
        (source / f"{number}").write_text(str(number))
    for number in range(0, 200, 20):
        (source / f"{number}").chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 5 != 5 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    error = fails(do_get, nobody, str(source), tmp_path / "there")
    assert (error.errno, error.side, len(error.others)) == (errno.EACCES, "host1", 10)
    missed = {os.path.basename(line.rpartition(": ")[0]) for line in (f"{error.path}: ", *error.others)}
    assert missed == {"closed", *(str(number) for number in range(0, 200, 20))}
    assert str(error).count("Permission denied") == 11 and "have arrived" in str(error)
    assert len(os.listdir(tmp_path / "there")) == 191
    for number in range(200):
        (source / f"{number}").chmod(0o600)
    error = fails(do_get, nobody, str(source), tmp_path / "other")
    assert len(error.others) == 100 and error.others[-1] == "101 more" and "nor 90 others" in str(error)
    assert pickle.loads(pickle.dumps(error)).others == error.others


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(TransferError("h", "manager", "/x\n\udcff", 28, "No space left", "free some")))
    assert (error.errno, error.strerror, error.path) == (28, "No space left", "/x\n\udcff")
    str(error).encode()


def test_progress(host, tmp_path):
    seen: list[tuple] = []
    make_tree(tmp_path / "source")
    result = do_send(host, tmp_path / "source", tmp_path / "there", progress=lambda *args: seen.append(args))
    assert seen[-1] == (result.bytes, result.bytes, result.files)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


# --- interruptions ---------------------------------------------------------------------------------
@pytest.fixture
def endless(tmp_path):
    """A large file, and a destination with a file of that name."""
    (tmp_path / "from").mkdir()
    source = make_large(tmp_path / "from" / "file")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "file").write_text("before")
    yield source
    source.unlink()


def slow(sock: socket.socket) -> None:
    """Let little be on its way, so that a copy is surely in its middle."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)


async def in_the_middle(host, copying, seen: asyncio.Event):
    task = asyncio.ensure_future(copying)
    waiting = asyncio.ensure_future(seen.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return task


def copying(host, way, source, target, seen, loop):
    def progress(done, total, files):
        if done > 1_000_000:
            loop.call_soon_threadsafe(seen.set)

    if way == "send":
        return send(host, source, target, cwd="", env={}, progress=progress)
    return get(host, str(source), target, cwd="", env={}, progress=progress)


def settled(check, patience=5.0) -> bool:
    deadline = time.monotonic() + patience
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("unnamed", [True, False])
@pytest.mark.parametrize("way", ["send", "get"])
@pytest.mark.parametrize("how", ["cancel", "kill", "terminate", "close"])
def test_interrupted(tmp_path, endless, way, how, unnamed, monkeypatch):
    host = FakeConnection(unnamed=unnamed)
    if not unnamed:
        monkeypatch.setattr(directory_tree, "_UNNAMED", 0)
    target = tmp_path / "to" / "file"

    async def work():
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = await in_the_middle(host, copying(host, way, endless, target, seen, loop), seen)
        assert not task.done()
        if how == "cancel":
            task.cancel()
        elif how == "close":
            for call in host.at_close:
                call()
        else:
            host.processes[0].send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        with pytest.raises(asyncio.CancelledError if how == "cancel" else TransferError):
            await task

    run(work())
    # The process that served it ends, without anybody having to wait for a signal.
    host.processes[0].wait(5)
    left = ["file"]
    if not unnamed and way == "send" and how == "kill":
        # Only SIGKILL of the receiver, where the file system does not know files without names, leaves something.
        left = sorted(os.listdir(target.parent))
        assert len(left) == 2 and left[0].startswith(".file.lazycluster-") and left[0].endswith(".part")
    assert settled(lambda: sorted(os.listdir(target.parent)) == left)
    assert target.read_text() == "before"
    host.close()


def test_unfinished_files_are_private(tmp_path, endless):
    host = FakeConnection(unnamed=False)

    async def work():
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = await in_the_middle(host, copying(host, "send", endless, tmp_path / "to/new", seen, loop), seen)
        (part,) = set(os.listdir(tmp_path / "to")) - {"file"}
        assert stat.S_IMODE((tmp_path / "to" / part).stat().st_mode) == 0o600
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work())
    host.close()


def test_stream_that_ended_while_idle_is_replaced(host, tmp_path):
    (tmp_path / "file").write_text("x")
    for _ in range(2):
        do_send(host, tmp_path / "file", tmp_path / "there")
        host.processes[-1].kill()
        host.processes[-1].wait()
    assert len(host.processes) == 2


def test_lost_connection(host, tmp_path):
    (tmp_path / "file").write_text("x")
    do_send(host, tmp_path / "file", tmp_path / "there")
    host.state = "lost"
    for call in host.on_lost:
        call("no answer")
    host.processes[0].wait(5)
    with pytest.raises(ConnectionLostError):
        do_send(host, tmp_path / "file", tmp_path / "there")


def test_a_link_that_was_silent_before_it_dropped_is_waited_for(host, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    host.state = "interrupted"
    monkeypatch.setattr(host, "check", lambda: None)
    whole = host.open_copy_stream

    async def open_copy_stream():
        """The session ends, as all do with the link; that is counted when it falls silent only."""
        sock = await whole()
        if len(host.processes) == 1:
            host.processes[0].kill()
        return sock

    async def answering():
        host.state = "open"

    monkeypatch.setattr(host, "open_copy_stream", open_copy_stream)
    monkeypatch.setattr(host, "wait_until_it_answers", answering)
    do_send(host, tmp_path / "file", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "x"
    assert len(host.processes) == 2


def test_many_at_once(host, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(500_000))

    async def work():
        await asyncio.gather(
            *(send(host, tmp_path / "file", str(tmp_path / f"to{i}"), cwd="", env={}) for i in range(30))
        )

    run(work())
    assert len(host.processes) <= 2
    assert {(tmp_path / f"to{i}").read_bytes() for i in range(30)} == {(tmp_path / "file").read_bytes()}


def test_host_that_allows_one_session_only(host, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(500_000))
    whole = host.open_copy_stream

    async def open_copy_stream():
        if host.processes:
            raise ConnectionLostError(host.host, "no further session")
        return await whole()

    host.open_copy_stream = open_copy_stream

    async def work():
        await asyncio.gather(
            *(send(host, tmp_path / "file", str(tmp_path / f"to{i}"), cwd="", env={}) for i in range(5))
        )

        host.processes[0].kill()
        host.processes[0].wait()
        with pytest.raises(ConnectionLostError):
            await send(host, tmp_path / "file", str(tmp_path / "to"), cwd="", env={})

    run(work())


@pytest.mark.parametrize("when", ["_child", "_answer"])
def test_a_folder_that_becomes_a_link_while_it_is_sent_is_not_followed(host, tmp_path, monkeypatch, when):
    """Who may write to a folder that is sent could have anything sent that its sender may read."""
    source = tmp_path / "source"
    for folder in ("source/sub", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text(folder)
    plain = getattr(Sender, when)

    def replacing(self, *arguments):
        seen = plain(self, *arguments) if when == "_child" else None
        if not (source / "sub").is_symlink():
            (source / "sub").rename(tmp_path / "old")
            (source / "sub").symlink_to(tmp_path / "outside")
        return seen if when == "_child" else plain(self, *arguments)

    monkeypatch.setattr(Sender, when, replacing)
    assert "is a link or file, not a directory" in str(fails(do_send, host, source, "there", cwd=tmp_path))
    assert not (tmp_path / "there" / "sub" / "file").exists()


# --- a host that means harm ------------------------------------------------------------------------
@contextlib.contextmanager
def draining(sock):
    """Take what comes, so that whoever answers does not wait."""
    stop = threading.Event()

    def drain():
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        with contextlib.suppress(ConnectionError):  # the other side has gone with something unread
            while not stop.is_set():
                if poll.poll(20) and not sock.recv(1 << 16):
                    return

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Hostile:
    """Sends what it likes to a receiver of the manager."""

    def __init__(self, root: Path, folder: bool = True) -> None:
        self.root = root
        self.script = bytearray()
        self.send(frames.START, {"folder": folder, "name": "x", "now": time.time_ns()})

    def send(self, kind: int, payload) -> None:
        import json

        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.script += struct.pack("!BI", kind, len(data)) + data

    def file(self, name: str, content: bytes = b"evil") -> None:
        self.send(frames.ENTRIES, [["f", name, 1, 0o4755, len(content)]])
        self.send(frames.DATA, content)
        self.send(frames.LAST, frames.SUMMARY.pack(len(content), 0o4755, 1))

    def outcome(self) -> Exception | None:
        self.send(frames.END, [])
        self.send(frames.ABORT, {})
        ours, theirs = socket.socketpair()
        receiver = Receiver(
            frames.FrameStream(ours.fileno(), ours.fileno()),
            lambda folder, name: destination(os.fsencode(self.root), b"/", {}, folder, name),
            frames.ByteCounter(),
        )
        telling = threading.Thread(target=self._tell, args=[theirs])
        with theirs, draining(theirs):
            telling.start()
            try:
                receiver.run()
            except (frames.CopyError, frames.StreamClosedError) as error:
                return error
            finally:
                ours.close()
                telling.join()
        return None

    def _tell(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is not listened to any more
            sock.sendall(self.script)
            sock.shutdown(socket.SHUT_WR)


@pytest.fixture
def inside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    yield tmp_path / "inside"
    assert os.listdir(tmp_path / "outside") == ["file"]
    assert (tmp_path / "outside" / "file").read_text() == "mine"
    assert stat.S_IMODE((tmp_path / "outside").stat().st_mode) == 0o755
    assert set(os.listdir(tmp_path)) <= {"inside", "outside"}


@pytest.mark.parametrize(
    "name", ["../outside/file", "/outside/file", "..", ".", "", "a/../../outside/file", "a//b", "x\0y", "sub/.."]
)
def test_names_that_lead_out_are_refused(inside, name):
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, [["d", "a", 1, 0o755, 0], ["d", "sub", 1, 0o755, 0]])
    hostile.file(name)
    assert "refused" in str(hostile.outcome())


@pytest.mark.parametrize("made_before", [True, False])
def test_nothing_is_written_through_links(inside, made_before):
    hostile = Hostile(inside)
    if made_before:
        inside.mkdir()
        (inside / "way").symlink_to("../outside")
    else:
        hostile.send(frames.ENTRIES, [["l", "way", 1, "../outside"]])
    hostile.file("way/new")
    assert "refused" in str(hostile.outcome())


def test_a_folder_that_is_a_link_is_refused(inside):
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, [["l", "way", 1, "../outside"], ["d", "way", 1, 0o777, 0]])
    assert "symbolic link" in str(hostile.outcome())


def test_a_file_replaces_a_link_and_does_not_follow_it(inside):
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, [["l", "file", 1, "../outside/file"]])
    hostile.file("file")
    assert hostile.outcome() is None
    assert (inside / "file").read_bytes() == b"evil"
    # Never a program that runs as its owner.
    assert stat.S_IMODE((inside / "file").stat().st_mode) == 0o755


@pytest.mark.parametrize("becomes", ["link", "other"])
@pytest.mark.parametrize("answer", [3, COMPARE])
def test_what_is_replaced_while_it_is_looked_at_is_not_changed(inside, monkeypatch, becomes, answer):
    """Who may write to the destination may put a link, or another file, in the place of one just then."""
    inside.mkdir()
    outside = inside.parent / "outside" / "file"
    (inside / "file").write_bytes(b"mine")
    os.utime(inside / "file", ns=(1, 1))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (inside / "file", outside)}

    def replaced(*_):
        (inside / "file").rename(inside / "file.old")
        if becomes == "link":
            (inside / "file").symlink_to(outside)
        else:
            (inside / "file").write_bytes(b"mine")
            (inside / "file").chmod(modes[outside])
        return answer

    monkeypatch.setattr(Receiver, "_time_alike", replaced)
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, [["f", "file", 1, 0o777, 4]])
    if answer == COMPARE:
        hostile.send(frames.SAME, frames.SUMMARY.pack(4, 0o777, 1))
    hostile.outcome()
    assert stat.S_IMODE(outside.stat().st_mode) == modes[outside]
    assert stat.S_IMODE((inside / "file.old").stat().st_mode) == modes[inside / "file"]
    if answer == 3 and becomes == "other":
        assert stat.S_IMODE((inside / "file").stat().st_mode) == modes[outside]


def test_one_file_stays_one_file(inside):
    inside.mkdir()
    hostile = Hostile(inside / "wanted", folder=False)
    hostile.file("../../outside/file")
    assert hostile.outcome() is None
    assert os.listdir(inside) == ["wanted"]


@pytest.mark.parametrize("name", ["../outside/file", "..", "", "/etc/passwd"])
def test_name_that_the_host_chooses(tmp_path, name):
    with pytest.raises(frames.CopyError):
        destination(None, os.fsencode(tmp_path), {}, False, os.fsencode(name))


@pytest.mark.parametrize("name", [".bashrc", ".ssh", "there"])
@pytest.mark.parametrize("local", [None, "{}/"])
def test_a_name_that_the_host_chooses_is_new_and_not_hidden(host, tmp_path, monkeypatch, name, local):
    """What `$F` is called is the host's word: it may not name what is there already, or what runs at login."""
    (tmp_path / "there" / name).mkdir(parents=True)
    (tmp_path / "there" / name / "file").write_text("evil")
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    error = fails(
        do_get, host, "$F", local and local.format(tmp_path / "here"), cwd=tmp_path / "there", env={"F": name}
    )
    assert "the choice of the other side" in str(error)
    assert os.listdir(tmp_path / "here") == ["there"]
    assert do_get(host, "$F", "named", cwd=tmp_path / "there", env={"F": name}).sent == 1


def test_batches_that_nobody_answered_are_limited(inside):
    hostile = Hostile(inside)
    files = [["f", f"{i}", 1, 0o644, 1] for i in range(frames.BATCH)]
    for _ in range(frames.WINDOW + 2):
        hostile.send(frames.ENTRIES, files)
    assert "more files at once" in str(hostile.outcome())


def test_a_batch_is_limited(inside):
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, [["l", "x", 1, "y"]] * (frames.BATCH + 1))
    assert "more files at once" in str(hostile.outcome())


def test_the_same_folder_again_and_again_takes_no_memory(inside):
    import tracemalloc

    hostile = Hostile(inside)
    for _ in range(3):
        hostile.send(frames.ENTRIES, [["d", "a", 1, 0o755, 0]] * frames.BATCH)
    tracemalloc.start()
    assert hostile.outcome() is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000
    assert os.listdir(inside) == ["a"]


def test_folders_take_a_limited_memory(inside, monkeypatch):
    """Each has to be remembered until the end, however long a list a host sends."""
    monkeypatch.setattr("lazycluster.agent.directory_tree._MOST_NAMES", 100_000)
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, [["d", f"{i}" * 20, 1, 0o755, 0] for i in range(frames.BATCH)])
    assert "too many directories" in str(hostile.outcome())


@pytest.mark.parametrize(
    ("answers", "why"),
    [([bytes(1 << 20)] * 200, "more answers than questions"), ([bytes([RESUME])], "too short"), ([b""] * 6, "more")],
)
def test_a_receiver_that_says_what_it_likes_takes_no_memory(tmp_path, answers, why):
    import tracemalloc

    (tmp_path / "file").write_bytes(bytes(100_000))
    script = bytearray()
    for kind, payload in [(frames.READY, b"{}"), *((frames.NEED, answer) for answer in answers)]:
        script += struct.pack("!BI", kind, len(payload)) + payload
    ours, theirs = socket.socketpair()
    found = os.fsencode(tmp_path / "file"), b"file"
    sender = Sender(frames.FrameStream(ours.fileno(), ours.fileno()), lambda: found, frames.ByteCounter())
    with ours, theirs, draining(theirs):

        def tell():
            with contextlib.suppress(OSError):  # it is not listened to any more
                theirs.sendall(script)

        telling = threading.Thread(target=tell)
        telling.start()
        tracemalloc.start()
        try:
            with pytest.raises(frames.StreamClosedError, match=why):
                sender.run()
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()
            ours.shutdown(socket.SHUT_RDWR)
            telling.join()


def test_a_proof_of_what_has_come_that_is_none_is_an_error(tmp_path):
    """It is asked for where a file has changed while it was sent."""
    source = tmp_path / "file"
    source.write_bytes(bytes(1000))
    frames_told = [(frames.READY, b"{}"), (frames.NEED, bytes([WANTED])), (frames.PROOF, b"x")]
    ours, theirs = socket.socketpair()

    def grow(*_):
        with source.open("ab") as file:
            file.write(b"more")

    counter = frames.ByteCounter(grow)
    stream = frames.FrameStream(ours.fileno(), ours.fileno())
    with ours, theirs, draining(theirs):
        theirs.sendall(b"".join(struct.pack("!BI", kind, len(payload)) + payload for kind, payload in frames_told))
        with pytest.raises(frames.StreamClosedError, match="makes no sense"):
            Sender(stream, lambda: (os.fsencode(source), b"file"), counter).run()
        ours.shutdown(socket.SHUT_RDWR)


def test_folders_have_a_depth(inside):
    hostile = Hostile(inside)
    deep = "/".join(["d"] * 250)
    hostile.file(deep)
    assert "in each other" in str(hostile.outcome())


@pytest.mark.parametrize("payload", [b"[" * 200_000, b'{"a":' * 100_000])
def test_nested_messages_are_refused(inside, payload):
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, payload)
    assert "no sense" in str(hostile.outcome())
    assert os.listdir(inside) == []


def test_a_frame_that_is_too_long_is_refused_before_it_comes(inside):
    hostile = Hostile(inside)
    hostile.script += struct.pack("!BI", frames.ENTRIES, 2**32 - 1)
    assert "makes no sense" in str(hostile.outcome())


def test_a_host_that_goes_on_sending_after_an_error_is_not_listened_to_for_ever(inside, monkeypatch):
    monkeypatch.setattr(frames, "_UNDER_WAY", 1_000_000)
    hostile = Hostile(inside)
    hostile.file("../outside/file")
    for _ in range(20):
        hostile.send(frames.DATA, bytes(100_000))
    assert "goes on sending" in str(hostile.outcome())


def test_what_the_host_says_of_an_error_does_not_steer_the_terminal():
    error = TransferError("host1", "host1", "/x\x1b[2J", 5, "no\x1b]0;title\x07")
    assert "\x1b" not in str(error) and "\x07" not in str(error)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (frames.ENTRIES, [[]]),
        (frames.ENTRIES, {"a": 1}),
        (frames.ENTRIES, [["f", "x", 10**30, 0, 1]]),
        (frames.ENTRIES, [["f", "x", "soon", 0, 1]]),
        (frames.ENTRIES, [["c", "x", 1, 0, 1]]),
        (frames.ENTRIES, [["f", 7, 1, 0, 1]]),
        (frames.ENTRIES, b"\xff"),
        (frames.DATA, b"x"),
        (frames.LAST, b"x"),
        (frames.SAME, frames.SUMMARY.pack(1, 1, 1)),
        (frames.PROVE, b""),
        (frames.PROOF, frames.CHECKSUM.pack(1)),
        (frames.LISTED, b"1" + bytes(400).replace(b"\0", b"0")),
        (frames.START, {}),
        (frames.NEED, b"x"),
        (99, b""),
    ],
)
def test_nonsense_is_an_error(inside, kind, payload):
    hostile = Hostile(inside)
    hostile.send(kind, payload)
    assert hostile.outcome() is not None


def test_damage_is_noticed(inside):
    hostile = Hostile(inside)
    hostile.send(frames.ENTRIES, [["f", "x", 1, 0o644, 4]])
    hostile.send(frames.DATA, b"1234")
    hostile.send(frames.LAST, frames.SUMMARY.pack(5, 0o644, 1))
    assert "damaged" in str(hostile.outcome())
    assert os.listdir(inside) == []


def test_memory_stays_small(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from agent.files import serve; serve(0, 1); "
        "print([line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line][0], file=sys.stderr)"
    )
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-IS", "-c", code, str(AGENT.parent)], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    )
    theirs.close()
    connection = FakeConnection()

    async def open_copy_stream():
        return ours

    connection.open_copy_stream = open_copy_stream
    with (tmp_path / "big").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 300_000_000)  # a hole would not be sent
    do_send(connection, tmp_path / "big", tmp_path / "there")
    connection.close()
    _, said = process.communicate(timeout=10)
    assert int(said) < 30_000  # KiB


# --- sparse files ----------------------------------------------------------------------------------
def make_sparse(path, *places, size):
    """Make a file with a little data at some places; return how much it takes of the disk."""
    with path.open("wb") as file:
        file.truncate(size)
        for place in places:
            file.seek(place)
            file.write(b"data %d" % place)
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("way", ["send", "get"])
@pytest.mark.parametrize("places", [(), (0,), (7 << 30,), (5_000_000, 3 << 40, (1 << 42) - 100)])
def test_holes_stay_holes(any_host, tmp_path, way, places):
    """Of terabytes, with what is between them; nothing of a hole is read, sent or written."""
    source, there = tmp_path / "source", tmp_path / "there"
    used = make_sparse(source, *places, size=1 << 42)
    os.chmod(source, 0o640)
    result = copies(any_host, way, source, there)
    assert (result.sent, result.bytes) == (1, 1 << 42)
    assert there.stat().st_size == 1 << 42
    assert there.stat().st_blocks * 512 <= 2 * used + 65536
    assert stat.S_IMODE(there.stat().st_mode) == 0o640
    with source.open("rb") as one, there.open("rb") as other:
        for place in (0, *places, (1 << 42) - 4096):
            assert os.pread(one.fileno(), 4096, place) == os.pread(other.fileno(), 4096, place)
    assert copies(any_host, way, source, there).skipped == 1
    os.utime(there, ns=(source.stat().st_mtime_ns // 10**9 * 10**9,) * 2)  # as on file systems that keep seconds only
    assert copies(any_host, way, source, there).skipped == 1


def test_holes_of_a_folder_and_what_only_looks_like_one(host, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    make_sparse(source / "holes", 100_000, 900_000, size=1_000_000)
    (source / "blank").write_bytes(bytes(1_000_000))
    (source / "empty").touch()
    assert do_send(host, source, tmp_path / "there").sent == 3
    for name in ("holes", "blank", "empty"):
        assert (tmp_path / "there" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("missing", ["constants", "support"])
def test_where_holes_are_not_told_all_is_data(host, tmp_path, monkeypatch, missing):
    if missing == "constants":
        monkeypatch.setattr(holes, "_SEEK_DATA", None)
    else:

        def lseek(fd, position, how):
            if how == os.SEEK_DATA:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(fd, position, how)

        real = os.lseek
        monkeypatch.setattr(os, "lseek", lseek)
    make_sparse(tmp_path / "source", 1_000_000, 5_000_000, size=6_000_000)
    do_send(host, tmp_path / "source", tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_digest_does_not_depend_on_where_holes_are(tmp_path):
    make_sparse(tmp_path / "holes", 300_000, 2_000_000, size=4_000_001)
    (tmp_path / "full").write_bytes((tmp_path / "holes").read_bytes())
    (tmp_path / "other").write_bytes((tmp_path / "holes").read_bytes().replace(b"data 3", b"data 4"))
    make_sparse(tmp_path / "moved", 300_000 + 2**18, 2_000_000, size=4_000_001)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((tmp_path / name).open("rb")) for name in ("holes", "full", "other", "moved")]
        one, same, *others = [digest(file.fileno()) for file in files]
    assert one == same
    assert one not in others


@pytest.mark.parametrize("count", [0, 1, 2, 3, 31, 255, 4096, 100_003])
def test_the_checksum_of_a_hole(count):
    for before in (b"", b"x", b"some text"):
        assert holes.after_zeros(zlib.crc32(before), count) == zlib.crc32(before + bytes(count))


def test_a_hole_that_no_file_can_have_is_refused(inside):
    for count in (2**64 - 1, 2**63 - 1):
        hostile = Hostile(inside)
        hostile.send(frames.ENTRIES, [["f", "x", 1, 0o644, 4]])
        hostile.send(frames.HOLE, count.to_bytes(8, "big"))
        hostile.send(frames.HOLE, count.to_bytes(8, "big"))
        assert hostile.outcome() is not None
        assert os.listdir(inside) == []
