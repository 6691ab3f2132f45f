"""Commands: a shell line or a program, run for the manager."""

from __future__ import annotations

import os
import pwd
import time

from . import oom, shell_state
from .processes import (
    AGENT_MARKER,
    TASK_MARKER,
    Pump,
    Termination,
    command_lines,
    explained,
    orphans,
    pipe,
    send_signal,
    spawn,
    start_time,
    tree_of,
)

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import signal
    from collections import deque
    from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

    from .session import RequestChannel
else:
    import _signal as signal  # the module proper makes enumerations, for which it imports much
    from _collections import deque

_MOST_LEFT = 5  # of what a command has left running, so many are told
_SETTLING = 0.1  # seconds


# Characters from which on a command is given in a file: a program's argument has at most 128 KiB, and these may be of
# four bytes.
_LONG = 32_000


def login_shell() -> str:
    """Return the user's own shell."""
    try:
        shell = pwd.getpwuid(os.getuid()).pw_shell
    except KeyError:
        shell = ""
    return shell if shell and os.access(shell, os.X_OK) else "/bin/sh"


def environment(channel: RequestChannel, task: str = "", base: Optional[Dict[str, str]] = None) -> Dict[str, str]:
    """Return the whole environment of a request.

    Args:
        channel: The request, with what the runtime adds.
        task: The marker of its task.
        base: The host's own environment; the agent's if None.
    """
    env = dict(os.environ if base is None else base)
    env.update(channel.params.get("env") or {})
    return marked_environment(channel, env, task)


def marked_environment(channel: RequestChannel, env: Dict[str, str], task: str = "") -> Dict[str, str]:
    """Add the markers by which processes are found again."""
    env[AGENT_MARKER] = channel.agent.identity
    if task:
        env[TASK_MARKER] = "{}:{}".format(channel.agent.identity, task)
    return env


def outcome(status: int) -> Dict[str, Optional[int]]:
    """Return a wait status as the fields `exit` and `signal`, one of which is None."""
    if os.WIFSIGNALED(status):
        return {"exit": None, "signal": os.WTERMSIG(status)}
    return {"exit": os.WEXITSTATUS(status), "signal": None}


def _streams(has_input: bool, merge: bool) -> List[int]:
    """Return both ends of a process's output, errors and input."""
    fds: List[int] = []
    try:
        fds += pipe()
        fds += fds[:2] if merge else pipe()
        fds += os.pipe() if has_input else (os.open(os.devnull, os.O_RDONLY), -1)
    except OSError:
        for fd in set(fds):
            os.close(fd)
        raise
    return fds


class CommandProcess:
    """A process whose output goes to a channel; the base of commands and services.

    Args:
        channel: Where its output goes.
        argv: The program and its arguments.
        env: Its whole environment.
        cwd: Its working directory.
        has_input: Whether its standard input is the channel's INPUT; else it is empty.
        merge: Whether standard error joins standard output.
        cores: See `spawn`.

    Attributes:
        pid: Its process, 0 if it was not started.
        file: The path of a file that is removed when it has ended.

    Raises:
        OSError: It cannot be started.
    """

    pid = 0
    file = ""

    def __init__(
        self,
        channel: RequestChannel,
        argv: List[str],
        env: Dict[str, str],
        cwd: str,
        has_input: bool,
        merge: bool,
        cores: bool = True,
    ) -> None:
        self.channel = channel
        self.task = env.get(TASK_MARKER, "")
        self.status: Optional[int] = None
        self.ending: Optional[Termination] = None
        out_read, out_write, err_read, err_write, in_read, in_write = _streams(has_input, merge)
        try:
            self.pid = spawn(argv, env, cwd, in_read, out_write, err_write, cores=cores)
        except BaseException:
            for fd in {out_read, err_read, in_write} - {-1}:
                os.close(fd)
            raise
        finally:
            for fd in {out_write, err_write, in_read}:
                os.close(fd)
        self._started = start_time(self.pid)
        self.input = Feed(channel, in_write) if has_input else None
        self.pumps = [Pump(channel, out_read, self.on_stdout, self._maybe_over)]
        if not merge:
            self.pumps.append(Pump(channel, err_read, self.on_stderr, self._maybe_over))
        channel.loop.on_exit(self.pid, self._exited)

    def on_stdout(self, data: bytes) -> None:
        """Handle output."""
        self.channel.stdout(data)

    def on_stderr(self, data: bytes) -> None:
        """Handle errors."""
        self.channel.stderr(data)

    def on_over(self, status: int) -> None:
        """Handle the end: the process and its output have ended."""
        raise NotImplementedError

    def resume(self) -> None:
        """Go on reading output."""
        for pump in self.pumps:
            pump.resume()

    def _exited(self, status: int) -> None:
        self.status = status
        if self.file:
            try:
                os.unlink(self.file)
            except OSError:
                pass  # it goes with the agent's directory
        self._maybe_over()

    def _maybe_over(self) -> None:
        # While it is being ended, what it started is, too: a successor would be taken for one of these.
        if self.ending is None and self.status is not None and all(pump.ended for pump in self.pumps):
            if self.input is not None:
                self.input.close()
            self.on_over(self.status)

    def signal(self, name: str) -> None:
        """Send a signal to the process group by name, or end the whole tree in stages for "END"."""
        if name == "END":
            self.end()
        elif self.status is None:
            send_signal([-self.pid], getattr(signal, "SIG" + name))

    def end(self) -> None:
        """End the process and all that it started."""
        if self.ending is None:
            self.ending = Termination(
                self.channel.loop, lambda: tree_of(self.pid, self._started, self.task), self._ended
            )

    def _ended(self) -> None:
        self.ending = None
        if self.status is None and self._started is not None and start_time(self.pid) == self._started:
            # It runs as another user, and may not be ended (see `Termination`): nobody waits for it any more.
            self.status = signal.SIGKILL
            self.channel.loop.on_exit(self.pid, lambda _: None)
        # Whatever still holds the pipes is none of ours (it cleared its environment and left the tree).
        for pump in self.pumps:
            pump.drain()
            pump.close()
        self._maybe_over()


class Feed:
    """Writes the channel's INPUT to a descriptor, no faster than it is taken."""

    def __init__(self, channel: RequestChannel, fd: int) -> None:
        self._channel, self._fd = channel, fd
        self._queue: Deque[bytes] = deque()
        self._end = False
        os.set_blocking(fd, False)
        channel.on_input = self._on_input
        channel.on_input_end = self._on_end

    def _on_input(self, data: bytes) -> None:
        self._queue.append(data)
        self._write()

    def _on_end(self) -> None:
        self._end = True
        self._write()

    def _write(self) -> None:
        if self._fd < 0:
            self._discard()
            return
        try:
            while self._queue:
                count = os.write(self._fd, self._queue[0])
                self._channel.consumed(count)
                rest = self._queue.popleft()[count:]
                if rest:
                    self._queue.appendleft(rest)
        except BlockingIOError:
            pass
        except OSError:  # it does not read any more, as `head` does: no error
            self.close()
            self._discard()
            return
        self._channel.loop.watch_writer(self._fd, self._write if self._queue else None)
        if self._end and not self._queue:
            self.close()

    def _discard(self) -> None:
        while self._queue:
            self._channel.consumed(len(self._queue.popleft()))

    def close(self) -> None:
        """Let the reader see the end of its input."""
        if self._fd >= 0:
            self._channel.loop.watch_writer(self._fd, None)
            os.close(self._fd)
            self._fd = -1


class _Command(CommandProcess):
    clock: Any = None
    killed_before: Any = None

    def on_over(self, status: int) -> None:
        fields: Dict[str, Any] = dict(outcome(status))
        if self.clock is not None:
            self.clock.stop()
            if self.clock.over:
                fields["limit"] = "wall"
        if fields["signal"] == signal.SIGKILL or fields["exit"] == 128 + signal.SIGKILL:
            fields.update(oom.evidence(self.killed_before))
        if self.channel.params.get("tell_left") and orphans():
            # A moment later they have become the programs that they are to run.
            self.channel.loop.call_later(_SETTLING, lambda: self._tell_left(fields))
        else:
            self.channel.result(**fields)

    def _tell_left(self, fields: Dict[str, Any]) -> None:
        self.channel.result(left=command_lines(orphans(), self.task)[:_MOST_LEFT], **fields)


def _in_file(command: str, directory: str) -> str:
    """Write a command to a private file, and return its path."""
    path = os.path.join(directory, "command-" + os.urandom(4).hex())
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.fsencode(command))
    return path


def _in_shell(
    channel: RequestChannel,
    path: str,
    line: str,
    start: Callable[[List[str], Dict[str, str]], Optional[CommandProcess]],
) -> None:
    """Start a line of shell once the shell's start-up files have been read.

    Args:
        channel: The request.
        path: The shell.
        line: The line.
        start: Starts it, with argv and environment; returns None if it cannot be started.
    """
    params = channel.params
    file = ""
    if len(line) > _LONG:
        file = _in_file(line, channel.agent.directory)
        line = shell_state.reading(path, file)

    def begin(argv: List[str], env: Dict[str, str]) -> None:
        process = start(argv, env)
        if process is not None:
            process.file = file
        elif file:
            os.unlink(file)

    task = params.get("task") or ""
    env = environment(channel, task)
    shell = None
    if params.get("startup_files") != "always":
        from . import shell_startup

        shell = shell_startup.shell_for(channel.agent, path, env)
    if shell is None:
        begin([path, "-c", line], env)
        return
    found = shell

    def go_on() -> None:
        begin(*found.invocation(line, lambda base: environment(channel, task, base)))

    if found.is_read:
        go_on()
    else:
        shell_startup.PendingRequest(channel, found, go_on)


def run(channel: RequestChannel) -> None:
    """Handle the request `run`: a command, whose output is streamed and whose exit status is the result."""
    params = channel.params
    if params.get("argv"):
        _begin(channel, [str(part) for part in params["argv"]], environment(channel, params.get("task") or ""))
        return
    path = params.get("shell") or login_shell()
    asked = time.monotonic()

    def start(argv: List[str], env: Dict[str, str]) -> Optional[CommandProcess]:
        return _begin(channel, argv, env, time.monotonic() - asked)

    _in_shell(channel, path, params["command"], start)


def _begin(
    channel: RequestChannel, argv: List[str], env: Dict[str, str], waited: float = 0.0
) -> Optional[CommandProcess]:
    params = channel.params
    limited = dict(params.get("limits") or {})
    if limited:
        from . import limits

        argv = limits.wrapped(argv, limited)
        if limited.get("wall") is not None:
            limited["wall"] -= waited
    before = oom.note()
    cwd = os.path.join(os.path.expanduser("~"), params.get("cwd") or "")
    try:
        command = _Command(channel, argv, env, cwd, bool(params.get("input")), bool(params.get("merge")))
    except OSError as error:
        name = cwd if error.filename == cwd else argv[0]
        channel.fail("os", _unstarted(error, argv, cwd), errno=error.errno, path=name)
        return None
    command.killed_before = before
    if limited:
        command.clock = limits.Clock(channel.loop, limited, command.end)
    channel.on_control = lambda message: command.signal(str(message.get("signal", "END")))
    channel.on_abandon = command.end
    channel.on_drain = command.resume
    channel.event(pid=command.pid)
    return command


def _unstarted(error: OSError, argv: List[str], cwd: str) -> str:
    """Return why a program was not started; the error names its working directory if that is the reason."""
    if error.filename != cwd:
        return "{}: {}".format(explained(error.strerror), argv[0])
    if cwd.rstrip("/") != os.path.expanduser("~").rstrip("/"):
        return "the working directory {} cannot be used: {}".format(cwd, error.strerror)
    step = "have the host's administrator make it, or fix its owner and permissions"
    return "the home directory {} cannot be used: {}\n  Next step: {}".format(cwd, error.strerror, step)


def setup(channel: RequestChannel) -> None:
    """Handle the request `setup`: run shell lines once, and tell the environment that they leave."""
    params = channel.params
    import shutil  # here and not above: the first command does not wait for it

    shell = params.get("shell") or ("bash" if shutil.which("bash") else "sh")
    name = os.path.basename(shell)
    if name in ("csh", "tcsh", "fish"):
        channel.fail("value", "the set-up lines need a POSIX shell (bash, zsh, sh), not {}".format(shell))
        return
    read, write = os.pipe()
    os.set_blocking(read, False)
    # The descriptor is handed down by number, since the lines may use standard output for themselves.
    script = "{}\n{}\nenv -0 >&{} || exit\n".format(*_checking(name, params["script"]), write)

    def start(argv: List[str], env: Dict[str, str]) -> Optional[CommandProcess]:
        process = _Setup(channel, argv, env, params.get("cwd") or os.path.expanduser("~"), read, write)
        return process if process.pid else None

    _in_shell(channel, shell, script, start)


def _checking(shell: str, script: str) -> Tuple[str, str]:
    """Return what makes a shell end when a line fails, before the lines and after them.

    Only the lines themselves count: what they source (`.bashrc`, a virtual environment's `activate`) is not written
    for `set -e`. In shells other than bash, which cannot tell the two apart, the last line counts.
    """
    if shell == "bash":
        return "trap 'case ${#BASH_SOURCE[@]} in 0) exit $? ;; esac' ERR\n" + script, "trap - ERR"
    return script, "[ $? -eq 0 ] || exit"


class _Setup(CommandProcess):
    """Runs set-up lines; what they print is kept for the error message."""

    def __init__(
        self, channel: RequestChannel, argv: List[str], env: Dict[str, str], cwd: str, read: int, write: int
    ) -> None:
        self._result = bytearray()
        self._output: Deque[bytes] = deque(maxlen=64)
        self._read = read
        os.set_inheritable(write, True)
        try:
            super().__init__(channel, argv, env, cwd, False, True)
        except OSError as error:
            os.close(read)
            channel.fail("os", "the set-up cannot be run: " + _unstarted(error, argv, cwd))
            return
        finally:
            os.close(write)
        channel.on_abandon = self.end
        self._pump = Pump(channel, read, self._result.extend, self._maybe_over)
        self.pumps.append(self._pump)

    def on_stdout(self, data: bytes) -> None:
        self._output.append(data)

    def on_over(self, status: int) -> None:
        ended = outcome(status)
        output = b"".join(self._output).decode("utf-8", "replace")[-4000:]
        if ended["exit"] != 0 or not self._result:
            self.channel.fail("setup", _why(ended), output=output)
            return
        pairs = (os.fsdecode(entry).partition("=") for entry in bytes(self._result).split(b"\0") if entry)
        hidden = (AGENT_MARKER, TASK_MARKER, "_", "SHLVL", "PWD", "OLDPWD")
        self.channel.result(env={name: value for name, _, value in pairs if name not in hidden}, output=output)


def _why(ended: Dict[str, Any]) -> str:
    if ended["signal"]:
        return "the set-up lines were ended by the signal {}".format(ended["signal"])
    if ended["exit"]:
        return "the set-up lines failed with exit status {}".format(ended["exit"])
    return "the set-up lines ended the shell: leave out the exit"
