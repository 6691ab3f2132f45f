"""Start-up files of shells: read once per connection; what they set is kept on the host, for the commands that follow.

bash reads `.bashrc` for each command that sshd, or what it has started, runs with `-c`; zsh reads `.zshenv` always.
The login shell that starts the agent has read them already: its environment, umask and limits are the agent's. What it
cannot hand down in its environment (functions, shell variables, options, aliases) it writes into a pipe before it
becomes the agent. A shell that is not the login shell is started once to do the same.
"""

from __future__ import annotations

import os
import resource
import sys

from . import json_text, shell_state
from .processes import AGENT_MARKER, TASK_MARKER, core_limit, explained, send_signal, spawn, which

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import signal
    from typing import Any, Callable, Dict, List, Optional, Tuple

    from .server import Agent
else:
    import _signal as signal  # the module proper makes enumerations, for which it imports much

_READ_LIMIT = 60.0  # seconds for start-up files; where they take longer, each shell goes on reading them by itself
_TOLD_LIMIT = 10.0  # seconds for what a login shell tells: it has read its files when it became the agent
_MOST = 64 * 1024 * 1024  # bytes that a shell may tell
_HIDDEN = (AGENT_MARKER, TASK_MARKER, "_", "SHLVL", "PWD", "OLDPWD")
_UNREAD, _READING, _READ, _UNKNOWN = "unread", "reading", "read", "unknown"
# What a shell becomes when it has told of itself: what it leaves to a program is told by a program.
_INHERITED = (
    "import json,os,resource as r;"
    "open(%r,'w').write('%s inherited\\n'+json.dumps([dict(os.environ),os.umask(0),"
    "{n:r.getrlimit(getattr(r,n)) for n in dir(r) if n.startswith('RLIMIT_')}])+'\\n%s end\\n')"
)


def own_limits() -> Dict[str, Tuple[int, int]]:
    """Return the limits of this process by their names."""
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {**{name: resource.getrlimit(getattr(resource, name)) for name in names}, "RLIMIT_CORE": core_limit()}


class Shell:
    """A shell of this host, and what its start-up files have set.

    Args:
        agent: The agent.
        path: The shell.
        told: A descriptor on which the shell has told already, -1 if it has to be asked; this closes it.
    """

    def __init__(self, agent: Agent, path: str, told: int) -> None:
        self.kind: Any = shell_state.KINDS[os.path.basename(path)]
        self._agent, self._path, self._fd = agent, path, told
        self._state = _UNREAD
        self._directory = ""  # with the files to be read in place of the start-up files
        self._is_empty = False  # whether there is nothing in them
        self._base: Optional[Dict[str, str]] = None  # the environment that they left, if it is not the agent's
        self._write = -1  # what is kept open for the shell to open it again
        self._data = bytearray()
        self._end = b""
        self._pid = 0
        self._timer: Any = None
        self._is_watched = False
        self._waiting: List[Callable[[], Any]] = []

    @property
    def is_read(self) -> bool:
        """True if nothing is to be waited for."""
        return self._state in (_READ, _UNKNOWN)

    def when_read(self, then: Callable[[], Any]) -> None:
        """Call `then` when the start-up files have been read."""
        self._waiting.append(then)
        if self._state == _UNREAD:
            self.read()

    def invocation(self, command: str, environment: Callable[[Optional[Dict[str, str]]], Dict[str, str]]) -> Any:
        """Return (argv, env) for a line of shell.

        Args:
            command: The line.
            environment: Returns the command's environment, from what is to take the place of the agent's own.
        """
        if self._state != _READ:
            return [self._path, "-c", command], environment(None)
        env = environment(self._base)
        self._lead(env)
        return self.kind.argv(self._path, command, self._directory), env

    def _lead(self, env: Dict[str, str]) -> None:
        """Have the shell read the files of ours; it gives the variable back to its own children."""
        name = self.kind.variable
        if not name or (self._is_empty and name not in env):
            return
        if name in env:
            env[shell_state.ORIGINAL] = env[name]
        env[name] = os.path.join(self._directory, self.kind.file) if name == "BASH_ENV" else self._directory

    # --- reading -------------------------------------------------------------------------------
    def read(self) -> None:
        """Have the shell tell, or listen to what it has told."""
        self._state = _READING
        limit = _READ_LIMIT if self._fd < 0 else _TOLD_LIMIT
        self._timer = self._agent.loop.call_later(limit, self._give_up)
        try:
            if self._fd < 0:
                self._ask()
        except OSError:
            self._give_up()
            return
        os.set_blocking(self._fd, False)
        self._is_watched = True
        self._agent.loop.add_reader(self._fd, self._readable)

    def _ask(self) -> None:
        """Start the shell as for a command, for it to tell what its start-up files have set."""
        word = "state" + os.urandom(8).hex()
        self._fd, write = os.pipe()
        self._write = write
        where: Any = "/proc/{}/fd/{}".format(os.getpid(), write) if self.kind.is_closing else write
        program = _INHERITED % (where, word, word)
        line = self.kind.asked.format(
            tell=shell_state.telling(self.kind.name, word), fd=where, python=sys.executable, program=program
        )
        env = dict(os.environ, **{AGENT_MARKER: self._agent.identity})
        try:
            self._pid = self._spawn([self._path, "-c", line], env, [write], lambda _: self._told())
        finally:
            if not self.kind.is_closing or not self._pid:
                self._close_write()

    def _spawn(self, argv: List[str], env: Dict[str, str], extra: List[int], on_exit: Callable[[int], Any]) -> int:
        null = os.open(os.devnull, os.O_RDWR)
        try:
            pid = spawn(argv, env, os.path.expanduser("~"), null, null, null, extra)
        finally:
            os.close(null)
        self._agent.loop.on_exit(pid, on_exit)
        return pid

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 256 * 1024)
        except BlockingIOError:
            return
        self._data += data
        if not self._end:
            word = bytes(self._data[:64]).partition(b" ")[0]
            self._end = b"\n" + word + b" end\n"
        # Not only at the end of the stream: what the files have started may hold it open.
        if not data or len(self._data) > _MOST or self._end in self._data[-len(data) - len(self._end) :]:
            self._take()

    def _told(self) -> None:
        """Take what there is: the shell has ended, though something that its files have started may hold the stream."""
        while self._fd >= 0:
            before = len(self._data)
            self._readable()
            if len(self._data) == before and self._fd >= 0:
                self._take()

    def _take(self) -> None:
        self._close()
        found = shell_state.records(bytes(self._data))
        self._data.clear()
        if found is None:
            self._over(_UNKNOWN)
            return
        try:
            self._keep(found)
        except (OSError, ValueError):
            self._over(_UNKNOWN)

    def _keep(self, found: Any) -> None:
        """Write what is to be read in place of the start-up files, and try it."""
        directory = os.path.join(self._agent.directory, "shell-" + os.urandom(4).hex())
        files = self.kind.files(found, directory, self._inherited(found))
        os.mkdir(directory, 0o700)
        for name, text in files.items():
            with open(os.path.join(directory, name), "wb", opener=_private) as file:
                file.write(text.encode("utf-8", "surrogateescape"))
        self._directory = directory
        self._is_empty = self.kind.is_empty(files)
        if self._is_empty:
            self._over(_READ)
            return
        env = dict(os.environ, **{AGENT_MARKER: self._agent.identity})
        env.pop(self.kind.variable, None)
        # A shell may print functions in a way that it cannot read: then it is left to itself.
        argv = [self._path, *(part.format(shell_state.quoted(directory)) for part in self.kind.check)]
        self._pid = self._spawn(argv, env, [], lambda status: self._over(_UNKNOWN if status else _READ))

    def _inherited(self, found: Any) -> List[str]:
        for kind, _, text in found:
            if kind == "inherited":
                env, umask, limits = json_text.loads(text.encode("ascii"))
                kept = {name: value for name, value in os.environ.items() if name in _HIDDEN}
                self._base = {name: value for name, value in env.items() if name not in _HIDDEN}
                self._base.update(kept)
                return list(shell_state.inherited_lines(self.kind.block, umask, limits, own_limits()))
        return []

    def _give_up(self) -> None:
        self._close()
        if self._pid:
            send_signal([-self._pid], signal.SIGKILL)
        self._over(_UNKNOWN)

    def _close(self) -> None:
        if self._fd >= 0:
            if self._is_watched:
                self._agent.loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        self._close_write()

    def _close_write(self) -> None:
        if self._write >= 0:
            os.close(self._write)
            self._write = -1

    def _over(self, state: str) -> None:
        if self._state != _READING:
            return
        self._state = state
        self._timer.cancel()
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Shells:
    """The shells of one agent, by their paths."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._known: Dict[str, Shell] = {}

    def get(self, path: str) -> Optional[Shell]:
        """Return a shell, None if it is of a kind that is to read its start-up files by itself."""
        real = os.path.realpath(path)
        if real not in self._known and os.path.basename(real) in shell_state.KINDS:
            self._known[real] = Shell(self._agent, path, -1)
        return self._known.get(real)

    def listen(self, path: str, fd: int) -> None:
        """Take what the login shell has told on a descriptor before it became the agent."""
        real = os.path.realpath(path)
        if real in self._known or os.path.basename(real) not in shell_state.KINDS:
            os.close(fd)
            return
        self._known[real] = Shell(self._agent, path, fd)
        self._known[real].read()


def shell_for(agent: Agent, path: str, env: Dict[str, str]) -> Optional[Shell]:
    """Return the shell whose start-up files are to be read once, None if it reads none, or is to do so by itself.

    Args:
        agent: The agent.
        path: The shell, as the command names it.
        env: The environment of the command.
    """
    kind = shell_state.KINDS.get(os.path.basename(path))
    if kind is None or env.get("HOME") != os.environ.get("HOME") or not kind.reads(env, os.environ):
        return None
    try:
        found = which(path, env.get("PATH") or os.defpath, "/")
    except OSError:
        return None  # which is for its start to tell
    agent.listen()
    return agent.shared(Shells).get(found)


class PendingRequest:
    """A request that is begun when the start-up files have been read; what comes before that is kept for it."""

    def __init__(self, channel: Any, shell: Shell, begin: Callable[[], Any]) -> None:
        self._channel, self._begin = channel, begin
        self._early: List[bytes] = []
        self._input_ended = False
        self._ended = False
        channel.on_input = self._early.append
        channel.on_input_end = self._on_input_end
        channel.on_control = self._on_control
        channel.on_abandon = self._end
        shell.when_read(self._go_on)

    def _on_input_end(self) -> None:
        self._input_ended = True

    def _on_control(self, message: Dict[str, Any]) -> None:
        self._end()

    def _end(self) -> None:
        self._ended = True

    def _go_on(self) -> None:
        channel = self._channel
        if self._ended:
            channel.result(exit=None, signal=int(signal.SIGTERM))
            return
        channel.on_input = channel.on_input_end = channel.on_control = channel.on_abandon = lambda *_: None
        try:
            self._begin()
            for data in self._early:
                channel.on_input(data)
            if self._input_ended:
                channel.on_input_end()
        except OSError as error:
            channel.fail("os", explained(error.strerror or str(error)), errno=error.errno)
