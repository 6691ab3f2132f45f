"""Child processes of the agent: starting them, reading what they print, and ending them with all their descendants."""

from __future__ import annotations

import errno
import os
import resource
import time

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import signal
    from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

    from .loop import Loop
    from .session import RequestChannel
else:
    import _signal as signal  # the module proper makes enumerations, for which it imports much

AGENT_MARKER = "LAZYCLUSTER_AGENT"
TASK_MARKER = "LAZYCLUSTER_TASK"
_LINE_SHOWN = 200  # characters of a command line
STAGES: Tuple[Tuple[int, float], ...] = ((signal.SIGTERM, 1.0), (signal.SIGKILL, 1.0))
_LIMITS = {
    os.strerror(errno.EAGAIN): "the limit of processes is reached: ulimit -u, or that of a control group",
    os.strerror(errno.EMFILE): "the limit of open files is reached, ulimit -n: run less at once, or raise it",
    os.strerror(errno.ENFILE): "the host's limit of open files is reached: run less at once",
}
_PAGES = 32  # of memory, that an argument or variable may take
_READ_SIZE = 128 * 1024
_PIPE_SIZE = 1024 * 1024
_RESET = [s for s in (getattr(signal, n, None) for n in ("SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGINT", "SIGTERM")) if s]


# --- /proc ---------------------------------------------------------------------------------------
def read_text(path: str) -> str:
    """Return what stands in a file, as /proc has them; empty if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def namespace(kind: str) -> str:
    """Return the name of the namespace that this process is in, of a kind such as ``pid``; empty if it has none."""
    try:
        return os.readlink("/proc/self/ns/" + kind)
    except OSError:
        return ""


def parents() -> Dict[int, int]:
    """Return pid -> parent's pid of all processes that can be seen."""
    found: Dict[int, int] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        from . import ps

        return {pid: int(fields[1]) for pid, fields in ps.fields("-A").items() if fields[0] not in (b"Z", b"X")}
    for name in names:
        if name.isdigit():
            parent = parent_of(int(name))
            if parent is not None:
                found[int(name)] = parent
    return found


def stat_fields(pid: int) -> Optional[List[bytes]]:
    """Return the fields of /proc/PID/stat from the third (the state) on; the second may hold anything."""
    try:
        with open("/proc/{}/stat".format(pid), "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        if os.path.exists("/proc/self"):
            return None
    from . import ps

    return ps.fields("-p", str(pid)).get(pid)


def parent_of(pid: int) -> Optional[int]:
    """Return the parent's pid, None if there is no such process (a zombie counts as none)."""
    fields = stat_fields(pid)
    return int(fields[1]) if fields and fields[0] not in (b"Z", b"X") else None


def start_time(pid: int) -> Optional[int]:
    """Return when a process started, in some unit: with the pid it names one process for good."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


def exists(pid: int) -> bool:
    """Tell if there is a process of that number, also if /proc hides it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True


class ChildProcess:
    """A process, told from a later one of the same number, also where /proc hides it (``hidepid``).

    Args:
        pid: Its number.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.started = start_time(pid)
        self._fd = -1
        if self.started is None:
            try:
                self._fd = os.pidfd_open(pid)
            except (AttributeError, OSError):
                pass  # Python 3.8, or an old system: its number has to do

    @property
    def alive(self) -> bool:
        """True until it has ended."""
        if self.started is not None:
            return start_time(self.pid) == self.started
        if self._fd < 0:
            return exists(self.pid)
        import select

        ended = select.poll()
        ended.register(self._fd, select.POLLIN)
        return not ended.poll(0)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.alive:
            send_signal([self.pid], number)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def descendants(roots: Iterable[int]) -> List[int]:
    """Return the living descendants of `roots`, children before grandchildren, without the roots.

    Of process 0 or 1 everything descends: those are never roots.
    """
    children: Dict[int, List[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    found: List[int] = []
    queue = [pid for pid in roots if pid > 1]
    for pid in queue:
        # Those that /proc hides: ``hidepid`` does so with what nobody may look at.
        hidden = [child for child in children_of(pid) if stat_fields(child) is None and exists(child)]
        children.setdefault(pid, []).extend(hidden)
    while queue:
        below = children.get(queue.pop(0), [])
        found.extend(below)
        queue.extend(below)
    return found


def children_of(pid: int) -> List[int]:
    """Return the children of a process as the system lists them: cheap, but not everywhere, nor while one is ending."""
    found: List[int] = []
    folder = "/proc/{}/task".format(pid)
    try:
        for thread in os.listdir(folder):
            with open("{}/{}/children".format(folder, thread)) as file:
                found.extend(map(int, file.read().split()))
    except OSError:
        pass  # it has just ended, or the system has no such lists
    return found


def family(pid: int) -> List[int]:
    """Return a process and its descendants; no others are looked at where the system knows the children of each.

    Good enough to add up what they use; who wants to end them all asks for `descendants`.
    """
    if not os.path.exists("/proc/{0}/task/{0}/children".format(os.getpid())):
        return [pid, *descendants([pid])]
    found = [pid]
    for one in found:  # which grows meanwhile
        found.extend(children_of(one))
    return found


def marked_processes(marker: str) -> List[Tuple[int, str]]:
    """Return (pid, value) of the processes that were started with `marker` in their environment."""
    return [(pid, value) for pid in parents() for value in _marks(pid, marker)]


def _marks(pid: int, marker: str) -> List[str]:
    prefix = os.fsencode(marker + "=")
    try:
        with open("/proc/{}/environ".format(pid), "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return []
    return [os.fsdecode(entry[len(prefix) :]) for entry in entries if entry.startswith(prefix)]


def orphans() -> List[int]:
    """Return the processes whose parents have ended: children of the guardian, where the system has such lists."""
    return [pid for pid in children_of(os.getppid()) if pid != os.getpid()]


def command_lines(pids: Iterable[int], task: str) -> List[str]:
    """Return the command lines of those processes that belong to a task.

    Args:
        pids: The processes.
        task: The value of its marker.
    """
    lines = {pid: read_text("/proc/{}/cmdline".format(pid))[:_LINE_SHOWN].replace("\0", " ").strip() for pid in pids}
    return [line for pid, line in lines.items() if line and task in _marks(pid, TASK_MARKER)]


def tree_of(pid: int, started: Optional[int], task: str) -> List[int]:
    """Return what belongs to a task: its first process, its descendants, then whatever carries its marker.

    Args:
        pid: The first process.
        started: When it started; if the number belongs to another process by now, only the marker counts.
        task: The value of the marker, "" for none.
    """
    found: List[int] = []
    if started is not None and start_time(pid) == started:
        found = [pid, *descendants([pid])]
    if task:
        found += [other for other, value in marked_processes(TASK_MARKER) if value == task and other not in found]
    return [pid for pid in found if pid not in (os.getpid(), 0, 1)]


class ProcessTree:
    """Processes that belong together, in the order parents before children, those included whose parents have ended.

    Those that were forked and run no other program show the environment of what they were forked from: no marker tells
    them, so each that was found once is remembered.

    Args:
        task: The value of their task's marker, "" for none.
    """

    def __init__(self, task: str = "") -> None:
        self._task = task
        self._known: Dict[int, int] = {}  # pid -> when it started

    def add(self, pid: int, started: Optional[int]) -> None:
        """Add a process with its descendants; `started` tells it from a later one of the same number."""
        if started is not None:
            self._known[pid] = started

    def living(self) -> List[int]:
        """Return those that live."""
        roots = [pid for pid, started in self._known.items() if start_time(pid) == started]
        found = dict.fromkeys([*roots, *descendants(roots), *tree_of(0, None, self._task)])
        pairs = [(pid, start_time(pid)) for pid in found]
        self._known = {pid: started for pid, started in pairs if started is not None}
        return list(self._known)


def send_signal(pids: Iterable[int], number: int) -> List[int]:
    """Send a signal to each process (a negative number is a process group); those that have ended are passed over.

    Returns:
        Those that this user may not signal: what runs as another one, e.g. what `sudo` has started.
    """
    refused: List[int] = []
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        except PermissionError:
            refused.append(pid)
    return refused


def out_of_reach(pids: Iterable[int]) -> str:
    """Return what is to be said of processes that this user may not end."""
    shown = []
    for pid in pids:
        try:
            with open("/proc/{}/comm".format(pid)) as file:
                name = file.read().strip()
            shown.append("{} ({}, of user {})".format(pid, name, os.stat("/proc/{}".format(pid)).st_uid))
        except OSError:
            continue  # it has just ended by itself
    if not shown:
        return ""
    text = "left running, since another user's processes may not be ended: {}\n"
    return text.format(", ".join(shown)) + "  Next step: end them on the host, as that user or with `sudo kill`"


# --- core dumps ----------------------------------------------------------------------------------
_NO_CORE = 1  # byte: unlike 0, the kernel also obeys it where /proc/sys/kernel/core_pattern names a program
_cores: Optional[Tuple[int, int]] = None  # the user's own limit, once this process has another one


def forbid_cores() -> None:
    """Have no core dump made of this process, which holds secrets; what `spawn` starts has the user's limit again."""
    global _cores
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if _cores is None:
        _cores = soft, hard
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (_NO_CORE, hard))
    except ValueError:
        pass  # the hard limit is 0, which allows no file either


def core_limit() -> Tuple[int, int]:
    """Return the limit of core dumps that what `spawn` starts has: the user's own."""
    return _cores or resource.getrlimit(resource.RLIMIT_CORE)


# --- starting ------------------------------------------------------------------------------------
def explained(why: Optional[str]) -> str:
    """Return what the system says of what it refuses, and what that means if it is not plain."""
    if why in _LIMITS:
        return "{} ({})".format(why, _LIMITS[why])
    return why or "unknown error"


def spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    stdin: int,
    stdout: int,
    stderr: int,
    extra: Sequence[int] = (),
    cores: bool = True,
) -> int:
    """Start a program in a session of its own and return its pid.

    Args:
        argv: The program, looked up in the PATH of `env` if it holds no slash, and its arguments.
        env: Its whole environment.
        cwd: Its working directory.
        stdin: The descriptor that becomes its standard input.
        stdout: The descriptor that becomes its standard output.
        stderr: The descriptor that becomes its standard error.
        extra: Descriptors that it inherits under the same numbers.
        cores: Whether it may leave core dumps as far as the user's own limit allows; not if it is told secrets.

    Raises:
        OSError: The program or the directory is not there or may not be used.
    """
    path = which(argv[0], env.get("PATH") or os.defpath, cwd)
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((stdin, stdout, stderr))]
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    for fd in extra:
        os.set_inheritable(fd, True)
    try:
        os.chdir(cwd)  # posix_spawn has no argument for it, nor for limits, and the agent has one thread
        if cores and _cores is not None:
            resource.setrlimit(resource.RLIMIT_CORE, _cores)
        return os.posix_spawn(
            path, list(argv), dict(env), file_actions=actions, setsid=True, setsigmask=[], setsigdef=_RESET
        )
    except OSError as error:
        if error.errno == errno.E2BIG:
            raise OSError(error.errno, _too_long(argv, env)) from None
        raise
    finally:
        if cores and _cores is not None:
            forbid_cores()
        for fd in extra:
            os.set_inheritable(fd, False)
        os.fchdir(before)
        os.close(before)


def _too_long(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """Return what a program would get too much of: one argument or variable, or all of them."""
    size, what = max(
        [(len(os.fsencode(argument)) + 1, "an argument") for argument in argv]
        + [(len(os.fsencode(name + value)) + 2, "the environment variable " + name) for name, value in env.items()]
    )
    most = _PAGES * resource.getpagesize()
    if size > most:
        how = "has {} bytes, but a program gets at most {} in one; give it in a file, or on standard input"
        return "{} {}".format(what, how.format(size, most))
    return "arguments and environment are together longer than a program gets (a quarter of ulimit -s)"


# --- forked children -----------------------------------------------------------------------------
def become_plain() -> None:
    """Undo in a forked child what the reactor set up."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def close_all_but(kept: Iterable[int]) -> None:
    """Close all descriptors but some, and standard input, output and error."""
    edges = sorted(set(kept) | {0, 1, 2})
    for low, high in zip(edges, edges[1:] + [4096]):
        os.closerange(low + 1, high)


def which(program: str, path: str, cwd: str) -> str:
    """Return the path of a program.

    Args:
        program: Its name, or its path, which is returned.
        path: The directories to look in, as in PATH.
        cwd: What they are relative to.

    Raises:
        FileNotFoundError: It is in none of them.
    """
    if "/" in program:
        return program
    for directory in path.split(os.pathsep):
        candidate = os.path.join(cwd, directory, program)
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise FileNotFoundError(2, "not found on the PATH of the host", program)


def pipe() -> Tuple[int, int]:
    """Return (read, write) of a pipe that holds a lot, its read end non-blocking."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    try:
        import fcntl

        fcntl.fcntl(write, getattr(fcntl, "F_SETPIPE_SZ", 1031), _PIPE_SIZE)
    except OSError:
        pass  # the system's limit for pipes is used up, or it is no Linux: a smaller one works as well
    return read, write


# --- reading -------------------------------------------------------------------------------------
class Pump:
    """Reads what a process says, no faster than the manager takes what is sent on a channel.

    Args:
        channel: Where it goes in the end.
        fd: A pipe or socket that does not block; it is closed at its end, and by `close`.
        emit: Is called with each piece.
        on_end: Is called at the end of the stream.
        size: Bytes of a piece at most.

    Attributes:
        ended: Whether it reads no more.
    """

    def __init__(
        self,
        channel: "RequestChannel",
        fd: int,
        emit: Callable[[bytes], None],
        on_end: Callable[[], None],
        size: int = _READ_SIZE,
    ) -> None:
        self._channel, self._fd, self._emit, self._on_end, self._size = channel, fd, emit, on_end, size
        self._reading = False
        self.ended = False
        self.resume()

    def resume(self) -> None:
        """Read again after the channel was not writable."""
        if not self._reading and not self.ended:
            self._reading = True
            self._channel.loop.add_reader(self._fd, self._readable)

    def _read(self) -> Optional[bytes]:
        try:
            return os.read(self._fd, self._size)
        except BlockingIOError:
            return None
        except OSError:
            return b""  # the other end of a socket has died

    def _readable(self) -> None:
        if self._channel.open and not self._channel.writable:
            self._pause()
            return
        data = self._read()
        if data:
            self._emit(data)
        elif data is not None:
            self.close()
            self._on_end()

    def _pause(self) -> None:
        self._reading = False
        self._channel.loop.remove_reader(self._fd)

    def drain(self) -> None:
        """Take what is there, without waiting for more."""
        while not self.ended:
            data = self._read()
            if not data:
                return
            self._emit(data)

    def close(self) -> None:
        """Stop reading."""
        if not self.ended:
            if self._reading:
                self._pause()
            self.ended = True
            os.close(self._fd)


# --- ending --------------------------------------------------------------------------------------
class Termination:
    """Ends processes in stages; a stage begins when the one before did not do.

    Args:
        loop: The reactor.
        find: Returns those that still live, parents before children: so a parent does not react to a child's end.
        on_end: Is called when none is left but those that this user may not end; of these the loop's owner is told.
        stages: (signal, seconds until the next stage) in order; the last is repeated until none is left.
    """

    _LOOK_EVERY = 0.02
    _LONGEST_LOOK = 0.25  # seconds that count for one look: while this process stood still, others may have, too
    _SPARED = 25  # looks; see `_to_kill`

    def __init__(
        self,
        loop: "Loop",
        find: Callable[[], Iterable[int]],
        on_end: Callable[[], None],
        stages: Sequence[Tuple[int, float]] = STAGES,
    ) -> None:
        self._loop, self._find, self._on_end = loop, find, on_end
        self._stages = list(stages)
        self._told: Set[int] = set()
        self._refused: Set[int] = set()  # those that could not even be killed
        self._waited = 0.0
        self._looked = time.monotonic()
        self._spared = 0
        loop.call_soon(self._step)  # not at once: `on_end` must not come before the caller knows this object

    def _step(self) -> None:
        try:
            alive = [pid for pid in self._find() if pid not in self._refused]
        except OSError:  # a process went while it was looked at, or there are no descriptors: this must not be the end
            self._loop.call_later(self._LOOK_EVERY, self._step)
            return
        if not alive:
            self._tell()
            self._on_end()
            return
        number, patience = self._stages[0]
        # Repeated for those that appeared since, and for ever in the last stage: a process may fork while it is ended.
        new = [pid for pid in alive if pid not in self._told]
        if number == signal.SIGKILL:
            self._refused.update(send_signal(self._to_kill(alive), number))
        else:
            send_signal(new, number)
        self._told.update(alive)
        now = time.monotonic()
        self._waited += min(now - self._looked, self._LONGEST_LOOK)
        self._looked = now
        if self._waited >= patience and len(self._stages) > 1:
            del self._stages[0]
            self._told.clear()
            self._waited = 0.0
        self._loop.call_later(self._LOOK_EVERY, self._step)

    def _tell(self) -> None:
        text = out_of_reach(sorted(self._refused)) if self._refused else ""
        if text and self._loop.report is not None:
            self._loop.report(text)

    def _to_kill(self, alive: List[int]) -> List[int]:
        """Return those to be killed: multiprocessing's tracker last, since it removes what others leave in /dev/shm."""
        others = [pid for pid in alive if not _is_tracker(pid)]
        if others:
            return others
        self._spared += 1
        return alive if self._spared > self._SPARED else []


def _is_tracker(pid: int) -> bool:
    return "multiprocessing.resource_tracker" in read_text("/proc/{}/cmdline".format(pid))
