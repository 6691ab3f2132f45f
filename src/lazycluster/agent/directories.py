"""Private directories: where agents and managers make theirs, and what those hold that tells one from another."""

from __future__ import annotations

import _socket as socket  # the module proper takes as long to import as all others together
import errno
import fcntl
import os
import stat

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, List, Sequence, Tuple

PREFIX = "lazycluster-"
SOCKET = "agent.sock"
HOST_FILE = "host"  # names the host that a directory belongs to: several may share the file system that it is on
LONGEST = 60  # bytes of the path of what an agent's directory is in: that of the socket in it must be short
_FURTHER_FILE = "further"
_ROOM = 64 * 1024  # bytes that there must be room for: a file system that takes a name and no contents is of no use
_PROBE = "room"
_UNSUITABLE = "not an absolute path of at most {} bytes, as sockets need"
_NOBODY = 65534  # whom the system names where it knows no user of that number


def parent_directories() -> List[str]:
    """Return where an agent's private directory may be, in order.

    The path of a socket in it must be short, so the usual directories come before the user's own.
    """
    found = ["/tmp", os.environ.get("TMPDIR", ""), "/var/tmp", "/dev/shm", os.environ.get("XDG_RUNTIME_DIR", "")]  # noqa: S108
    return list(dict.fromkeys(parent for parent in found if parent))


def private_directory(candidates: Sequence[str], longest: int, prepare: Callable[[str], Any]) -> str:
    """Make a directory for this user only, in the first directory that has room for what belongs into it.

    Nothing is left in those that have not.

    Args:
        candidates: The directories to make it in, in order.
        longest: How many bytes the path of such a directory may have.
        prepare: Makes what the directory is to hold from its beginning, and fails where that is not possible.

    Raises:
        OSError: No directory will do; each is named with the reason.
    """
    errors = []
    for parent in candidates:
        # The links that lead there may be others'.
        real = os.path.realpath(parent)
        path = os.path.join(real, PREFIX + os.urandom(6).hex())
        try:
            if len(os.fsencode(real)) > longest or not os.path.isabs(parent):
                raise OSError(errno.ENAMETOOLONG, _UNSUITABLE.format(longest))
            is_safe(real)
            os.mkdir(path, 0o700)
            try:
                os.chmod(path, 0o700)  # the umask may have taken away what this user needs
                _fill(os.path.join(path, _PROBE))
                prepare(path)
                return path
            except BaseException:
                _discard(path)
                raise
        except OSError as error:
            errors.append("{}: {}".format(parent, error.strerror or error))
    raise OSError("; ".join(errors))


def hold(directory: str) -> int:
    """Keep a directory from being removed for its age, as long as the descriptor that this returns is open.

    systemd-tmpfiles removes what was not touched for 10 days from /tmp, unless somebody has a lock on it, or on a
    directory above it. Work may take longer.

    Returns:
        The descriptor; -1 where the file system has no locks.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return fd
    except OSError:
        os.close(fd)
        return -1


def _fill(path: str) -> None:
    """Try whether there is room for a little; only writing tells, of quotas too."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        data = bytes(_ROOM)
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)  # some file systems tell only now that they are full
    os.unlink(path)


def _discard(path: str) -> None:
    """Remove a directory that was made just now, with the few files in it."""
    try:
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)
    except OSError:
        pass  # what made the start fail may make this fail; the next agent's clean-up finds it


def is_safe(directory: str) -> bool:
    """Check that nobody else can rename or replace what this user makes in a directory, or the directory itself."""
    directory = os.path.realpath(directory)
    inode = os.stat(directory)
    owners = (0, os.getuid())
    above = directory
    while above != "/":
        above = os.path.dirname(above)
        way = os.stat(above)
        written = way.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not way.st_mode & stat.S_ISVTX
        if written or way.st_uid not in (*owners, _NOBODY):
            raise OSError(1, "others could replace " + directory)
    if inode.st_mode & stat.S_ISVTX:
        # Its owner may replace what is in it all the same; but in some containers that of /tmp is a user who is none.
        if inode.st_uid in (*owners, _NOBODY):
            return True
    elif inode.st_uid in owners and not inode.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    raise OSError(1, "others could replace what is made in it")


def listener(directory: str) -> socket.socket:
    """Return the socket at which the agent of a directory listens."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.bind(os.path.join(directory, SOCKET))
        found.listen(8)
    except OSError:
        found.close()
        raise
    return found


def listening(candidates: Sequence[str], longest: int) -> Tuple[str, socket.socket]:
    """Make an agent's directory, and listen in it.

    Raises:
        OSError: See `private_directory`.
    """
    found: List[socket.socket] = []

    def prepare(directory: str) -> None:
        note_host(directory)
        hold(directory)
        found.append(listener(directory))

    return private_directory(candidates, longest, prepare), found[0]


def every_parent_directory() -> List[str]:
    """Return all directories that those of agents may be in, also those for sessions that see no other."""
    home = os.path.expanduser("~")
    return [*parent_directories(), *([home] if os.path.isabs(home) else [])]


def further(directory: str) -> List[str]:
    """Return the other directories of the agent whose directory it is."""
    try:
        with open(os.path.join(directory, _FURTHER_FILE)) as file:
            return [line for line in file.read().splitlines() if line]
    except (OSError, ValueError):
        return []


def note_further(directory: str, others: Sequence[str]) -> None:
    """Leave word in an agent's directory which others it has, for who removes them."""
    with open(os.path.join(directory, _FURTHER_FILE), "w") as file:
        file.write("".join(other + "\n" for other in others))


def note_host(directory: str) -> None:
    """Leave word in an agent's private directory which host it is of."""
    with open(os.path.join(directory, HOST_FILE), "w") as file:
        file.write(os.uname().nodename)


def is_of_this_host(directory: str) -> bool:
    """Tell if an agent's private directory is of this host, as far as it says so."""
    try:
        with open(os.path.join(directory, HOST_FILE)) as file:
            return file.read() in ("", os.uname().nodename)
    except (OSError, ValueError):
        return True
