"""Functions: calls that are forked from zygotes, and questions about the interpreters of the host."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct

from .commands import Feed, environment, outcome
from .paths import expand
from .processes import Ending, Pump, descendants, pipe, start_time, tree_of
from .wire import MAX_PAYLOAD
from .zygotes import Zygotes

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

    from .session import Channel
    from .zygotes import Interpreter

LINGER = 0.05  # seconds for which output is awaited that a process left to others when it ended
_HEAD = struct.Struct("!I")
_zygotes: Dict[Any, Zygotes] = {}  # of each agent; there is one, except in tests


def zygotes_of(channel: Channel) -> Zygotes:
    """Return what the agent keeps."""
    return _zygotes.setdefault(channel.agent, Zygotes(channel.agent))


class Answer:
    """What a child of a zygote sends over its socket: a description, then as many bytes as that says.

    Args:
        channel: Where the bytes go.
        fd: The socket, which this closes.
        on_end: Is called at the end of the stream.
    """

    def __init__(self, channel: Channel, fd: int, on_end: Callable[[], Any]) -> None:
        self.description: Optional[Dict[str, Any]] = None
        self.ended = False
        self.count = 0  # bytes that have come so far
        self._channel, self._fd, self._on_end = channel, fd, on_end
        self._head = bytearray()
        self._left = 0
        self._reading = False
        self.resume()

    @property
    def complete(self) -> bool:
        """Whether all of it has come."""
        return self.description is not None and self._left == 0

    def resume(self) -> None:
        """Read on."""
        if not self._reading and not self.ended:
            self._reading = True
            self._channel.loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        if self._channel.open and not self._channel.writable:
            self._pause()
            return
        try:
            data = os.read(self._fd, MAX_PAYLOAD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.count += len(data)
        if not data:
            self.close()
            self._on_end()
        elif self.description is None:
            self._parse(data)
        else:
            self._relay(data)

    def _parse(self, data: bytes) -> None:
        self._head += data
        if len(self._head) < _HEAD.size:
            return
        end = _HEAD.size + _HEAD.unpack_from(self._head)[0]
        if len(self._head) >= end:
            description = json.loads(bytes(self._head[_HEAD.size : end]))
            self._left = description["size"]
            self.description = description
            self._relay(bytes(self._head[end:]))
            self._head.clear()

    def _relay(self, data: bytes) -> None:
        self._left -= len(data)
        if data:
            self._channel.output(data)

    def _pause(self) -> None:
        self._reading = False
        self._channel.loop.remove_reader(self._fd)

    def close(self) -> None:
        """Stop reading."""
        if not self.ended:
            if self._reading:
                self._pause()
            self.ended = True
            os.close(self._fd)


class Work:
    """A process that a zygote forks for a request.

    Args:
        channel: The request.
        interpreter: Where it is forked.
        message: What the child is told.
        on_done: Is called with the fields of the result when it is over.
    """

    def __init__(
        self,
        channel: Channel,
        interpreter: Interpreter,
        message: Dict[str, Any],
        on_done: Callable[[Dict[str, Any]], Any],
    ) -> None:
        self._channel, self._interpreter, self._on_done = channel, interpreter, on_done
        self._message = message
        self._task = message.get("task") or ""
        self._pid = 0
        self._started: Optional[int] = None
        self._seen_pids: Dict[int, int] = {}
        self._status: Optional[int] = None
        self._gone = False  # whether the process has ended
        self._over = False
        self._wanted_end = False
        self._ending: Optional[Ending] = None
        self._linger: Any = None
        self._early: List[bytes] = []  # input that came before the process was there
        self._printed = 0
        self._seen = -1
        self._out: Any = None
        self._err: Any = None
        self._answer: Any = None
        self._feed: Any = None
        channel.on_input = self._early.append
        channel.on_control = lambda said: self.signal(str(said.get("signal", "END")))
        channel.on_abandon = self.end
        channel.on_drain = self._resume

    def start(self) -> None:
        """Have it forked."""
        if self._wanted_end:
            self._finish()
            return
        channel = self._channel
        out, their_out = pipe()
        err, their_err = pipe()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._out = Pump(channel, out, self._stdout, self._maybe_over)
        self._err = Pump(channel, err, self._stderr, self._maybe_over)
        # Two descriptors of one socket: what is written ends before what is read.
        self._feed = Feed(channel, os.dup(ours.fileno()))
        self._answer = Answer(channel, ours.detach(), self._maybe_over)
        for data in self._early:
            channel.on_input(data)
        self._early.clear()
        fresh = bool(channel.params.get("fresh"))
        self._interpreter.fork(self._message, [their_out, their_err, theirs.detach()], fresh, self._report)

    def _stdout(self, data: bytes) -> None:
        self._printed += len(data)
        self._channel.stdout(data)

    def _stderr(self, data: bytes) -> None:
        self._printed += len(data)
        self._channel.stderr(data)

    def _report(self, said: Dict[str, Any]) -> None:
        if "status" in said:
            self._gone = True
            self._status = said["status"]
            self._maybe_over()
            if not self._over:
                self._await_rest()
        else:
            self._pid = said["pid"]
            self._started = start_time(self._pid)
            self._channel.event(pid=self._pid)
            if self._wanted_end:
                self.end()

    def _resume(self) -> None:
        for source in (self._out, self._err, self._answer):
            if source is not None:
                source.resume()

    # --- the end -------------------------------------------------------------------------------
    def _maybe_over(self) -> None:
        if self._ending is not None:
            return  # a call that is being ended is over when nothing is left of it
        if self._out is None or not (self._out.ended and self._err.ended and self._answer.ended):
            return
        if self._gone or self._answer.complete:
            self._finish()

    def _await_rest(self) -> None:
        """Wait for what the process wrote before it ended, though children of it may hold its streams open."""
        if self._over or self._ending is not None:
            return
        loop = self._channel.loop
        moved = self._printed + self._answer.count
        if moved == self._seen and (self._channel.writable or not self._channel.open):
            self._finish()
            return
        self._seen = moved
        self._linger = loop.call_later(LINGER, self._await_rest)

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        if self._linger is not None:
            self._linger.cancel()
        for source in (self._out, self._err, self._answer, self._feed):
            if source is not None:
                source.close()
        fields: Dict[str, Any] = {"exit": None, "signal": None}
        if self._status is not None:
            fields = outcome(self._status)
        elif self._wanted_end and not self._pid:
            fields["signal"] = int(signal.SIGTERM)
        if self._answer is not None and self._answer.complete:
            description = dict(self._answer.description or {})
            self._interpreter.note(description.pop("imported", ()))
            fields.update(description)
        else:
            fields["status"] = "exited" if fields["exit"] is not None else "killed"
        self._on_done(fields)

    # --- signals -------------------------------------------------------------------------------
    def signal(self, name: str) -> None:
        """Send a signal to the process group by name, or end the whole tree in stages for "END"."""
        if name == "END" or not self._pid:
            self.end()
        elif not self._gone:
            number = getattr(signal, "SIG" + name)
            try:
                os.killpg(self._pid, number)
            except ProcessLookupError:  # it was forked so recently that it has no group yet
                self.end()
            except PermissionError:
                pass

    def end(self) -> None:
        """End the process and all that it started."""
        self._wanted_end = True
        if self._pid and self._ending is None and not self._over:
            self._ending = Ending(self._channel.loop, self._tree, self._ended)

    def _tree(self) -> List[int]:
        """Return the processes of the call that live, children that lost their parents meanwhile included.

        Those that were forked and run no other program show the environment of the zygote: no marker tells them.
        """
        living = [pid for pid, started in self._seen_pids.items() if start_time(pid) == started]
        found = {*living, *descendants(living), *tree_of(self._pid, self._started, self._task)}
        self._seen_pids = {pid: started for pid, started in ((pid, start_time(pid)) for pid in found) if started}
        return list(self._seen_pids)

    def _ended(self) -> None:
        self._ending = None
        if self._gone:
            self._finish()


# --- requests -------------------------------------------------------------------------------------
def call(channel: Channel) -> None:
    """Handle the request `call`: a pickled function, whose outcome is the channel's OUTPUT."""
    params = channel.params
    zygotes = zygotes_of(channel)
    digest = params["library"]
    if params.get("sources"):
        zygotes.libraries[digest] = json.dumps({"library": params["sources"]}).encode("ascii")
    library = zygotes.libraries.get(digest)
    if library is None:
        channel.fail("value", "the pickling library was not sent")
        return
    env = environment(channel)
    interpreter = _interpreter(channel, zygotes, env)
    if interpreter is None:
        return
    message = {
        "kind": "call",
        "cwd": expand(params.get("cwd") or "", "", env),
        "task": params.get("task") or "",
        "name": params.get("name") or "",
    }
    work = Work(channel, interpreter, message, lambda fields: _called(channel, fields))

    def ready() -> None:
        if interpreter.error:
            _fail_start(channel, params.get("python"), interpreter.error)
        elif interpreter.facts["version"][:2] != params["version"][:2]:
            _mismatch(channel, zygotes, interpreter, env)
        else:
            interpreter.give_library(digest, library or b"")
            interpreter.prepare([] if params.get("fresh") else params.get("imports") or [], work.start)

    interpreter.when_ready(ready)


def _called(channel: Channel, fields: Dict[str, Any]) -> None:
    if fields["status"] == "failed":
        channel.fail("os", fields["message"], path=fields.get("path"))
    else:
        channel.result(**fields)


def _interpreter(channel: Channel, zygotes: Zygotes, env: Dict[str, str]) -> Optional[Interpreter]:
    python = channel.params.get("python")
    try:
        return zygotes.get(python, env)
    except OSError as error:
        _fail_start(channel, python, error.strerror or str(error))
        return None


def _fail_start(channel: Channel, python: Optional[str], why: str) -> None:
    channel.fail("python", "the interpreter {} cannot be started: {}".format(python or "python3", why), python=python)


def _mismatch(channel: Channel, zygotes: Zygotes, interpreter: Interpreter, env: Dict[str, str]) -> None:
    """Answer that the versions differ, with what else the host has to offer."""
    wanted = channel.params["version"]
    version = interpreter.facts["version"]

    def tell(fields: Dict[str, Any]) -> None:
        found: List[Dict[str, Any]] = (fields.get("fields") or {}).get("interpreters") or []
        names = ["{} ({})".format(one["path"], _dotted(one["version"])) for one in found]
        fitting = [one["path"] for one in found if one["version"][:2] == wanted[:2]]
        if fitting:
            step = 'choose {} with python="{}" or python="auto"'.format(_dotted(wanted[:2]), fitting[0])
        else:
            step = "install Python {} on the host, or use the host's version on this side".format(_dotted(wanted[:2]))
        channel.fail(
            "mismatch",
            "Python {} on this side, but {} on the host ({}): a function needs the same minor version on both. "
            "The host has: {}. Next step: {}".format(
                _dotted(wanted), _dotted(version), interpreter.facts["executable"], ", ".join(names) or "no other", step
            ),
            version=version,
            executable=interpreter.facts["executable"],
            interpreters=found,
        )

    Work(channel, interpreter, {"kind": "interpreters", "cwd": "/"}, tell).start()


def _dotted(version: List[int]) -> str:
    return ".".join(str(part) for part in version)


def packages(channel: Channel) -> None:
    """Handle the request `packages`: the versions of what is installed for an interpreter."""
    _ask(channel, {"kind": "packages", "names": [str(name) for name in channel.params.get("names") or []]}, False)


def interpreters(channel: Channel) -> None:
    """Handle the request `interpreters`: those that the host has."""
    _ask(channel, {"kind": "interpreters"}, True)


def _ask(channel: Channel, message: Dict[str, Any], own: bool) -> None:
    """Have a zygote's child answer a question."""
    zygotes = zygotes_of(channel)
    env = environment(channel)
    interpreter = zygotes.own(env) if own else _interpreter(channel, zygotes, env)
    if interpreter is None:
        return
    asked = interpreter

    def done(fields: Dict[str, Any]) -> None:
        if fields["status"] == "answered":
            channel.result(**fields["fields"])
        else:
            channel.fail("python", "the interpreter gave no answer", **fields)

    work = Work(channel, asked, message, done)

    def ready() -> None:
        if asked.error:
            _fail_start(channel, channel.params.get("python"), asked.error)
        else:
            work.start()

    asked.when_ready(ready)
