"""Services: programs that run until they are ended, watched, and started again when they die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Optional, Tuple, cast

from . import gpus, oom
from .commands import CommandProcess, environment, outcome
from .deletion import remove_tree
from .processes import Termination, explained, tree_of
from .restart_policy import RestartPolicy
from .zygote_link import texts

if TYPE_CHECKING:
    from .loop import Loop
    from .server import Agent
    from .session import RequestChannel

_HELD = 512 * 1024  # bytes of output that wait for a manager that is slow; what is older is dropped
_TAIL = 8 * 1024  # bytes of output that are told with the end of the process
_LONGEST_LINE = 256 * 1024
_PATIENCE = 3.0  # seconds from the request to end until the service is killed
_LASTED = 10.0  # seconds for which a service must have worked for its being cut off to be no fault of its own
_READY_AGAIN = 180.0  # seconds for a service that is started again to get ready
_LOOK_AT_PORT = 0.1  # seconds between two looks whether a port answers
_CONNECT_LIMIT = 0.2  # seconds; on the loopback interface all but a full queue is told at once
SCRATCH = "LAZYCLUSTER_SCRATCH"  # the variable with the service's own directory, which is removed when it ends

_BOOT = (
    "import sys;sys.path[:]=[p for p in sys.path if p]+[sys.argv.pop(1)];"
    "from lazycluster_agent import bytecode;bytecode.use();from {} import main;main()"
)
_IN_PROGRAMS = ("bytecode", "ownership")  # modules of ours, in a package `lazycluster_agent` beside the program's


class RunningServices(Dict[int, Optional[int]]):
    """The first process of each service of an agent, and when it started."""

    def __init__(self, agent: "Agent") -> None:
        super().__init__()


class _Outlet:
    """Stands between a service and the channel: takes output at any time, so that the service never waits."""

    def __init__(self, channel: "RequestChannel") -> None:
        self.loop: "Loop" = channel.loop
        self.open = True
        self.writable = True
        self.on_input: Callable[[bytes], Any] = lambda _: None
        self.on_input_end: Callable[[], Any] = lambda: None
        self.consumed: Callable[[int], Any] = lambda _: None
        self.tail: Deque[bytes] = deque(maxlen=1000)
        self._channel = channel
        self._held: Deque[Tuple[bool, bytes]] = deque()
        self._held_size = 0
        self._dropped = 0
        channel.on_drain = self.flush

    def put(self, is_error: bool, data: bytes) -> None:
        """Take output."""
        self.tail.append(data[-_TAIL:])
        while sum(map(len, self.tail)) - len(self.tail[0]) >= _TAIL:
            self.tail.popleft()
        self._held.append((is_error, data))
        self._held_size += len(data)
        self.flush()
        while self._held_size > _HELD:
            dropped = len(self._held.popleft()[1])
            self._held_size -= dropped
            self._dropped += dropped

    def flush(self) -> None:
        """Send on what waits."""
        if self._dropped and self._channel.writable:
            text = "\n[lazycluster: {} bytes of output were dropped here, they came faster than they were taken]\n"
            self._channel.stderr(text.format(self._dropped).encode())
            self._dropped = 0
        while self._held and self._channel.writable:
            is_error, data = self._held.popleft()
            self._held_size -= len(data)
            (self._channel.stderr if is_error else self._channel.stdout)(data)

    def end_of_output(self) -> str:
        """Return the end of the output."""
        return b"".join(self.tail).decode("utf-8", "replace")[-_TAIL:]


class _Run(CommandProcess):
    """The process of a service, from one start to its end."""

    def __init__(self, service: "_Service", argv: List[str], env: Dict[str, str], cwd: str) -> None:
        self._service = service
        self._line = b""
        self._error_tail = b""
        super().__init__(cast("RequestChannel", service.outlet), argv, env, cwd, True, False, cores=not service.secret)
        service.running[self.pid] = self._started

    def on_stdout(self, data: bytes) -> None:
        lines = (self._line + data).split(b"\n")
        self._line = lines.pop()
        plain = bytearray()
        for line in lines:
            if self._service.concerns(line):
                self._put(plain)  # so that what it says does not overtake what it printed before
                plain = bytearray() if self._service.heard(line) else bytearray(line + b"\n")
            else:
                plain += line + b"\n"
        if len(self._line) > _LONGEST_LINE:
            plain += self._line
            self._line = b""
        self._put(plain)

    def _put(self, data: bytearray) -> None:
        if data:
            self._service.outlet.put(False, bytes(data))

    def on_stderr(self, data: bytes) -> None:
        self._service.outlet.put(True, data)
        self._error_tail = self._service.looked_at_errors(self._error_tail + data)

    def on_over(self, status: int) -> None:
        self._service.running.pop(self.pid, None)
        if self._line:
            self._service.outlet.put(False, self._line)
        self._service.over(status)

    def _exited(self, status: int) -> None:
        super()._exited(status)
        if not all(pump.ended for pump in self.pumps):
            self.stop(self._service.patience)  # what it left behind may hold its output, and its ports, for ever

    def stop(self, patience: float) -> None:
        """End the process and all that it started, also when it has ended itself."""
        if self.ending is None:
            self.ending = Termination(
                self.channel.loop,
                lambda: tree_of(self.pid, self._started, self.task),
                self._ended,
                ((self._service.stop_signal, patience), (signal.SIGKILL, 1.0)),
            )


class _Service:
    """A supervised program: its process, what it is fed, and what is told about it."""

    def __init__(self, channel: "RequestChannel") -> None:
        params = channel.params
        self.channel = channel
        self.running = channel.agent.shared(RunningServices)
        self.outlet = _Outlet(channel)
        self._task = "{}.{}".format(params.get("task") or "service", os.urandom(6).hex())
        self._marker = (params.get("marker") or "").encode()
        self._ready_text = (params.get("ready") or "").encode()
        self._restarts = RestartPolicy(int(params.get("restarts") or 0))
        self.patience = float(params.get("patience") or _PATIENCE)
        self._ready_port = int(params.get("ready_port") or 0)
        self._ready_host = str(params.get("ready_host") or "127.0.0.1")
        self.stop_signal = getattr(signal, "SIG" + (params.get("stop_signal") or "TERM"))
        self._kept: List[bytes] = []
        self._input_ended = False
        self._ending = False
        # One that was ready under an agent that is lost now is under way again, not for the first time.
        self._was_ready, self._is_ready = bool(params.get("again")), False
        self._ready_since = 0.0
        self._cut_off = False  # it says that it ends since it has lost those that it works with
        self._waiting: Optional[Any] = None
        self._late: Optional[Any] = None
        self._killed_before = oom.killed()
        self._share: Optional[gpus.GpuShare] = None
        self._gpus = gpus.wanted(params)
        self._run: Optional[_Run] = None
        self.secret = not params.get("argv") or bool(params.get("secret"))  # it is told keys and passwords
        self.directory = tempfile.mkdtemp(prefix="service-", dir=channel.agent.directory)
        try:
            self._furnish(params)
        except BaseException:
            remove_tree(self.directory)  # there may be secrets in it by now
            raise
        channel.on_input = self._on_input
        channel.on_input_end = self._on_input_end
        channel.on_control = self._on_control
        channel.on_abandon = self.end

    def _furnish(self, params: Dict[str, Any]) -> None:
        """Make what the program finds when it starts: directories, files, variables, arguments."""
        self._scratch = self._make("scratch")
        self._env = dict(environment(self.channel, self._task), **{SCRATCH: self._scratch})
        for name in self._env.keys() & (params.get("env") or {}).keys():
            self._env[name] = self._filled_in(self._env[name])
        self._cwd = os.path.join(os.path.expanduser("~"), self._filled_in(params.get("cwd") or ""))
        for name, text in (params.get("files") or {}).items():
            fd = os.open(os.path.join(self._scratch, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(self._filled_in(text))
        self._argv = self._arguments(params)

    def _make(self, name: str) -> str:
        path = os.path.join(self.directory, name)
        os.mkdir(path, 0o700)
        return path

    def _filled_in(self, text: str) -> str:
        return text.replace("$" + SCRATCH, self._scratch)

    def _arguments(self, params: Dict[str, Any]) -> List[str]:
        if params.get("argv"):
            return [self._filled_in(str(part)) for part in params["argv"]]
        source = params["source"]  # {"package": name, "module": name, "files": {path in the package: text}}
        folder = self._make("program")
        files = {os.path.join(source["package"], name): text for name, text in source["files"].items()}
        files.update({"lazycluster_agent/{}.py".format(name): text for name, text in texts(_IN_PROGRAMS).items()})
        for name, text in files.items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        boot = _BOOT.format(source["package"] + "." + source["module"])
        python = params.get("python") or shutil.which("python3", path=self._env.get("PATH")) or sys.executable
        return [python, "-c", boot, folder]

    # --- running -------------------------------------------------------------------------------
    def begin(self) -> None:
        """Start the program, once it has the GPUs that it needs: it keeps them when it is started again."""
        if self._gpus is None:
            self.start()
            return
        count, idle = self._gpus
        owner = self.channel.params.get("task") or "a service"
        self._waiting = self.channel.agent.shared(gpus.HostGpus).take(self._env, owner, count, 1, idle, self._given)

    def _given(self, shares: List[gpus.GpuShare], problem: str) -> None:
        if problem:
            self._fail("gpu", problem, {"exit": None, "signal": None})
            return
        self._share = shares[0]
        self._env.update(self._share.variables)
        self.start()

    def start(self) -> None:
        """Start the program, and feed it."""
        self._waiting = None
        self._is_ready = self._cut_off = False
        self.outlet.tail.clear()
        if self._ready_port and not self._was_ready and _answers(self._ready_host, self._ready_port):
            self._tell("message", event="port_taken", detail={"port": self._ready_port})
            problem = "port {} is in use".format(self._ready_port)
            self._fail("service", problem, {"exit": None, "signal": None})
            return
        try:
            self._run = _Run(self, self._argv, self._env, self._cwd)
        except OSError as error:
            name = self._cwd if not os.path.isdir(self._cwd) else self._argv[0]
            self._fail("os", "{}: {}".format(explained(error.strerror), name), {"exit": None, "signal": None})
            return
        except ValueError as error:  # a null character in an argument or a variable
            self._fail("service", str(error), {"exit": None, "signal": None})
            return
        if self._was_ready:
            self._late = self.channel.loop.call_later(_READY_AGAIN, self._too_late)
        self._tell("starting", pid=self._run.pid, gpus=self._share.gpus if self._share else [])
        for data in self._kept:
            self._run.channel.on_input(data)
        if self._input_ended:
            self._run.channel.on_input_end()
        if self._ready_port:
            self._look_at_port(self._run)
        elif not self._marker and not self._ready_text:
            self._ready({})

    def _look_at_port(self, run: _Run) -> None:
        if self._run is run and not self._is_ready:
            if _answers(self._ready_host, self._ready_port):
                self._ready({})
            else:
                self.channel.loop.call_later(_LOOK_AT_PORT, lambda: self._look_at_port(run))

    def looked_at_errors(self, data: bytes) -> bytes:
        """Look for what says that it is ready; returns the end of the data, where a part of that may be."""
        if not self._ready_text or self._is_ready:
            return b""
        if self._ready_text in data:
            self._ready({})
        return data[-len(self._ready_text) :]

    def _tell(self, state: str, **fields: Any) -> None:
        self.channel.event(state=state, restarts=self._restarts.count, **fields)

    def _ready(self, detail: Dict[str, Any]) -> None:
        if not self._is_ready and self._run is not None:
            self._in_time()
            self._is_ready = self._was_ready = True
            self._ready_since = time.monotonic()
            self._tell("ready", pid=self._run.pid, detail=detail)

    def _too_late(self) -> None:
        """End a start that does not come to an end; it counts as one that failed."""
        if self._run is not None:
            self._run.stop(self.patience)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def concerns(self, line: bytes) -> bool:
        """Return whether a line of output may be meant for us."""
        return any(text and text in line for text in (self._marker, self._ready_text))

    def heard(self, line: bytes) -> bool:
        """Look at a line of output; returns whether nothing is left to be done about it."""
        # Other processes of the service write to the same pipe: there may be half a line of theirs before the marker.
        before, marker, text = line.partition(self._marker) if self._marker else (line, b"", b"")
        if marker:
            try:
                message = json.loads(text)
                event = message.pop("event")
            except (ValueError, KeyError, AttributeError):
                return False
            if before:
                self.outlet.put(False, before + b"\n")
            if event == "ready":
                self._ready(message)
            elif event == "cut_off":
                self._cut_off = time.monotonic() - self._ready_since > _LASTED
            else:
                self._tell("message", event=event, detail=message)
            return True
        if self._ready_text and self._ready_text in line:
            self.outlet.put(False, line + b"\n")
            self._ready({})
            return True
        return False

    # --- input and control ---------------------------------------------------------------------
    def _on_input(self, data: bytes) -> None:
        self._kept.append(data)
        self.channel.consumed(len(data))
        if self._run is not None:
            self._run.channel.on_input(data)

    def _on_input_end(self) -> None:
        self._input_ended = True
        if self._run is not None:
            self._run.channel.on_input_end()

    def _on_control(self, message: Dict[str, Any]) -> None:
        if message.get("forget"):  # what comes from now on is what it is fed when it is started again
            self._kept.clear()
        name = message.get("signal")
        if name == "END":
            self.end()
        elif name and self._run is not None:
            self._run.signal(str(name))

    # --- the end -------------------------------------------------------------------------------
    def over(self, status: int) -> None:
        """Handle the end of the process: all is over, or it is started again."""
        run, self._run = self._run, None
        self._in_time()
        ended: Dict[str, Any] = dict(outcome(status))
        if ended["signal"] == signal.SIGKILL:
            before, self._killed_before = self._killed_before, oom.killed()
            ended["out_of_memory"] = oom.verdict(before, self._killed_before)
        fields = dict(ended, pid=run.pid if run else None, output=self.outlet.end_of_output())
        self._tell("exited", **fields)
        if self._ending:
            self._finish(lambda: self.channel.result(restarts=self._restarts.count, **ended))
        elif ended["exit"] == 0 and self._was_ready:
            self._clear_up(lambda: self._finish(lambda: self.channel.result(restarts=self._restarts.count, **ended)))
        elif not self._was_ready:
            self._clear_up(lambda: self._fail("service", "it ended before it was ready", ended))
        else:
            self._clear_up(lambda: self._again(ended))

    def _clear_up(self, then: Callable[[], Any]) -> None:
        """End what the process left behind before anything else happens: it may hold ports or files."""
        stages = ((signal.SIGTERM, 0.5), (signal.SIGKILL, 1.0))
        Termination(self.channel.loop, lambda: tree_of(0, None, self._task), then, stages)

    def _again(self, ended: Dict[str, Any]) -> None:
        if self._ending:
            self._finish(lambda: self.channel.result(restarts=self._restarts.count, **ended))
            return
        delay = self._restarts.next(blameless=self._cut_off)
        if delay is None:
            self._fail("service", self._restarts.exhausted(), ended)
            return
        self._tell("restarting", delay=delay, out_of_memory=ended.get("out_of_memory", ""))
        self._waiting = self.channel.loop.call_later(delay, self.start)

    def end(self) -> None:
        """End the service in stages."""
        if self._ending:
            return
        self._ending = True
        if self._run is not None:
            self._run.stop(self.patience)
        elif self._waiting is not None:
            self._waiting.cancel()
            self._finish(lambda: self.channel.result(restarts=self._restarts.count, exit=None, signal=None))

    def _fail(self, kind: str, message: str, ended: Dict[str, Any]) -> None:
        fields = dict(ended, output=self.outlet.end_of_output(), ready=self._was_ready)
        self._tell("failed", **fields)
        self._finish(lambda: self.channel.fail(kind, message, restarts=self._restarts.count, **fields))

    def _finish(self, tell: Callable[[], Any]) -> None:
        if self._share is not None:
            self._share.release()
        remove_tree(self.directory)
        self.outlet.flush()
        tell()


def _answers(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(_CONNECT_LIMIT)
        return probe.connect_ex((host, port)) == 0


def service(channel: "RequestChannel") -> None:
    """Handle the request `service`: run a program until the manager ends it, and start it again when it dies.

    It is asked for as `argv`, or as `source` (a small package of modules, one of which has a `main`) for `python`.
    INPUT goes to its standard input and is kept, to be fed again at a restart. `files` are put into its scratch
    directory, whose path stands for $LAZYCLUSTER_SCRATCH in arguments, variables, files and `cwd`.

    It is ready when it prints a line with the text `ready`, or a line of `marker` and a JSON object
    {"event": "ready", ...}, or when `ready_port` of `ready_host` answers; with nothing of that, at once. It is started
    again, at most `restarts` times in a while, if it was ready once and ends with anything but status 0; with `again`
    it is taken for one that was ready before.

    With `gpus`, e.g. {"count": 1, "idle": true}, it gets as many GPUs for itself, of those that others do not use; if
    the host has too few, it is the error "gpu".
    """
    _Service(channel).begin()
