"""A file from which another process of the same user connects to a cluster: a notebook, say.

It holds the secrets of the cluster. Whoever can read it can run anything on the cluster's hosts, so it is made for its
owner's eyes only, and is not read if somebody else could have written it.

Its name is a user's choice, so something else may have it: nothing is replaced or removed but connection files. What
takes the name meanwhile stays, since a file is moved aside and looked at once more before it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lazycluster.agent.deletion import SEARCH
from lazycluster.ssh.agent_replies import check_shape
from lazycluster.utils import absolute, expanded

from .exceptions import ClusterError

__all__ = ["check", "read", "remove", "unanswered", "unusable", "write"]

_FORMAT = 1
_MOST = 1024 * 1024
_TRIES = 100  # as many others may want the same name in the same moment
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip

_Accept = Callable[[Mapping[str, Any]], bool]


def write(path: str | os.PathLike[str], engine: str, content: Mapping[str, Any], owner: str) -> Path:
    """Write a file that only its owner can read, in the place of an earlier connection file, if there is one.

    Args:
        path: Where.
        engine: The name of the cluster's class.
        content: What is needed to connect.
        owner: What the cluster is told by from all others.

    Returns:
        The absolute path.

    Raises:
        ClusterError: If there is something else than a connection file of this user.
        OSError: If it cannot be written.
    """
    file = _absolute(path)
    document = {"format": _FORMAT, "engine": engine, "owner": owner, **content}
    with _folder_of(file) as folder:
        made = _hidden(file.name)
        try:
            with os.fdopen(os.open(made, _MAKE, 0o600, dir_fd=folder), "w") as stream:
                json.dump(document, stream, indent=2)
                stream.write("\n")
            _give_name(folder, made, file)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made, dir_fd=folder)
    return file


def check(path: str | os.PathLike[str]) -> None:
    """Make sure that a connection file may be written there.

    Raises:
        ClusterError: If there is something else than a connection file of this user.
        OSError: If there is no such directory.
    """
    file = _absolute(path)
    with _folder_of(file) as folder, _opened(folder, file) as fd:
        if fd is not None:
            _check_replaceable(file, fd)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return absolute(expanded(path))


@contextlib.contextmanager
def _folder_of(file: Path) -> Iterator[int]:
    """Hold the directory of a file: its name may become another one's meanwhile."""
    if file.name in ("", ".."):  # the root, or above something: there is no name to be given
        raise _not_replaced(file, "is a directory")
    fd = os.open(file.parent, SEARCH)
    try:
        yield fd
    finally:
        os.close(fd)


def _hidden(name: str) -> str:
    return f".{name[:32]}-{secrets.token_hex(8)}"  # a name has 255 bytes at most, a character up to four


@contextlib.contextmanager
def _opened(folder: int, file: Path) -> Iterator[int | None]:
    """Open what has a name, if it is a file; None if nothing has it.

    Raises:
        ClusterError: If it is something else.
        OSError: If it cannot be read.
    """
    try:
        mode = os.stat(file.name, dir_fd=folder, follow_symlinks=False).st_mode  # merely opening a device can do harm
        if not stat.S_ISREG(mode):
            raise _not_replaced(file, f"is {_KINDS.get(stat.S_IFMT(mode), 'no file')}")
        fd = os.open(file.name, _READ, dir_fd=folder)
    except FileNotFoundError:
        yield None
        return
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _not_replaced(file, "is not a file")
        yield fd
    finally:
        os.close(fd)


def _not_replaced(file: Path, why: str) -> ClusterError:
    return ClusterError(f"{file} {why}: it is not replaced\n  Next step: name another file, or remove that one")


def _check_replaceable(file: Path, fd: int) -> None:
    if os.fstat(fd).st_uid != os.geteuid():
        raise _not_replaced(file, "belongs to another user")
    if not _is_connection_file(_content(fd)):
        raise _not_replaced(file, "exists already, and is not a connection file of lazycluster")


def _is_connection_file(document: Mapping[str, Any]) -> bool:
    number, engine, owner = (document.get(name) for name in ("format", "engine", "owner"))
    return isinstance(number, int) and isinstance(engine, str) and isinstance(owner, str)


def _content(fd: int) -> Mapping[str, Any]:
    """Return the object in an open file; nothing if there is something else."""
    try:
        document = json.loads(os.pread(fd, _MOST, 0))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _give_name(folder: int, made: str, file: Path) -> None:
    """Give a file that was made its name, unless something has it that must stay."""
    for _ in range(_TRIES):
        try:
            _rename_to_new(folder, made, file.name)
            return
        except FileExistsError:
            with _opened(folder, file) as fd:
                if fd is not None:
                    _check_replaceable(file, fd)
                    _remove(folder, file, _is_connection_file)
    raise ClusterError(f"{file} cannot be written: others write it all the time\n  Next step: name another file")


def _rename_to_new(folder: int, made: str, name: str) -> None:
    """Rename a file, if nothing has the new name; the old one may stay, too.

    Raises:
        FileExistsError: If something has it.
    """
    try:
        os.link(made, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links: an empty file holds the name first.
        os.close(os.open(name, _MAKE, 0o600, dir_fd=folder))
        os.rename(made, name, src_dir_fd=folder, dst_dir_fd=folder)


def read(path: str | os.PathLike[str], engine: str, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read what another process has written.

    Args:
        path: The file.
        engine: The name of the cluster's class.
        shape: What the engine needs to find in it, as `check_shape` takes it.

    Returns:
        What was written.

    Raises:
        ClusterError: If there is no such file, it is not this user's own, others may read it, or it is of another kind.
    """
    file = expanded(path)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ClusterError(
            f"no such connection file: {file}\n"
            "  Next step: check that the cluster still runs; the file is removed when it ends"
        ) from None
    except OSError as error:
        raise ClusterError(f"the connection file {file} cannot be read: {error.strerror}") from None
    try:
        _check(file, os.fstat(fd))
        text = os.read(fd, _MOST)
    finally:
        os.close(fd)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ClusterError(f"{file} is not a connection file of this version of lazycluster")
    if document.get("engine") != engine:
        raise ClusterError(f"{file} is of a {document.get('engine')}, not of a {engine}")
    try:
        check_shape(document, shape or {})
    except ValueError as error:
        raise unusable(file, str(error)) from None
    return document


def unusable(path: str | os.PathLike[str], why: str) -> ClusterError:
    """Return the error for a document that has another shape, as those of other versions may have."""
    return ClusterError(
        f"the connection file {path} cannot be used: {why}; another version of lazycluster may have written it\n"
        "  Next step: connect with the version that started the cluster, or start it again with this one"
    )


def unanswered(path: str | os.PathLike[str], found: Mapping[str, Any], why: str) -> ClusterError:
    """Return the error for a cluster that does not answer."""
    process = f"the process {found['manager']}" if "manager" in found else "the process"
    return ClusterError(
        f"the cluster of {path} does not answer: {why}\n"
        f"  Next step: see whether {process}, which started it, still runs"
    )


def _check(file: Path, inode: os.stat_result) -> None:
    if not stat.S_ISREG(inode.st_mode):
        raise ClusterError(f"{file} is not a file")
    if inode.st_uid != os.geteuid():
        raise ClusterError(f"the connection file {file} belongs to another user: it is not trusted")
    if inode.st_mode & 0o077:
        raise ClusterError(
            f"others can read the connection file {file}, and its secrets\n"
            f"  Next step: end the cluster and start a new one; keep its file to yourself (chmod 600)"
        )


def remove(path: Path, owner: str) -> None:
    """Remove a file that a cluster has written, unless something else has taken its place."""
    with contextlib.suppress(OSError, ClusterError), _folder_of(path) as folder:
        _remove(folder, path, lambda document: document.get("owner") == owner)


def _remove(folder: int, file: Path, accept: _Accept) -> None:
    """Remove a file, if what it holds is accepted."""
    if not _holds(folder, file, accept):
        return
    aside = file.with_name(_hidden(file.name))
    try:
        os.rename(file.name, aside.name, src_dir_fd=folder, dst_dir_fd=folder)
    except FileNotFoundError:
        return
    # Nobody else knows this name: what has it now keeps it.
    if _holds(folder, aside, accept):
        os.unlink(aside.name, dir_fd=folder)
    else:
        _put_back(folder, aside, file)


def _holds(folder: int, file: Path, accept: _Accept) -> bool:
    """Tell whether there is a file whose content is accepted."""
    with contextlib.suppress(OSError, ClusterError), _opened(folder, file) as fd:
        return fd is not None and accept(_content(fd))
    return False


def _put_back(folder: int, aside: Path, file: Path) -> None:
    """Give its name back to what had taken it just before it was moved aside."""
    try:
        if stat.S_ISDIR(os.stat(aside.name, dir_fd=folder, follow_symlinks=False).st_mode):
            # It has no second name; it takes the place of nothing but an empty directory.
            os.rename(aside.name, file.name, src_dir_fd=folder, dst_dir_fd=folder)
            return
        _rename_to_new(folder, aside.name, file.name)
    except OSError as error:
        # A connection file whose name another one has by now has been replaced, as if it had kept it.
        if not _holds(folder, aside, _is_connection_file):
            raise ClusterError(f"{file} was replaced by others meanwhile; one of their files is {aside} now") from error
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside.name, dir_fd=folder)
