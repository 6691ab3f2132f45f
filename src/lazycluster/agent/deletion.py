"""Removal of files and directories: what is never removed, and a removal that stays in one file system, off all links.

This module stands alone: programs that are sent to hosts take it along.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Dict, Iterator, List, Mapping, Optional, Tuple

    Identity = Tuple[int, int]  # device and inode

# Enough to look below a directory, also below one that may not be listed.
SEARCH: int = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SYSTEM = (
    "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/libx32", "/media", "/mnt", "/opt", "/proc",
    "/root", "/run", "/sbin", "/srv", "/sys", "/usr", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/local", "/usr/sbin",
    "/usr/share", "/var", "/var/lib", "/tmp", "/var/tmp",  # noqa: S108
    "/Applications", "/Library", "/System", "/Users", "/Volumes", "/private",
)  # fmt: skip


class RefusedError(Exception):
    """Something that is never removed; its text says what and why."""


class _Level:
    """A directory on the way down to the one that is being emptied."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.identity = _identity(os.fstat(fd))
        with os.scandir(fd) as entries:
            self.left = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def protected(kept: Optional[Mapping[str, str]] = None) -> Dict[Identity, str]:
    """Return the directories that are never removed, by device and inode, each with the reason.

    They are the root, the home directory as HOME and as the system's list of users name it, all that these are in, and
    the directories of the system.

    Args:
        kept: Further directories that stay, with all that they are in: what each is, and its path.
    """
    found: Dict[Identity, str] = {}
    wanted = [("the root of the file system", "/")]
    wanted += [("the home directory", path) for path in _homes()]
    wanted += [(what, path) for what, path in (kept or {}).items() if path]
    for what, path in wanted:
        _note(found, path, "it is " + what)
    for what, path in wanted:
        for above in _ancestors(path):
            _note(found, above, what + " is in it")
    for path in _SYSTEM:
        _note(found, path, "it is a directory of the system")
    return found


def _homes() -> Iterator[str]:
    yield os.path.expanduser("~")  # what HOME says
    try:
        import pwd

        yield pwd.getpwuid(os.geteuid()).pw_dir
    except (ImportError, KeyError):
        pass  # the system does not know this user


def _ancestors(path: str) -> Iterator[str]:
    """Yield the directories that a path leads through, and those that it is in once links are followed."""
    for way in (os.path.abspath(path), os.path.realpath(path)):
        while way != os.path.dirname(way):
            way = os.path.dirname(way)
            yield way


def _note(found: Dict[Identity, str], path: str, why: str) -> None:
    try:
        found.setdefault(_identity(os.stat(path)), why)
    except (OSError, ValueError):
        pass  # it does not exist


def _identity(inode: os.stat_result) -> Identity:
    return inode.st_dev, inode.st_ino


def _file_system(fd: int) -> Tuple[int, str]:
    """Return what tells a mounted file system from others, also from the same one mounted elsewhere."""
    mount = ""
    try:
        with open("/proc/self/fdinfo/{}".format(fd)) as file:
            mount = next((line for line in file if line.startswith("mnt_id:")), "")
    except OSError:
        pass  # not Linux: what is mounted twice cannot be told from itself
    return os.fstat(fd).st_dev, mount


def remove(path: str, kept: Optional[Mapping[str, str]] = None, folder: bool = False) -> Optional[OSError]:
    """Remove a file, or a directory with all that it holds, as far as that is possible.

    A link is removed, not what it leads to. What is mounted in the directory stays, with the directories above it.

    Args:
        path: An absolute path without ``.`` and ``..``.
        kept: See `protected`.
        folder: Refuse what is neither a directory nor a link to one.

    Returns:
        The first of the errors that left something there; None if all is removed.

    Raises:
        RefusedError: If it is one of the directories that are never removed, or a mount point; nothing was removed.
        OSError: If it cannot be removed, e.g. since it is not there.
    """
    above_path, name = os.path.split(path)
    if not name:
        raise RefusedError("{} is not removed: it is the root of the file system".format(path))
    above = os.open(above_path, SEARCH)
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            return _remove_directory(above, name, path, protected(kept))
        if folder and not os.path.isdir(path):
            raise RefusedError("{} is not a directory".format(path))
        os.unlink(name, dir_fd=above)
    finally:
        os.close(above)
    return None


def remove_tree(path: str) -> None:
    """Remove a file or directory, see `remove`, as far as that is possible; what stays is no error."""
    try:
        remove(path)
    except (OSError, RefusedError):
        pass


def _opened(above: int, name: str, path: str, stay: Mapping[Identity, str]) -> int:
    """Return the descriptor of a directory that may be removed: whatever takes its place later, it is the one checked.

    Raises:
        RefusedError: If it must stay.
    """
    _check(os.stat(name, dir_fd=above, follow_symlinks=False), path, stay)  # also of one that may not be listed
    fd = os.open(name, _LIST, dir_fd=above)
    try:
        _check(os.fstat(fd), path, stay)
        if _file_system(fd) != _file_system(above):
            raise RefusedError("{} is not removed: it is a mount point; unmount it first".format(path))
    except RefusedError:
        os.close(fd)
        raise
    return fd


def _check(inode: os.stat_result, path: str, stay: Mapping[Identity, str]) -> None:
    why = stay.get(_identity(inode))
    if why is not None:
        raise RefusedError("{} is not removed: {}".format(path, why))


def _remove_directory(above: int, name: str, path: str, stay: Mapping[Identity, str]) -> Optional[OSError]:
    fd = _opened(above, name, path, stay)
    try:
        error = _Emptying(fd, path, stay).run()
    finally:
        os.close(fd)
    if error is None:
        os.rmdir(name, dir_fd=above)
    return error


class _Emptying:
    """Empties a directory: one descriptor at a time, so that no depth is too much, and each entered without links."""

    def __init__(self, fd: int, path: str, stay: Mapping[Identity, str]) -> None:
        self._path = path
        self._stay = stay
        self._system = _file_system(fd)
        self._levels: List[_Level] = [_Level("", fd)]
        self._fd = os.dup(fd)
        self._error: Optional[OSError] = None

    def run(self) -> Optional[OSError]:
        """Do it; return the first error."""
        try:
            while self._levels[-1].left or len(self._levels) > 1:
                if not self._levels[-1].left:
                    self._go_up()
                    continue
                name, is_directory = self._levels[-1].left.pop()
                try:
                    if is_directory:
                        self._go_down(name)
                    else:
                        os.unlink(name, dir_fd=self._fd)
                except FileNotFoundError:
                    pass  # somebody else has removed it
                except OSError as error:
                    self._failed(error, name)
        finally:
            os.close(self._fd)
        return self._error

    def _failed(self, error: OSError, name: str) -> None:
        if self._error is None:
            way = [self._path, *(level.name for level in self._levels[1:]), name]
            self._error = OSError(error.errno, error.strerror, "/".join(way))

    def _go_down(self, name: str) -> None:
        fd = os.open(name, _LIST, dir_fd=self._fd)
        try:
            if _file_system(fd) != self._system:
                raise OSError(errno.EBUSY, "it is a mount point; unmount it first")
            why = self._stay.get(_identity(os.fstat(fd)))
            if why is not None:
                raise OSError(errno.EBUSY, why)
            level = _Level(name, fd)
        except OSError:
            os.close(fd)
            raise
        self._levels.append(level)
        os.close(self._fd)
        self._fd = fd

    def _go_up(self) -> None:
        name = self._levels.pop().name
        fd = os.open("..", SEARCH, dir_fd=self._fd)
        os.close(self._fd)
        self._fd = fd
        if _identity(os.fstat(fd)) != self._levels[-1].identity:
            raise OSError(errno.ESTALE, "it was moved while it was being removed", self._path)
        try:
            os.rmdir(name, dir_fd=fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._failed(error, name)
