"""Names and records of what goes on when its starter ends: clusters in the background, and detached work.

Each has a directory below the state directory, which survives logout and restart, unlike ``$XDG_RUNTIME_DIR`` and
``/tmp``. Names are shared by both kinds. Whether a cluster is alive is told by a lock that its process holds, never by
a process id, which may be another process's by now. Homes may be shared by machines: a record says of which it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from lazycluster.core import unix
from lazycluster.exceptions import LazyclusterError
from lazycluster.utils import default_directory, private_directory

__all__ = [
    "Claim",
    "Kind",
    "Named",
    "NamedRecord",
    "all_named",
    "checked_name",
    "claim",
    "find",
    "machine_id",
]

Kind = Literal["cluster", "work"]

LOG, SOCKET, LOGS, MODULES = "log", "socket", "logs", "modules"
"""Names in the directory of a cluster, beside its record: its own log, its socket, the logs of its processes, and the
version of the modules that programs have had sent to its hosts."""

_DIRECTORY = "background"
_RECORD, _LOCK = "record.json", "lock"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
_LARGEST = 1024 * 1024  # bytes of a record
_KEPT = 30 * 86400.0  # seconds for which the record of a cluster that has ended is kept
_TRIES = 100  # as many others may claim and give up a name in the same moment
_LOOKING = 0.5  # seconds for those who only look whether a name is held, which takes them microseconds
_AGAIN = 0.01  # seconds between two tries to lock
_LATEST = 253_370_764_800.0  # seconds from 1970 to the year 9999: later dates cannot be shown
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class _DamagedError(LazyclusterError):
    def __init__(self, file: Path, why: str, step: str) -> None:
        super().__init__(f"{file} is damaged: {why}\n  Next step: {step}")


class _FullError(OSError):
    """Error of a state directory in which nothing can be written."""

    def __str__(self) -> str:
        return (
            f"{self.filename} cannot be written: {self.strerror}\n"
            "  Next step: make room there, or have XDG_STATE_HOME name a directory that can be written to"
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _FullError(error.errno, error.strerror, str(path)) from None
        raise


@dataclass(frozen=True)
class NamedRecord:
    """Record of something that has a name. It holds no secret.

    Attributes:
        kind: ``cluster`` or ``work``.
        name: Its name.
        machine: The machine on which it was started, see `machine_id`.
        boot: Which start of that machine, see `unix.boot_id`; "" if the system does not tell.
        host: The name of that machine.
        started: When, in seconds since 1970.
        state: ``starting``, ``running``, ``ending``, ``ended`` (by itself, see `reason`) or ``failed``.
        reason: Why it has ended.
        pid: Its process, for a cluster.
        process_started: What tells that process from a later one of the same number.
        until: When it ends by itself, in seconds since 1970; None: not at a certain time.
        details: What else is known, as JSON can hold it: depends on the kind.
    """

    kind: Kind
    name: str
    machine: str = ""
    boot: str = ""
    host: str = ""
    started: float = 0.0
    state: str = "starting"
    reason: str = ""
    pid: int | None = None
    process_started: int | None = None
    until: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(cls, kind: Kind, name: str, **details: Any) -> NamedRecord:
        """Return a record of something that starts now, on this machine."""
        return cls(kind, name, machine_id(), unix.boot_id(), socket.gethostname(), started=time.time(), details=details)

    @property
    def is_of_another_boot(self) -> bool:
        """True if this machine was restarted since."""
        return bool(self.boot and unix.boot_id() and self.boot != unix.boot_id())


@dataclass(frozen=True)
class Named:
    """Something that has a name, as it is found in the state directory.

    Attributes:
        name: Its name.
        path: Its directory.
        record: Its record; None if that is damaged, or not written yet.
        is_held: True if a process of it is alive, which holds the lock.
        problem: What is damaged, or why it is not trusted, with the next step; "" if all is well.
    """

    name: str
    path: Path
    record: NamedRecord | None
    is_held: bool
    problem: str = ""

    @property
    def is_elsewhere(self) -> bool:
        """True if it was started on another machine that has the same home directory."""
        record = self.record
        if record is None:
            return False
        # Machines that are copies of each other have the same number.
        is_copy = record.is_of_another_boot and record.host != socket.gethostname()
        return record.machine != machine_id() or is_copy

    @property
    def gone(self) -> str:
        """Reason why a cluster is not there any more; "" if it is, or if only another machine can tell."""
        record = self.record
        if self.is_held:
            return ""
        if record is None:
            return self.problem.partition("\n")[0]
        if record.state in ("ended", "failed"):
            return record.reason or record.state
        if self.is_elsewhere:
            return ""
        if record.is_of_another_boot:
            return "the machine was restarted"
        return "its process was killed"

    def write(self, **changes: Any) -> None:
        """Write its record anew, with some changes; for work, which is held by no process.

        Raises:
            OSError: If it cannot be written.
        """
        if self.record is not None:
            _write(self.path, replace(self.record, **changes))

    def remove(self) -> bool:
        """Forget it, unless it is alive; its name can be used anew.

        Returns:
            Whether it was removed.
        """
        lock = _locked(self.path)
        if lock is None:
            return not self.path.exists()
        _remove(self.path, lock)
        return True


class Claim:
    """A name that is held by this process, and by whoever gets `fd` from it.

    Attributes:
        name: The name.
        path: The directory of what has it.
        fd: The descriptor with the lock. The name is free when it is closed everywhere.
        record: What was written last.
    """

    def __init__(self, name: str, path: Path, fd: int, record: NamedRecord) -> None:
        self.name, self.path, self.fd, self.record = name, path, fd, record

    @classmethod
    def inherited(cls, name: str, fd: int) -> Claim:
        """Return the claim that another process has handed to this one by a descriptor.

        Raises:
            LazyclusterError: If there is no record.
        """
        os.set_inheritable(fd, False)
        path = directory() / name
        record = _read(path)
        if record is None:
            raise LazyclusterError(f"{path} holds no record of {name!r}")
        return cls(name, path, fd, record)

    def is_lost(self) -> bool:
        """Return whether its directory was removed or is another's now; not if that merely cannot be seen."""
        try:
            return not os.path.samestat((self.path / _LOCK).lstat(), os.fstat(self.fd))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def write(self, **changes: Any) -> None:
        """Write the record, with some changes.

        Raises:
            OSError: If it cannot be written, or the claim is lost.
        """
        self.record = replace(self.record, **changes)
        if self.is_lost():
            raise FileNotFoundError(errno.ENOENT, "it was removed, or another has the name now", str(self.path))
        _write(self.path, self.record)

    def close(self) -> None:
        """Leave the name to whoever else holds it; the record stays."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Give the name back, and remove the directory with all that it holds, unless the claim is lost."""
        if self.is_lost():
            self.close()
            return
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _remove(self.path, fd)


def directory() -> Path:
    """Return the state directory of what has names; it need not exist."""
    return default_directory() / _DIRECTORY


def checked_name(name: object) -> str:
    """Return a name if it can be one.

    Raises:
        TypeError: If it is no text.
        ValueError: If it has other characters, or is too long.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name must be a string, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a name: it begins with a letter, and has letters, digits and ._- after it, 63 in all"
        )
    return name


def claim(record: NamedRecord) -> Claim:
    """Take a name for something new, and write its record.

    The record of a cluster that is not there any more is replaced.

    Args:
        record: What is written of it.

    Raises:
        ValueError: If the name cannot be one.
        LazyclusterError: If something has the name, or what is there is damaged.
        OSError: If it cannot be written, or others could have written what is there.
    """
    name = checked_name(record.name)
    path = directory() / name
    with _writing(path):
        private_directory(_DIRECTORY, main=default_directory())
        _forget_old()
        for _ in range(_TRIES):
            private_directory(_DIRECTORY, name, main=default_directory())
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                _check_own(path)
            try:
                lock = _locked(path)
            except BaseException:
                with contextlib.suppress(OSError):  # it is not empty, so was there before
                    path.rmdir()
                raise
            if lock is not None:
                return _replaced(name, path, lock, record)
            if path.exists():
                raise _taken(find(name), name)
    raise LazyclusterError(f"the name {name!r} cannot be taken: others take it and give it back all the time")


def _replaced(name: str, path: Path, lock: int, record: NamedRecord) -> Claim:
    """Write the record of something new; what had the name before is there until that is done."""
    before = None
    try:
        with contextlib.suppress(_DamagedError):
            before = _read(path)
        named = Named(name, path, before, False)
        if before is None:
            _empty(path)
        elif (named.is_elsewhere and not named.gone) or before.kind == "work":
            raise _taken(named, name)
        _write(path, record)
        _empty(path, but=_RECORD)
    except BaseException:
        if before is None:
            with contextlib.suppress(OSError):
                _remove(path, lock)
        else:
            os.close(lock)
        raise
    return Claim(name, path, lock, record)


def _taken(found: Named | None, name: str) -> LazyclusterError:
    record = found.record if found is not None else None
    if record is None:
        return LazyclusterError(f"{name!r} is being started or ended just now\n  Next step: lazycluster ls")
    if found is not None and found.is_elsewhere:
        return LazyclusterError(
            f"there is a {record.kind} {name!r} already, which was started on {record.host}\n"
            f"  Next step: end it there, or if that machine is no more: lazycluster down {name} --forget"
        )
    if record.kind == "work":
        return LazyclusterError(f"there is detached work {name!r} already\n  Next step: lazycluster rm {name}")
    return LazyclusterError(
        f"there is a cluster {name!r} already, which is {record.state}\n"
        f'  Next step: lazycluster.connect("{name}") uses it, lazycluster down {name} ends it'
    )


def find(name: str) -> Named | None:
    """Return what has a name, None if nothing has.

    Raises:
        ValueError: If the name cannot be one.
        PermissionError: If others could have written what is there.
    """
    return _look(directory() / checked_name(name))


def all_named() -> list[Named]:
    """Return all that has a name, in the order of the names; what is damaged says so, and hides no other.

    Raises:
        PermissionError: If others could have written to the state directory.
    """
    try:
        _check_own(directory())
        names = sorted(entry.name for entry in os.scandir(directory()) if _NAME.fullmatch(entry.name))
    except FileNotFoundError:
        return []
    found = []
    for path in (directory() / name for name in names):
        try:
            found.append(_look(path))
        except OSError as error:
            found.append(Named(path.name, path, None, False, str(error)))
    return [one for one in found if one is not None]


def _look(path: Path) -> Named | None:
    try:
        _check_own(path.parent)
        _check_own(path)
    except FileNotFoundError:
        return None
    record, is_held, problem = None, False, ""
    try:
        record = _read(path)
    except _DamagedError as error:
        problem = str(error)
    try:
        is_held = _is_held(path)
    except _DamagedError as error:
        record, problem = None, str(error)
    if record is None and not is_held and not problem:  # whoever took the name was killed before it was written down
        return None
    return Named(path.name, path, record, is_held, problem)


def _check_own(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{path} is not a directory that is yours alone (mode 0700): it is not trusted\n"
            f"  Next step: look at what it holds, and remove it: rm -r {shlex.quote(str(path))}"
        )


def machine_id() -> str:
    """Return what tells this machine from others that have the same home directory."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if found := Path(path).read_text("ascii").strip():
                return found
    return socket.gethostname()


# --- files ---------------------------------------------------------------------------------------
def _opened(path: Path, name: str, flags: int) -> int:
    """Open a file of a directory of the state directory, which waits for nothing whatever it is.

    Raises:
        LazyclusterError: If it is not a regular file that can be opened.
        OSError: If it is not there, or there is no room for it.
    """
    step = f"look at it, and remove it: rm -r {shlex.quote(str(path))}"
    irregular = _DamagedError(path / name, "it is not a regular file", step)
    try:
        fd = os.open(path / name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise irregular from None
        if error.errno == errno.EACCES:
            raise _DamagedError(path / name, str(error.strerror), step) from None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise irregular


def _locked(path: Path) -> int | None:
    """Lock a directory of the state directory; None if another process has it locked, or it has just been removed.

    Raises:
        LazyclusterError: If the file system has no locks, or the lock is damaged.
    """
    try:
        fd = _opened(path, _LOCK, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        return None
    try:
        if _lock(fd) and os.path.samestat(os.fstat(fd), (path / _LOCK).lstat()):
            return fd
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _lock(fd: int) -> bool:
    end = time.monotonic() + _LOOKING
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(_AGAIN)
        except OSError as error:
            raise LazyclusterError(
                f"the file system of {directory()} has no locks: {error.strerror}\n"
                "  Next step: have XDG_STATE_HOME name a directory on a local disk"
            ) from None


def _is_held(path: Path) -> bool:
    try:
        fd = _opened(path, _LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who look do not see each other
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _read(path: Path) -> NamedRecord | None:
    """Return the record in a directory; None if there is none.

    Raises:
        LazyclusterError: If it is damaged.
    """
    step = f"lazycluster down {path.name} forgets it"
    try:
        with os.fdopen(_opened(path, _RECORD, os.O_RDONLY), "rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _DamagedError(path / _RECORD, error.strerror or str(error), step) from None
    try:
        found: Any = json.loads(content)
        # Another version may have written more, or less.
        known = {one.name: found[one.name] for one in fields(NamedRecord) if one.name in found}
        record = NamedRecord(**known)
    except (ValueError, TypeError, RecursionError):
        raise _DamagedError(path / _RECORD, "it is not a record", step) from None
    if wrong := _wrong_value(record, path.name):
        raise _DamagedError(path / _RECORD, f"its {wrong!r} makes no sense", step)
    return record


def _wrong_value(record: NamedRecord, name: str) -> str:
    """Return the name of a value that cannot be meant; "" if all can."""
    for text in ("kind", "machine", "boot", "host", "state", "reason"):
        if not isinstance(getattr(record, text), str):
            return text
    for number in ("pid", "process_started"):
        if type(getattr(record, number)) not in (int, type(None)):
            return number
    if not _is_moment(record.started):
        return "started"
    if record.until is not None and not _is_moment(record.until):
        return "until"
    if record.name != name:
        return "name"
    return "" if isinstance(record.details, dict) else "details"


def _is_moment(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < _LATEST


def _write(path: Path, record: NamedRecord) -> None:
    new = path / f".{_RECORD}.{secrets.token_hex(4)}"
    with _writing(path):
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                json.dump(asdict(record), file)
            new.replace(path / _RECORD)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _empty(path: Path, but: str = _LOCK) -> None:
    """Remove what is in a directory, but for the lock, and something else."""
    for entry in [entry for entry in path.iterdir() if entry.name not in (_LOCK, but)]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _remove(path: Path, lock: int) -> None:
    """Remove a directory whose lock is held; who waits for the lock finds another file in its place, or none."""
    try:
        _empty(path)
        (path / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody takes the name at this moment
            path.rmdir()
    finally:
        os.close(lock)


def _forget_old() -> None:
    """Forget clusters that have ended long ago, so that the directory does not grow for ever."""
    with contextlib.suppress(OSError):
        for found in all_named():
            record = found.record
            if record is not None and record.kind == "cluster" and found.gone and _age(found.path) > _KEPT:
                found.remove()


def _age(path: Path) -> float:
    return time.time() - (path / _RECORD).lstat().st_mtime
