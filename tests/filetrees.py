"""Folders with everything in them that a copy has to keep, and what it has kept."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path


def state(path) -> dict:
    """All that a copy keeps."""
    found = {}
    path = os.fsencode(path)
    for folder, folders, files in os.walk(path):
        for name in [b"", *folders, *files]:
            entry = os.path.join(folder, name) if name else folder
            inode = os.lstat(entry)
            content: object = None
            if stat.S_ISLNK(inode.st_mode):
                content = os.readlink(entry)
            elif stat.S_ISREG(inode.st_mode):
                content = hashlib.sha256(Path(os.fsdecode(entry)).read_bytes()).digest()
            mode = 0 if stat.S_ISLNK(inode.st_mode) else inode.st_mode
            found[os.path.relpath(entry, path)] = (stat.S_IFMT(inode.st_mode), mode, inode.st_mtime_ns, content)
    return found


def age(path, seconds=100.0):
    """Make a file look as if it had been there for long, so that its size and time tell whether it has changed."""
    then = time.time_ns() - int(seconds * 10**9) + 123_456
    os.utime(path, ns=(then, then))


def make_large(path: Path, size: int = 4 << 30) -> Path:
    """Make a file that takes seconds to copy and no time to make: its blocks are there, but were never written.

    A hole would take no time to copy, either.
    """
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


def make_large_there(path: Path) -> Path:
    """Make such a file on a host, whose file systems are in memory."""
    return make_large(path, 1 << 30)


def make_tree(root: Path) -> Path:
    names = ["plain", "with space", "quo'te\"", "new\nline", "ünïcode ☃", "-dash", "$HOME", "~", "a" * 255, "b.part"]
    (root / "sub dir" / "empty").mkdir(parents=True)
    (root / "nested" / "deep" / "er").mkdir(parents=True)
    for i, name in enumerate(names):
        (root / name).write_bytes(os.urandom(i * 1000))
        (root / "nested" / "deep" / name).write_text(name)
        (root / name).chmod([0o644, 0o600, 0o755, 0o444, 0o640][i % 5])
        age(root / name, 1000 + i)
    raw = os.path.join(os.fsencode(root), b"not utf-8 \xff\xfe")
    os.mkdir(raw)
    Path(os.fsdecode(os.path.join(raw, b"\x80"))).write_bytes(b"x")
    (root / "empty file").touch()
    (root / "big").write_bytes(os.urandom(3_000_001))
    (root / "link").symlink_to("plain")
    (root / "dangling").symlink_to("nowhere/at all")
    (root / "to folder").symlink_to("nested")
    os.symlink(b"target \xff", os.path.join(os.fsencode(root), b"raw link \xff"))
    (root / "read only").mkdir()
    (root / "read only" / "file").write_text("x")
    (root / "read only").chmod(0o555)
    age(root / "sub dir")
    age(root)
    return root
