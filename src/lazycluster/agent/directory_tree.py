"""A directory that no name leads out of, for files to go to or come from; and files that appear when complete."""

from __future__ import annotations

import binascii
import errno
import os
import stat
from typing import Dict, List, Optional, Tuple

from .stream import CopyError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNNAMED: int = getattr(os, "O_TMPFILE", 0)
_FULL = 0o777
_NO_NAMES = (b"", b".", b"..")
_MOST_NAMES = 512 * 1024 * 1024  # bytes that the directories of one copy may take in memory: more than a million
_NAME_COST = 250  # bytes beside the name itself
_DEEPEST = 200  # directories in each other: each holds a descriptor, and a path of the system has 4096 bytes in all


def part_name(name: bytes) -> bytes:
    """Return a hidden name for a file that is not complete yet, of a length that every file system takes."""
    shown = name[:64].decode("utf-8", "ignore").encode("utf-8")
    return b"." + shown + b".lazycluster-" + binascii.hexlify(os.urandom(6)) + b".part"


def has_unnamed_files(directory: int) -> bool:
    """Find out whether files without a name can be made and named later: nothing of them stays, whatever happens."""
    if not _UNNAMED:
        return False
    probe = part_name(b"probe")
    try:
        fd = os.open(b".", _UNNAMED | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            os.link(_proc(fd), probe, dst_dir_fd=directory)
            os.unlink(probe, dir_fd=directory)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def _proc(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


class PartFile:
    """A file that is being written, in the directory where it belongs, without a name or under a hidden one.

    Args:
        directory: Descriptor of the directory; stays the caller's.
        name: What it will be called.
        unnamed: Whether the file system takes files without a name.
    """

    def __init__(self, directory: int, name: bytes, unnamed: bool) -> None:
        self._directory = directory
        self._name = name
        self._part: Optional[bytes] = None
        flags = os.O_RDWR | os.O_CLOEXEC
        if unnamed:
            try:
                self.fd = os.open(b".", _UNNAMED | flags, 0o600, dir_fd=directory)
                return
            except OSError as error:
                # Another file system may be mounted here than the one that was asked.
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
        part = part_name(name)
        self.fd = os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        self._part = part

    @classmethod
    def taken_up(cls, directory: int, name: bytes, fd: int, size: int) -> "PartFile":
        """Go on with a file without a name, which has so many bytes that count."""
        os.ftruncate(fd, size)
        os.lseek(fd, size, os.SEEK_SET)
        part = cls.__new__(cls)
        part._directory, part._name, part._part, part.fd = directory, name, None, fd
        return part

    def given_up(self) -> int:
        """Return the file's descriptor, for another to go on with it; -1 if it has a name."""
        if self._part is not None:
            return -1
        fd, self.fd = self.fd, -1
        return fd

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            data = data[os.write(self.fd, data) :]

    def skip(self, count: int) -> None:
        """Append a hole of so many bytes."""
        os.ftruncate(self.fd, os.lseek(self.fd, count, os.SEEK_CUR))

    def complete(self, mode: int, mtime: int) -> None:
        """Give the file its mode, time and name; what had the name is replaced."""
        os.fchmod(self.fd, mode & _FULL)
        os.utime(self.fd, ns=(mtime, mtime))
        if self._part is None:
            try:
                os.link(_proc(self.fd), self._name, dst_dir_fd=self._directory)
            except FileExistsError:
                part = part_name(self._name)
                os.link(_proc(self.fd), part, dst_dir_fd=self._directory)
                self._part = part
        fd, self.fd = self.fd, -1
        # Some file systems tell only now that the disk is full.
        os.close(fd)
        if self._part is not None:
            os.rename(self._part, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._part = None

    def discard(self) -> None:
        """Forget the file, unless it is complete."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        part, self._part = self._part, None
        if part is not None:
            try:
                os.unlink(part, dir_fd=self._directory)
            except OSError:
                pass  # there is nobody to tell: what made it fail is told already


class DirectoryTree:
    """The directory that a copy goes to or comes from. Names in it lead through real directories only.

    Args:
        root: Its path.
    """

    def __init__(self, root: bytes) -> None:
        self.path = root
        self._open: List[Tuple[bytes, int]] = [(b"", os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))]
        self._latest: Optional[bytes] = None
        self._made: Dict[bytes, Tuple[int, int]] = {}
        self._names = 0
        self._unnamed: Optional[bool] = None

    @property
    def root(self) -> int:
        """Descriptor of the directory itself."""
        return self._open[0][1]

    @property
    def unnamed(self) -> bool:
        """True if files without a name can be made in it."""
        if self._unnamed is None:
            self._unnamed = has_unnamed_files(self.root)
        return self._unnamed

    def close(self) -> None:
        """Close the descriptors."""
        while self._open:
            os.close(self._open.pop()[1])

    def whole(self, name: bytes) -> bytes:
        """Return the path of a name, for messages."""
        return os.path.join(self.path, name) if name else self.path

    def parent(self, name: bytes) -> Tuple[int, bytes]:
        """Return the descriptor of the directory that a name is in, valid until the next call, and its last part.

        Raises:
            CopyError: If the name leads out of the tree.
        """
        folder_of, _, last = name.rpartition(b"/")
        if folder_of == self._latest and last not in _NO_NAMES and b"\0" not in last and name[:1] != b"/":
            return self._open[-1][1], last
        parts = name.split(b"/")
        if any(part in _NO_NAMES for part in parts) or b"\0" in name:
            raise CopyError(self.whole(name), "is refused: such a name could lead out of the destination")
        folders = parts[:-1]
        if len(folders) > _DEEPEST:
            raise CopyError(self.whole(name), "is refused: more than {} directories in each other".format(_DEEPEST))
        self._latest = None
        depth = 0
        while depth < len(folders) and depth + 1 < len(self._open) and self._open[depth + 1][0] == folders[depth]:
            depth += 1
        while len(self._open) > depth + 1:
            os.close(self._open.pop()[1])
        for folder in folders[depth:]:
            self._open.append((folder, self._enter(self._open[-1][1], folder, name)))
        self._latest = folder_of
        return self._open[-1][1], last

    def directory(self, name: bytes) -> int:
        """Return the descriptor of a directory, valid until the next call; of the root if the name is empty.

        Raises:
            CopyError: If the name leads out of the tree.
        """
        return self.parent(name + b"/x")[0] if name else self.root

    def _enter(self, directory: int, folder: bytes, name: bytes) -> int:
        try:
            return os.open(folder, _DIRECTORY, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                problem = "is refused: {!r} is a link or file, not a directory".format(folder)
                raise CopyError(self.whole(name), problem, errno.ENOTDIR) from error
            raise

    def folder(self, name: bytes, mode: int, mtime: int) -> None:
        """Make a directory, or take the one that is there; its mode and time are set by `settle`."""
        directory, last = self.parent(name)
        try:
            # Contents must be written, whatever the mode is in the end.
            os.mkdir(last, mode & _FULL | 0o700, dir_fd=directory)
        except FileExistsError:
            there = os.stat(last, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISDIR(there.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(there.st_mode) else "a file"
                problem = "is {} here and a directory there".format(kind)
                raise CopyError(self.whole(name), problem, errno.ENOTDIR) from None
            if there.st_mode & 0o700 != 0o700 and there.st_uid == os.geteuid():
                fd = self._enter(directory, last, name)
                try:
                    os.fchmod(fd, stat.S_IMODE(there.st_mode) | 0o700)
                finally:
                    os.close(fd)
        if name not in self._made:
            self._names += len(name) + _NAME_COST
            if self._names > _MOST_NAMES:
                raise CopyError(self.whole(name), "is refused: too many directories; copy them in parts")
        self._made[name] = mode, mtime

    def link(self, name: bytes, target: bytes, mtime: int) -> None:
        """Make a symbolic link; one that is there, or a file, is replaced."""
        directory, last = self.parent(name)
        try:
            there = os.stat(last, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            os.symlink(target, last, dir_fd=directory)
        else:
            if stat.S_ISDIR(there.st_mode):
                raise CopyError(self.whole(name), "is a directory here and a symbolic link there", errno.EISDIR)
            if stat.S_ISLNK(there.st_mode) and os.readlink(last, dir_fd=directory) == target:
                return
            part = part_name(last)
            os.symlink(target, part, dir_fd=directory)
            try:
                os.rename(part, last, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                os.unlink(part, dir_fd=directory)
                raise
        if os.utime in os.supports_follow_symlinks:
            os.utime(last, ns=(mtime, mtime), dir_fd=directory, follow_symlinks=False)

    def settle(self) -> None:
        """Give the directories their modes and times, innermost first. What one has beside (setgid) it keeps."""
        while self._made:
            name, (mode, mtime) = self._made.popitem()
            try:
                self._settle(name, mode, mtime)
            except OSError as error:
                # Folders of others may be merged into as far as they allow it.
                if error.errno != errno.EPERM:
                    raise CopyError.of(self.whole(name), error) from error

    def _settle(self, name: bytes, mode: int, mtime: int) -> None:
        if name:
            directory, last = self.parent(name)
            fd = self._enter(directory, last, name)
        else:
            fd = os.dup(self.root)
        try:
            beside = stat.S_IMODE(os.fstat(fd).st_mode) & ~_FULL
            os.fchmod(fd, beside | mode & _FULL)
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)

    def settle_root(self, mode: int, mtime: int) -> None:
        """Have `settle` treat the directory itself, too: it was made for this copy."""
        self._made[b""] = mode, mtime
