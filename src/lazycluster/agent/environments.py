"""One Python environment on the host: found, built, compiled, in use, and which may be removed.

Below one root there are `envs/<id>` (the environments), `envs/<id>.build` and `envs/<id>.use` (locks, which end with
whoever holds them), `wheels/<sha256>` (packages that were sent), `uv` and `cache` (the installer and what it unpacked),
`python` (interpreters that were sent). The file `MARKER` says that the root is one of ours. Somebody else's files may
lie there nevertheless: only what carries our manifest, or a name that nobody else gives, is listed, used or removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import time

from .deletion import remove_tree
from .environment_program import MANIFEST
from .ownership import check, make
from .paths import meant, trusts_group

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

    from .server import Agent
    from .session import RequestChannel

LOCK_FILE = "pylock.lazycluster.toml"  # in an environment: what is to be in it
MARKER = ".lazycluster-environments"
_ID = re.compile(r"py\d{2,3}-[0-9a-f]{12,64}")
_WHEEL = re.compile(r"[0-9a-f]{16,64}")
_PARTS = ("cache", "envs", "python", "uv", "wheels")
# What a directory has that is a file system of its own, and what is kept for environments of others: agent/bytecode.
_EMPTY = {"lost+found", "bytecode"}
_RUN_FROM = ("build", "find", "survey", "wheels")
_WAIT = 0.1  # seconds between two tries for a lock that somebody else has
_ST_NOEXEC = 8
_MOST_COMPILERS = 8  # processes at once


class AgentEnvironments:
    """The environments that an agent has to do with.

    Attributes:
        compiling: Environment -> who waits until its modules are compiled.
    """

    def __init__(self, agent: Agent) -> None:
        self._used: Dict[str, int] = {}  # environment -> descriptor whose lock says that it is in use
        self.compiling: Dict[str, List[Callable[[], Any]]] = {}

    def use(self, prefix: str) -> Optional[str]:
        """Mark one as in use until the agent ends; returns why it cannot be used, None if it can."""
        if read_manifest(prefix) is None:
            return "missing"
        if prefix not in self._used:
            fd = _lock_in_use(prefix)
            if fd is None:
                return "being removed"
            self._used[prefix] = fd
        problem = damage(prefix)
        if problem is None:
            try:
                os.utime(prefix + ".use")  # the time of the last use
            except OSError:
                pass
            return None
        os.close(self._used.pop(prefix))
        return problem


def environment(channel: RequestChannel) -> None:
    """Handle the request `environment`; `action` says what."""
    action = str(channel.params.get("action"))
    handler = _ACTIONS.get(action)
    if handler is None:
        channel.fail("value", "unknown action {!r}".format(action))
        return
    try:
        if action in _RUN_FROM:
            _check_owner(channel)
        handler(channel)
    except NotOursError as error:
        channel.fail("value", str(error))


def _check_owner(channel: RequestChannel) -> None:
    """Check that nobody else has put there what will be run, as far as it is there."""
    root = root_of(channel)
    for path in (root, *(os.path.join(root, part) for part in _PARTS)):
        if os.path.lexists(path):
            check(path, trusts_group(channel))


def root_of(channel: RequestChannel) -> str:
    """Return the directory that everything is in."""
    return meant(channel.params.get("root") or "~/.cache/lazycluster", "", {})


# --- what is ours --------------------------------------------------------------------------------
class NotOursError(Exception):
    """A directory in which we neither make nor remove anything; its text says why, and what to do."""


def claim(root: str, make: bool = False) -> None:
    """Make sure that a root is ours, and mark it unless it is marked.

    It is ours if it is marked, or if an earlier version that did not mark it has made environments there.

    Args:
        root: The directory.
        make: Make it if it is missing, and take it if it is empty.

    Raises:
        NotOursError: If there is something else.
        OSError: If it cannot be made or read.
    """
    names = _names_in_root(root, make)
    if MARKER in names or not (names or make):
        return
    if names and not _made_before(root):
        raise NotOursError(
            "{0} is not empty, and not known as a directory for environments of lazycluster: nothing in it is touched. "
            "Name one that is empty or does not exist; or, if it is one nevertheless, mark it: touch {0}/{1}".format(
                root, MARKER
            )
        )
    _mark(root, exclusive=names.issubset(_PARTS))


def _names_in_root(root: str, make: bool) -> Set[str]:
    if make:
        os.makedirs(root, mode=0o700, exist_ok=True)
    try:
        names = set(os.listdir(root)) - _EMPTY
    except FileNotFoundError:
        return set()
    # Looked at afterwards: whoever makes a root marks it before anything else.
    return names | {MARKER} if _is_file(os.path.join(root, MARKER)) else names - {MARKER}


def _mark(root: str, exclusive: bool) -> None:
    """Mark a root; `exclusive` says that there is nothing in it but what we have made."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(os.path.join(root, MARKER), flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return  # somebody else was faster, or it may only be read
    with open(fd, "w", encoding="ascii") as file:
        json.dump({"format": 1, "exclusive": exclusive}, file)


def is_exclusive(root: str) -> bool:
    """Return whether nobody but us had anything in a root when it was marked."""
    return bool((_read_json(os.path.join(root, MARKER)) or {}).get("exclusive"))


def _made_before(root: str) -> bool:
    """Return whether environments were made in a root that is not marked: there is one, or the lock of one."""
    envs = os.path.join(root, "envs")
    for name in os.listdir(envs) if os.path.isdir(envs) else ():
        path = os.path.join(envs, name)
        if is_ours(path) or is_lock(path):
            return True
    return False


def is_lock(path: str) -> bool:
    """Return whether a file is the lock of an environment."""
    stem, suffix = os.path.splitext(os.path.basename(path))
    named = suffix in (".build", ".use") and _ID.fullmatch(stem)
    return bool(named) and _is_file(path) and os.lstat(path).st_size == 0


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def is_ours(prefix: str) -> bool:
    """Return whether a directory is an environment that we have made: it has our name and our manifest."""
    named = _ID.fullmatch(os.path.basename(prefix)) is not None
    return named and not os.path.islink(prefix) and read_manifest(prefix) is not None


def unfinished(envs: str, name: str = "") -> Iterator[Tuple[str, str]]:
    """Yield (name of the environment, path) of what builds and removals have left that were killed.

    Args:
        envs: Where environments are.
        name: Only that of this environment.
    """
    for entry in os.listdir(envs) if os.path.isdir(envs) else ():
        of = entry[1:].partition(".")[0].rpartition("-")[0]
        if entry.startswith(".") and name in ("", of) and is_lock(os.path.join(envs, of + ".build")):
            yield of, os.path.join(envs, entry)


def wheels(root: str) -> Iterator[Tuple[str, str]]:
    """Yield (name, path) of each package that was sent: a directory named by a hash, with nothing but files in it."""
    store = os.path.join(root, "wheels")
    for name in os.listdir(store) if os.path.isdir(store) else ():
        path = os.path.join(store, name)
        named = _WHEEL.fullmatch(name) and not os.path.islink(path) and os.path.isdir(path)
        if named and all(_is_package(os.path.join(path, entry)) for entry in os.listdir(path)):
            yield name, path


def _is_package(path: str) -> bool:
    return path.endswith((".whl", ".part")) and _is_file(path)


# --- what is there -------------------------------------------------------------------------------
def facts() -> Dict[str, Any]:
    """Return what decides which packages fit."""
    try:
        libc = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, ValueError, OSError):
        libc = []
    return {"system": sys.platform, "machine": os.uname().machine, "libc": libc or ["musl", ""]}


def _facts(channel: RequestChannel) -> None:
    channel.result(root=root_of(channel), **facts())


def _find(channel: RequestChannel) -> None:
    prefix = _prefix(channel)
    problem = channel.agent.shared(AgentEnvironments).use(prefix)
    if problem is None:
        _compile(channel, prefix)
        channel.result(found=True, prefix=prefix)
    else:
        channel.result(found=False, prefix=prefix, problem=problem)


def _survey(channel: RequestChannel) -> None:
    from .environment_survey import survey
    from .offload import offload

    params, root = channel.params, root_of(channel)
    offload(channel, lambda: survey(params["wanted"], params["addresses"], params.get("env") or {}, root))


def _prefix(channel: RequestChannel) -> str:
    name = str(channel.params["id"])
    if not _ID.fullmatch(name):
        raise ValueError("not the name of an environment: {!r}".format(name))
    return os.path.join(root_of(channel), "envs", name)


def _lock_in_use(prefix: str) -> Optional[int]:
    try:
        return lock(prefix + ".use", fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    # It was made for this user by somebody else, who sees to it that it stays.
    return os.open(prefix, os.O_RDONLY | os.O_CLOEXEC)


def damage(prefix: str) -> Optional[str]:
    """Return what is wrong with an environment, as far as that can be seen quickly."""
    manifest = read_manifest(prefix)
    if manifest is None:
        return "missing"
    python = os.path.join(prefix, "bin", "python")
    if not os.access(python, os.X_OK):
        return "its interpreter {} is missing".format(os.path.realpath(python))
    if listing(prefix) != manifest.get("listing"):
        return "its packages were changed"
    return None


def listing(prefix: str) -> List[Any]:
    """Return what lies in the directories of packages, in short."""
    import zlib

    found: List[Any] = []
    lib = os.path.join(prefix, "lib")
    for name in sorted(os.listdir(lib)) if os.path.isdir(lib) else ():
        try:
            names = sorted(entry for entry in os.listdir(os.path.join(lib, name, "site-packages")))
        except OSError:
            continue
        names = [entry for entry in names if entry != "__pycache__"]
        found.append([name, len(names), zlib.crc32("\n".join(names).encode("utf-8", "surrogateescape"))])
    return found


def read_manifest(prefix: str) -> Optional[Dict[str, Any]]:
    """Return what is said of a complete environment, None if it is not one of ours."""
    found = _read_json(os.path.join(prefix, MANIFEST))
    if found is None or "listing" not in found or found.get("id", os.path.basename(prefix)) != os.path.basename(prefix):
        return None
    return found


def _read_json(path: str) -> Optional[Dict[str, Any]]:
    """Return the object in a file, None if there is no such file, or something else than a file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="utf-8") as file:
            found = json.load(file) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def lock(path: str, kind: int) -> Optional[int]:
    """Return a descriptor that holds a lock, None if somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    return fd


# --- making one ----------------------------------------------------------------------------------
def _build(channel: RequestChannel) -> None:
    _Build(channel, root_of(channel), _prefix(channel))


class _Build:
    """Holds the lock of an environment, and the directory in which it is made, until the manager says that it is done.

    Whatever ends the channel before ends this, too, and removes what there is.
    """

    def __init__(self, channel: RequestChannel, root: str, prefix: str) -> None:
        self._channel, self._root, self._prefix = channel, root, prefix
        self._directory = ""
        self._lock: Optional[int] = None
        self._timer: Any = None
        self._told = False
        channel.on_abandon = self._abandon
        channel.on_control = self._control
        try:
            trusted = trusts_group(channel)
            make(root, 0o700, trusted)
            claim(root, make=True)  # before there are parts, by which a root of an earlier version is known
            for part in _PARTS:
                if part != "wheels":
                    make(os.path.join(root, part), 0o700, trusted)
            if getattr(os.statvfs(root), "f_flag", 0) & _ST_NOEXEC:
                channel.fail("noexec", "{} is on a file system from which nothing can be run (noexec)".format(root))
                return
            self._try()
        except OSError as error:
            channel.fail("os", "{}: {}".format(error.strerror, error.filename or root), errno=error.errno)

    def _try(self) -> None:
        self._timer = None
        self._lock = lock(self._prefix + ".build", fcntl.LOCK_EX)
        if self._lock is None:
            if not self._told:
                self._told = True
                self._channel.event(state="waiting")
            self._timer = self._channel.loop.call_later(_WAIT, self._again)
            return
        problem = self._channel.agent.shared(AgentEnvironments).use(self._prefix)
        if problem is None:
            self._release()
            _compile(self._channel, self._prefix)
            self._channel.result(found=True, prefix=self._prefix)
            return
        import tempfile

        envs, name = os.path.split(self._prefix)
        remove_unfinished(envs, name)
        self._directory = tempfile.mkdtemp(prefix=".{}-".format(name), dir=envs)
        self._channel.event(
            state="building", directory=self._directory, problem=problem, free=shutil.disk_usage(envs).free
        )

    def _again(self) -> None:
        try:
            self._try()
        except OSError as error:
            self._fail(error)

    def _control(self, message: Dict[str, Any]) -> None:
        if "finish" not in message or not self._directory:
            return
        try:
            self._finish(message["finish"])
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._abandon()
        self._channel.fail("os", "{}: {}".format(error.strerror, error.filename), errno=error.errno)

    def _finish(self, manifest: Dict[str, Any]) -> None:
        made, self._directory = self._directory, ""
        manifest.update(id=os.path.basename(self._prefix), listing=listing(made), made=time.time())
        try:
            with open(os.path.join(made, MANIFEST), "w", encoding="utf-8") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            old = self._move_aside(made)
            os.rename(made, self._prefix)
        except OSError:
            remove_tree(made)
            raise
        if old:
            remove_tree(old)
        problem = self._channel.agent.shared(AgentEnvironments).use(self._prefix)
        self._release()
        if problem is None:
            _compile(self._channel, self._prefix)
            self._channel.result(found=False, prefix=self._prefix)
        else:
            self._channel.fail("damaged", problem)

    def _move_aside(self, made: str) -> str:
        """Rename what has the name of the environment; returns what is to be removed, if anything."""
        if not os.path.lexists(self._prefix):
            return ""
        # One that is damaged may have lost its manifest, or what is in it.
        if any(_is_file(os.path.join(self._prefix, name)) for name in (MANIFEST, LOCK_FILE)):
            os.rename(self._prefix, made + ".old")
            return made + ".old"
        kept = "{}.replaced-{}".format(self._prefix, os.urandom(4).hex())
        os.rename(self._prefix, kept)
        self._channel.event(state="kept", path=kept)
        return ""

    def _abandon(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._directory:
            remove_tree(self._directory)
            self._directory = ""
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_unfinished(envs: str, name: str) -> None:
    """Remove what builds of an environment have left that were killed; the caller holds its lock."""
    for _, path in unfinished(envs, name):
        remove_tree(path)


# --- compiling its modules -----------------------------------------------------------------------
def _compile(channel: RequestChannel, prefix: str) -> None:
    """Have the modules of an environment compiled, unless they are, beside all else that goes on."""
    from .commands import marked_environment
    from .environment_program import command, wants_compiling
    from .host_info import cpu_cores
    from .processes import spawn

    lock_fd = wants_compiling(prefix, read_manifest(prefix) or {})
    if lock_fd < 0:
        return
    count = max(1, min(_MOST_COMPILERS, cpu_cores() // 2))
    argv = command(os.path.join(prefix, "bin", "python"), "compile", prefix, count, lock_fd)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        pid = spawn(argv, marked_environment(channel, dict(os.environ)), "/", null, null, null, [lock_fd])
    except OSError:
        return  # it is no more than a favour
    finally:
        os.close(null)
        os.close(lock_fd)
    compiling = channel.agent.shared(AgentEnvironments).compiling
    compiling[prefix] = []

    def ended(status: int) -> None:
        for then in compiling.pop(prefix):
            then()

    channel.loop.on_exit(pid, ended)


def _compiled(channel: RequestChannel) -> None:
    """Tell when the modules of an environment have been compiled, as far as this agent sees to it."""
    prefix = _prefix(channel)
    compiling = channel.agent.shared(AgentEnvironments).compiling

    def tell() -> None:
        channel.result(compiled=bool((read_manifest(prefix) or {}).get("compiled")))

    if prefix in compiling:
        compiling[prefix].append(tell)
    else:
        tell()


# --- packages that are sent ----------------------------------------------------------------------
def _wheels(channel: RequestChannel) -> None:
    """Tell which packages have to be sent."""
    store = os.path.join(root_of(channel), "wheels")
    missing = []
    for folder, name, size in channel.params["wheels"]:
        if not _WHEEL.fullmatch(folder) or "/" in name:
            raise ValueError("not the name of a package: {!r}".format(os.path.join(folder, name)))
        path = os.path.join(store, folder, name)
        try:
            there = os.stat(path).st_size == size
        except OSError:
            there = False
        if there:
            os.utime(path[: -len(name)])  # the time of the last use; the file's own is what the installer looks at
        else:
            missing.append(folder)
    if missing:
        make(store, 0o700, trusts_group(channel))
    channel.result(missing=missing, directory=store)


_ACTIONS: Dict[str, Callable[[RequestChannel], None]] = {
    "facts": _facts,
    "find": _find,
    "survey": _survey,
    "build": _build,
    "wheels": _wheels,
    "compiled": _compiled,
}
