"""Tasks that go on when their manager ends: an agent of their own carries them out, and writes down what becomes of it.

Each has a directory, for this user only, in the user's state directory: `task.json` says what it is and `state.json`
how far it is, `log` holds what it printed (see `detached_log`), `outcome-N` what the function in step N returned. The
agent that carries it out is nobody else's; it ends with the task. Any other agent of the user on this host can tell
about it, end it, and remove it. Hosts may share the directory: a task says of which one it is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from importlib import import_module

from .deletion import remove as delete
from .deletion import remove_tree
from .ownership import make
from .paths import trusts_group
from .processes import explained, read_text, start_time
from .ssh_session import SSHD_FILE, kills_at_logout
from .wire import MAX_PAYLOAD

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

    from .server import Agent
    from .session import RequestChannel


RUNNING, DONE, FAILED, CANCELLED, LOST = "running", "done", "failed", "cancelled", "lost"
_STEPS = {"run": ("commands", "run"), "call": ("functions", "call")}
_NAME = re.compile("[0-9a-f]{16}")
_AGAIN = 1.0  # seconds until what could not be written is tried once more: the disk may be full
_BEING_MADE = 300.0  # seconds for which a directory may have nothing in it
_LAST_LIMIT = 3600.0  # seconds within which the end of a task must have been written down


def _boot() -> str:
    boot = read_text("/proc/sys/kernel/random/boot_id").strip()
    return "{} {}".format(boot, start_time(1) or 0) if boot else ""


def _machine() -> str:
    """Return what tells this host from others: they may be copies of each other, or be in containers."""
    return "{} {}".format(os.uname().nodename, read_text("/etc/machine-id").strip())


def _id_of(name: str) -> str:
    """Return the id of a task whose name no other one on this host may have."""
    import hashlib

    return hashlib.sha256("{}\0{}".format(name, _machine()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _uptime() -> float:
    """Return the seconds since the host was started; a clock that somebody sets does not change them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def tasks_directory(trust_group: bool, wanted: bool = True) -> str:
    """Return the directory that holds those of the tasks, made for this user only.

    Args:
        trust_group: See `ownership.check`.
        wanted: Make it if it does not exist; else there are no tasks, and a home that is read-only is no error.

    Raises:
        OSError: It cannot be made, or somebody else could have.
    """
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    path = os.path.join(base, "lazycluster", "detached")
    if wanted or os.path.lexists(path):
        make(path, 0o700, trust_group)
    return path


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _write(path: str, message: Dict[str, Any]) -> None:
    with open(path + ".new", "w", opener=_private) as file:
        json.dump(message, file)
    os.rename(path + ".new", path)


def _read(path: str) -> Dict[str, Any]:
    try:
        with open(path) as file:
            message = json.load(file)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


# --- carrying it out ------------------------------------------------------------------------------
class Record:
    """Stands for the channel of a step: what it says is written down."""

    def __init__(self, task: "_Task", params: Dict[str, Any], outcome: str) -> None:
        self.params = params
        self.agent: Agent = task.agent
        self.loop = task.agent.loop
        self.open = True
        self._unwritten = bytearray()  # of the result, while the disk is full: its source is not read meanwhile
        self._result: Optional[Dict[str, Any]] = None  # to be told when all is written
        self.on_input: Callable[[bytes], Any] = lambda _: None
        self.on_input_end: Callable[[], Any] = lambda: None
        self.on_control: Callable[[Dict[str, Any]], Any] = lambda _: None
        self.on_drain: Callable[[], Any] = lambda: None
        self.on_abandon: Callable[[], Any] = lambda: None
        self._task = task
        self._outcome = outcome

    def stdout(self, data: bytes) -> None:
        """Write output down."""
        self._task.print(data)

    stderr = stdout

    @property
    def writable(self) -> bool:
        """True if more of the result may come."""
        return not self._unwritten

    def output(self, data: bytes) -> None:
        """Write a part of the result down."""
        waits = not self.writable
        self._unwritten += data
        if not waits:
            self._write()

    def _write(self) -> None:
        try:
            with open(self._outcome, "ab", buffering=0, opener=_private) as file:
                while self._unwritten:
                    del self._unwritten[: file.write(self._unwritten)]
        except OSError:
            self.loop.call_later(_AGAIN, self._go_on)

    def _go_on(self) -> None:
        self._write()
        if self.writable:
            self.on_drain()
            if self._result is not None:
                self._task.step_over(self._result)

    def event(self, **fields: Any) -> None:
        """Nobody is to be told."""

    def consumed(self, count: int) -> None:
        """All of the input is there."""

    def result(self, **fields: Any) -> None:
        """Go on with the next step."""
        if self.open:
            self.open = False
            if self.writable:
                self._task.step_over(dict(fields, ok=True))
            else:
                self._result = dict(fields, ok=True)

    def fail(self, error: str, message: str, **evidence: Any) -> None:
        """End the task."""
        if self.open:
            self.open = False
            self._task.step_over({"ok": False, "error": error, "message": message})


def _make_directory(path: str) -> None:
    """Make the directory of a task; one in which nothing was written, since its agent was killed, makes room.

    Raises:
        OSError: It cannot be made; FileExistsError: another task has it.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if _told(path) is not None or time.time() - os.stat(path).st_mtime < _BEING_MADE:
            raise
        remove_tree(path)
        os.mkdir(path, 0o700)


class _Task:
    """A task that this agent carries out, and nothing else."""

    def __init__(self, agent: Any, params: Dict[str, Any]) -> None:
        self.agent = agent
        if params.get("unique"):
            params["id"] = _id_of(str(params["name"]))
        self.directory = os.path.join(tasks_directory(bool(params.get("trust_group"))), str(params["id"]))
        _make_directory(self.directory)
        self._steps: List[Dict[str, Any]] = params["steps"]
        self._over: List[Dict[str, Any]] = []
        self._inputs: List[bytes] = []
        self._state = RUNNING
        try:
            self._set_out(params)
        except OSError:
            remove_tree(self.directory)
            raise

    def _set_out(self, params: Dict[str, Any]) -> None:
        """Write down what it is, and that it runs."""
        # The sshd that brought this agent serves a manager, who goes on with it.
        with open(os.path.join(self.agent.directory, SSHD_FILE), "w") as file:
            file.write("0 0")
        from .detached_log import LogWriter

        self._log = LogWriter(self.directory)
        if not params.get("cwd"):
            params["cwd"] = os.path.join(self.directory, "work")
            os.mkdir(params["cwd"], 0o700)
            for step in self._steps:
                step["params"]["cwd"] = params["cwd"]
                step["params"]["env"][params["cwd_variable"]] = params["cwd"]
        known = ("id", "name", "created", "cwd")
        about = {"labels": [step["label"] for step in self._steps], "boot": _boot(), "pid": os.getpid()}
        about["started"], about["machine"] = start_time(os.getpid()), _machine()
        about["begun"], about["uptime"] = time.time(), _uptime()
        _write(os.path.join(self.directory, "task.json"), dict(about, **{name: params.get(name) for name in known}))
        self._note()

    def begin(self, inputs: List[bytes]) -> None:
        """Start with the first step.

        Args:
            inputs: For each step what is fed to it.
        """
        self._inputs = inputs
        signal.signal(signal.SIGTERM, lambda *_: self.agent.loop.call_soon(self.cancel))
        self._next()

    def _next(self) -> None:
        number = len(self._over)
        if number == len(self._steps):
            self._finish(DONE)
            return
        step, data = self._steps[number], self._inputs[number]
        self._inputs[number] = b""
        record: Any = Record(self, step["params"], os.path.join(self.directory, "outcome-{}".format(number)))
        module, function = _STEPS[step["op"]]
        try:
            if step.get("script"):
                data = self._write_script(step["params"]["argv"], data)
            getattr(import_module("." + module, __package__), function)(record)
        except OSError as error:
            record.fail("os", "{}: {}".format(explained(error.strerror), error.filename or step["label"]))
            return
        for start in range(0, len(data), MAX_PAYLOAD):
            record.on_input(data[start : start + MAX_PAYLOAD])
        record.on_input_end()

    def _write_script(self, argv: List[str], data: bytes) -> bytes:
        """Write the script that a step runs beside its log; return what is left to be fed to it."""
        path = os.path.join(self.directory, "script")
        with open(path, "wb", opener=_private) as file:
            file.write(data)
        argv.insert(1, path)
        return b""

    def print(self, data: bytes) -> None:
        """Take output."""
        self._log.write(data)

    def step_over(self, fields: Dict[str, Any]) -> None:
        """Note how a step has ended, and go on if it ended well."""
        if self._state != RUNNING:
            return
        self._over.append(fields)
        if fields["ok"] and not fields.get("exit") and not fields.get("signal") and fields.get("status") in _GOOD:
            self._try_to_note()
            self.agent.loop.call_soon(self._next)
        else:
            self._finish(FAILED)

    def cancel(self) -> None:
        """End it, as it was asked to."""
        self._finish(CANCELLED)

    def _finish(self, state: str) -> None:
        if self._state == RUNNING:
            self._state = state
            self.agent.end(self._note_the_end)

    def _try_to_note(self) -> None:
        try:
            self._note()
        except OSError:  # the task is not to suffer from that, see `print`
            if self._state == RUNNING:
                self.agent.loop.call_later(_AGAIN, self._try_to_note)

    def _note_the_end(self) -> None:
        """Write down what has become of the task, which nobody else knows; all else here has been ended."""
        deadline = time.monotonic() + _LAST_LIMIT
        while True:
            try:
                self._note()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN)

    def _note(self) -> None:
        ended = None if self._state == RUNNING else time.time()
        message = {"state": self._state, "steps": self._over, "ended": ended, "uptime": _uptime()}
        _write(os.path.join(self.directory, "state.json"), message)


_GOOD = (None, "returned")


def detach(channel: "RequestChannel") -> None:
    """Handle the request `detach`: carry out a task, whatever becomes of the manager. INPUT is what its steps are fed.

    It must be the first request of an agent, which then does nothing else.
    """
    params = channel.params
    if not _NAME.fullmatch(str(params["id"])) or any(step["op"] not in _STEPS for step in params["steps"]):
        channel.fail("value", "a task like that cannot be detached")
        return
    problem = kills_at_logout()
    if problem:
        channel.fail("value", "nothing can outlive the ssh session there: " + problem)
        return
    received = bytearray()

    def take(data: bytes) -> None:
        received.extend(data)
        channel.consumed(len(data))

    def begin() -> None:
        inputs, at = [], 0
        for step in params["steps"]:
            inputs.append(bytes(received[at : at + step["size"]]))
            at += step["size"]
        received.clear()
        try:
            task = _Task(channel.agent, params)
        except OSError as error:
            channel.fail("os", "{}: {}".format(error.strerror, error.filename), errno=error.errno, path=error.filename)
            return
        channel.agent.go_alone()
        channel.result(directory=task.directory, id=params["id"])
        task.begin(inputs)

    channel.on_input, channel.on_input_end = take, begin


# --- telling about it -----------------------------------------------------------------------------
def _told(directory: str) -> Optional[Dict[str, Any]]:
    about, state = _read(os.path.join(directory, "task.json")), _read(os.path.join(directory, "state.json"))
    if not about or not state:
        return None
    same_boot = about.get("boot") == _boot()
    if state.get("state") == RUNNING and not _lives(about):
        state["state"] = LOST
        about["restarted"] = not same_boot
    ended = state.get("ended")
    about["age"] = _since(about.get("begun") or about.get("created"), about.get("uptime"), same_boot)
    about["ended_ago"] = _since(ended, state.get("uptime"), same_boot) if ended else None
    return dict(about, **state)


def _is_here(about: Dict[str, Any]) -> bool:
    """Return whether a task is of this host. Earlier versions did not note that; the host's name may have changed."""
    return about.get("machine") in (None, _machine()) or about["state"] == RUNNING


def _since(when: Any, uptime: Any, same_boot: bool) -> float:
    """Return the seconds since a moment: by what the clock cannot change, as far as that goes."""
    if same_boot and uptime is not None:
        return max(0.0, _uptime() - float(uptime))
    return max(0.0, time.time() - float(when or 0))


def _lives(about: Dict[str, Any]) -> bool:
    pid, started = about.get("pid"), about.get("started")
    same = isinstance(pid, int) and started is not None and about.get("boot") == _boot()
    return same and start_time(int(pid or 0)) == started


def detached(channel: "RequestChannel") -> None:
    """Handle the request `detached`: tell about tasks (`list`, `state`, `log`, `outcome`), `cancel` or `remove` one."""
    params, root = channel.params, tasks_directory(trusts_group(channel), wanted=False)
    action = params["do"]
    if action == "list":
        names = sorted(os.listdir(root)) if os.path.isdir(root) else []
        found = [_told(os.path.join(root, name)) for name in names if _NAME.fullmatch(name)]
        channel.result(tasks=[one for one in found if one is not None and _is_here(one)])
        return
    name = str(params["id"])
    directory = os.path.join(root, name)
    about = _told(directory) if _NAME.fullmatch(name) else None
    if about is None:
        channel.fail("value", "there is no detached task {} on this host (any more)".format(name))
    elif action == "state":
        channel.result(task=about)
    elif action == "cancel":
        if about["state"] == RUNNING:
            os.kill(about["pid"], signal.SIGTERM)
        channel.result(task=about)
    elif action == "remove":
        if about["state"] == RUNNING:
            channel.fail("value", "the task runs: cancel it first")
            return
        error = delete(directory)
        if error is not None:
            raise error
        channel.result()
    elif action == "log":
        from .detached_log import LogOutput

        LogOutput(channel, directory, int(params.get("offset") or 0))
    else:
        _FileOutput(channel, os.path.join(directory, "outcome-{}".format(int(params["step"]))))


class _FileOutput:
    """Sends a file, no faster than it is taken."""

    def __init__(self, channel: "RequestChannel", path: str) -> None:
        self._channel = channel
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        channel.on_drain = self._go_on
        channel.on_abandon = self._close
        self._go_on()

    def _go_on(self) -> None:
        while self._fd >= 0 and self._channel.writable:
            data = os.read(self._fd, MAX_PAYLOAD)
            if not data:
                self._close()
                self._channel.result()
                return
            self._channel.output(data)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
