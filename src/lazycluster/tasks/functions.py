"""Calls of functions on a host, from the manager's side: their requests and their outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import linecache
import pickle
import pkgutil
import re
import signal as signals
import stat
import sys
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle

from lazycluster.agent.localmodules import Source
from lazycluster.core import event_loop
from lazycluster.core.words import signal_name
from lazycluster.exceptions import AgentError
from lazycluster.ssh.agent_replies import AgentInfo
from lazycluster.ssh.channel import Collected
from lazycluster.ssh.connection import Connection

from . import local_code
from .host_paths import path_hint
from .limits import memory_hint
from .pickling import PickledCall, dump_call

_SEARCH_LIMIT = 120.0  # seconds to look through the host's interpreters
END_PATIENCE = 5.0  # seconds that a cancelled call gets to end on the host
_SMALL = 1024 * 1024  # bytes of a result that is unpickled on the loop's thread
_LARGEST_SOURCE = 16 * 1024 * 1024  # bytes
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d{1,9})(?:, in .*)?$')

# What is known of an agent ends with it; the connection may lead to another one later.
_libraries: weakref.WeakKeyDictionary[AgentInfo, str] = weakref.WeakKeyDictionary()
_interpreters: weakref.WeakKeyDictionary[AgentInfo, dict[str, str]] = weakref.WeakKeyDictionary()  # by PATH


@dataclass(frozen=True)
class CallOutcome:
    """The outcome of a call.

    Attributes:
        status: "returned", "raised", "exited" or "killed".
        value: What the function returned.
        exception: What it raised, if that could be sent; its traceback is in `traceback`.
        type_name: The name of the exception's class.
        message: The exception's text.
        traceback: The traceback on the host, as text.
        hint: What to do about it, if the host knows.
        phase: What the host was doing: "load" (importing what the call needs), "run", or "result" (pickling it).
        exit: The exit status of its process, if it ended without an outcome.
        signal: The signal that ended it.
        limit: The limit of the task that it was ended for: "wall", or "".
        out_of_memory: What had no memory left when it was killed: "limit", "host" or "".
    """

    status: str
    value: Any = None
    exception: BaseException | None = None
    type_name: str = ""
    message: str = ""
    hint: str = ""
    traceback: str = ""
    phase: str = ""
    exit: int | None = None
    signal: int | None = None
    limit: str = ""
    out_of_memory: str = ""

    def describe(self, name: str) -> str:
        """Return a message for the user about a call that returned nothing.

        Args:
            name: What the function is called.
        """
        if self.status == "exited":
            return f"{name}() ended its process with exit status {self.exit} and returned nothing"
        if self.status == "killed":
            why = memory_hint(self.out_of_memory) if self.signal == signals.SIGKILL else ""
            by = "an unknown cause (the process that it was forked from has ended)"
            return f"{name}() was ended by {by if self.signal is None else signal_name(self.signal)}{why}"
        headline = f"{self.type_name}: {self.message}" if self.message else self.type_name
        starts = {"load": f"{name}() could not be loaded on the host: ", "result": ""}
        start = starts.get(self.phase, f"{name}() raised ")
        text = start + headline
        if self.hint:
            text += f"\n  Next step: {self.hint}"
        elif self.type_name == "ModuleNotFoundError":
            text += (
                '\n  Next step: have the manager\'s packages on the host with environment="manager" (which leaves out '
                'tools: EnvironmentSpec("manager", exclude=[]) has them, too), install it there, or choose another '
                "interpreter with python="
            )
        if self.traceback:
            text += f"\nTraceback on the host:\n{self.traceback.rstrip()}"
        return text


async def call(
    connection: Connection,
    function: Callable[..., Any] | PickledCall,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    task: str = "",
    stdout: Callable[[bytes], Any] | None = None,
    stderr: Callable[[bytes], Any] | None = None,
    event: Callable[[dict[str, Any]], Any] | None = None,
    limits: Mapping[str, Any] | None = None,
) -> CallOutcome:
    """Call a function in a process of its own on a host.

    Args:
        connection: The host.
        function: The function; or a call that was pickled before (best done outside the loop's thread, and once for
            many hosts), which then has its arguments already.
        args: Positional arguments.
        kwargs: Keyword arguments.
        python: The interpreter on the host: a path, a name on the PATH, or "auto"; by default `python3`.
        env: What to add to the host's environment.
        cwd: The working directory; relative to the home directory.
        task: The name that all its processes carry.
        stdout: Is called with what it prints, as it comes.
        stderr: The same for standard error.
        event: Is called with {"pid": ...} when its process is there.
        limits: What it may use: see :class:`~lazycluster.tasks.limits.Limits`.

    Returns:
        The outcome. When the coroutine is cancelled, the process and all its descendants are ended first.

    Raises:
        TypeError: If the call cannot be pickled.
        AgentError: If it could not be started: the kind is "python", "mismatch" or "os".
        ConnectionLostError: If the connection ended.
    """
    pickled = function if isinstance(function, PickledCall) else dump_call(function, args, kwargs)
    variables = dict(env or {})
    if python == "auto":
        python = await resolve_auto(connection, variables)
    params = {
        **_params(pickled, python, variables, cwd, task),
        "limits": dict(limits or {}),
        **library_for(connection),
    }
    received = Collected()
    channel = connection.channel("call", params, stdout=stdout, stderr=stderr, output=received.add, event=event)
    received.channel = channel
    try:
        for part in pickled.parts:
            await channel.send(part)
        await channel.send_end()
        result = await channel.result()
    except asyncio.CancelledError:
        channel.control(signal="END")
        if not await connection.wait_while_heard(asyncio.ensure_future(channel.result()), END_PATIENCE):
            channel.close()
        raise
    return await outcome_of(result, received.taken())


def _params(pickled: PickledCall, python: str | None, env: dict[str, str], cwd: str, task: str) -> dict[str, Any]:
    return {
        "python": python,
        "env": env,
        "cwd": cwd,
        "task": task,
        "name": pickled.name,
        "imports": list(pickled.imports),
        "fresh": pickled.fresh,
        "version": list(sys.version_info[:3]),
    }


def params_for_new_agent(
    pickled: PickledCall, python: str | None, env: dict[str, str], cwd: str, task: str
) -> dict[str, Any]:
    """Return the parameters of a call for an agent that knows nothing yet."""
    digest, sources = _library()
    return {**_params(pickled, python, env, cwd, task), "library": digest, "sources": sources}


async def resolve_auto(connection: Connection, env: Mapping[str, str]) -> str:
    """Return the host's interpreter of the manager's minor version: `python3` if it is one, else the first that is.

    Raises:
        AgentError: If it has none; the message names those that it has.
    """
    known = _interpreters.setdefault(connection.agent_info, {})
    path = env.get("PATH", "")
    if path in known:
        return known[path]
    wanted = list(sys.version_info[:2])
    with contextlib.suppress(AgentError):
        usual = await connection.request("packages", within=_SEARCH_LIMIT, python="python3", env=dict(env), names=[])
        if usual["version"][:2] == wanted:
            known[path] = "python3"
            return "python3"
    found = (await connection.request("interpreters", within=_SEARCH_LIMIT, env=dict(env)))["interpreters"]
    for one in found:
        if one["version"][:2] == wanted:
            known[path] = str(one["path"])
            return known[path]
    names = ", ".join(f"{one['path']} ({'.'.join(map(str, one['version']))})" for one in found) or "none"
    version = ".".join(map(str, wanted))
    raise AgentError(
        connection.host,
        "mismatch",
        f"no Python {version}, the manager's version, was found; the host has: {names}"
        '\n  Next step: have it and the manager\'s packages there with environment="manager"; or install Python '
        f'{version} there, or name it with python="/path/to/python{version}"',
        {"interpreters": found},
    )


# --- the pickling library -------------------------------------------------------------------------
def library_for(connection: Connection) -> dict[str, Any]:
    """Return the parameters of a call that name the pickling library: its digest; at first also its sources."""
    digest, sources = _library()
    if _libraries.get(connection.agent_info) == digest:
        return {"library": digest}
    _libraries[connection.agent_info] = digest
    return {"library": digest, "sources": sources}


@functools.cache
def _library() -> tuple[str, dict[str, Source]]:
    root = Path(cloudpickle.__file__).parent
    sources = {}
    for name in ["__init__", *(module.name for module in pkgutil.iter_modules([str(root)]))]:
        text = (root / f"{name}.py").read_text(encoding="utf-8")
        full = "cloudpickle" if name == "__init__" else f"cloudpickle.{name}"
        sources[full] = (text, name == "__init__", f"<cloudpickle of the manager>/{name}.py", "")
    return hashlib.sha256(repr(sources).encode()).hexdigest(), sources


# --- what comes back ------------------------------------------------------------------------------
class _Received(io.RawIOBase):
    """Reads from the parts in which a result arrived, and takes each out of the list when it was read."""

    def __init__(self, parts: list[bytes]) -> None:
        parts.reverse()
        self._parts = parts
        self._offset = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._parts:
            return 0
        part = self._parts[-1]
        count = min(len(buffer), len(part) - self._offset)
        buffer[:count] = memoryview(part)[self._offset : self._offset + count]
        self._offset += count
        if self._offset == len(part):
            self._parts.pop()
            self._offset = 0
        return count


class _ImportNeededError(Exception):
    pass


class _QuickUnpickler(pickle.Unpickler):
    """Refuses to import anything, which could take long."""

    def find_class(self, module: str, name: str) -> Any:
        if module not in sys.modules:
            raise _ImportNeededError
        return super().find_class(module, name)


def load_parts(parts: list[bytes], quick: bool) -> Any:
    """Unpickle what came in parts; they are freed on the way. If `quick`, nothing is imported.

    Raises:
        Exception: Whatever a class's own code raises; see `loads`.
    """
    file = io.BufferedReader(_Received(parts), 128 * 1024)
    return _loaded((_QuickUnpickler if quick else pickle.Unpickler)(file).load)


def loads(data: bytes) -> Any:
    """Unpickle what came in one piece.

    Raises:
        Exception: Whatever a class's own code raises, and what it imports: a script may even call `sys.exit`.
    """
    return _loaded(pickle.loads, data)


def _loaded(load: Callable[..., Any], *data: bytes) -> Any:
    try:
        return load(*data)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise pickle.UnpicklingError(f"it raised {type(error).__name__}: {error}") from error


async def _load_async(parts: list[bytes]) -> Any:
    """Unpickle: small things at once, large ones and those that import something in a thread, to keep the loop free."""
    if sum(map(len, parts)) <= _SMALL:
        try:
            return load_parts(parts, True)
        except _ImportNeededError:
            pass
    return await event_loop.in_thread(load_parts, parts, False)


async def outcome_of(result: Mapping[str, Any], parts: list[bytes]) -> CallOutcome:
    """Return the outcome of a call, from the agent's answer and the parts of its output."""
    status = result["status"]
    if status in ("exited", "killed"):
        return CallOutcome(
            status,
            exit=result.get("exit"),
            signal=result.get("signal"),
            limit=result.get("limit", ""),
            out_of_memory=result.get("out_of_memory", ""),
        )
    try:
        value = await _load_async(parts)
    except MemoryError as error:
        parts.clear()
        error.__traceback__ = None  # it holds what was unpickled so far
        text = f"the result came, but there is no memory left here to unpickle it: {error}"
        return CallOutcome("raised", exception=error, type_name="MemoryError", message=text, phase="result")
    except Exception as error:  # noqa: BLE001  (whatever a class's own code raises)
        text = f"the result came, but cannot be unpickled here: {type(error).__name__}: {error}"
        return CallOutcome("raised", exception=error, type_name=type(error).__qualname__, message=text, phase="result")
    if status == "returned":
        return CallOutcome("returned", value=value)
    exception = None
    if value["exception"] is not None:
        with contextlib.suppress(Exception):  # whatever a class's own code raises; its text must suffice
            exception = await _load_async([value["exception"]])
    return raised_outcome(value, result.get("phase", ""), exception)


def raised_outcome(fields: Mapping[str, Any], phase: str, exception: object) -> CallOutcome:
    """Return the outcome of a call that has raised an exception.

    Args:
        fields: What the host says of the exception.
        phase: What the host was doing, see :class:`CallOutcome`.
        exception: The exception itself, if it could be unpickled.
    """
    outcome = CallOutcome(
        "raised",
        exception=exception if isinstance(exception, BaseException) else None,
        type_name=fields["type"],
        message=fields["message"],
        phase=phase,
    )
    if phase == "result":
        kind = fields["result_type"].removeprefix("builtins.")
        text = f"the result, a {kind}, cannot be sent back ({outcome.message})\n  Next step: return plain data"
        return replace(outcome, message=text + (", for instance a list of its items" if "generator" in kind else ""))
    return replace(
        outcome, hint=fields.get("hint", "") or path_hint(exception), traceback=with_source_lines(fields["traceback"])
    )


def with_source_lines(text: str) -> str:
    """Have a traceback show the lines of code that the manager has: no host has them, or some have older ones.

    Args:
        text: The traceback, as the host shows it.
    """
    lines = deque(text.splitlines())
    found = []
    while lines:
        found.append(lines.popleft())
        match = _FRAME.match(found[-1])
        if match is None:
            continue
        shown = []
        while lines and lines[0].startswith("    "):
            shown.append(lines.popleft())
        code = _line_here(match["file"], int(match["line"]))
        if code and (not shown or (shown[0].strip() != code and local_code.is_local_file(match["file"]))):
            shown = [f"    {code}"]
        found += shown
    return "\n".join(found)


def _line_here(file: str, number: int) -> str:
    """Return a line of a file on the manager. It is the host that names the file: only sources are read."""
    if file not in linecache.cache:  # where notebooks have their cells, too
        try:
            status = Path(file).stat()
        except (OSError, ValueError):
            return ""
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= _LARGEST_SOURCE:
            return ""
    return linecache.getline(file, number).strip()
