"""Tasks that go on when the manager ends: started here, found again from any process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lazycluster.core import event_loop
from lazycluster.exceptions import (
    AgentError,
    ConnectionLostError,
    LazyclusterError,
    NoAnswerError,
    TaskExecutionError,
    printable,
)
from lazycluster.output.lines import Tail
from lazycluster.ssh.channel import Channel, Collected
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.destination import parse_destination
from lazycluster.ssh.link import AgentLink

from . import detached_records
from .context import checked_variables
from .detached_records import DetachedRecord
from .limits import Limits
from .step_runner import exit_error, pickle_calls
from .steps import RunCommand, RunFunction

if TYPE_CHECKING:
    from .context import Context, ExecutionOptions
    from .pickling import PickledCall
    from .task import RuntimeTask

__all__ = [
    "DetachedCommand",
    "DetachedState",
    "DetachedTask",
    "check_options",
    "detachable_calls",
    "detached_states",
    "detached_tasks",
    "start_command",
    "start_detached",
    "start_problem",
]

_logger = logging.getLogger("lazycluster")

_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
_START_LIMIT = 120.0  # seconds for it to be on its way
_STOP_LIMIT = 10.0  # seconds for an agent that cannot start it to end
_PART = 1024 * 1024  # bytes of a call that are sent within that time
_ANSWER_LIMIT = 30.0
_END_LIMIT = 20.0  # seconds for a task to end that is cancelled
_LOG_SHOWN = 64 * 1024 * 1024  # bytes of a log
_FIRST_POLL, _LONGEST_POLL = 0.05, 2.0  # seconds between two requests for the state of a task


@dataclass(frozen=True)
class DetachedCommand:
    """A command that is to go on by itself; what may be secret is in no `repr`.

    Attributes:
        name: Its name.
        line: A line for the host's shell.
        argv: Or a program and its arguments.
        script: A Python script, whose path becomes the first argument.
        label: The command, as it is shown.
        cwd: The directory, by default the home directory.
        env: Environment variables.
        startup_files: When the shell reads its start-up files.
        time_limit: Seconds after which it is ended.
    """

    name: str
    line: str = field(default="", repr=False)
    argv: tuple[str, ...] = field(default=(), repr=False)
    script: bytes = field(default=b"", repr=False)
    label: str = field(default="", repr=False)
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    startup_files: str = "once"
    time_limit: float | None = None


class DetachedTask:
    """A task on a host that does not end with the process that started it.

    Get one from ``runtime.execute_task(task, detach=True)``, and any time later, from any process of yours, from
    ``runtime.detached_tasks()``. It ends when it is done, when :meth:`cancel` is called, or when its host is restarted;
    what is known of it stays on the host, in a directory that only your account can read, until :meth:`remove`.

    Attributes:
        id: Its name on the host.
        name: The name of the task.
        host: Its host.
        created: When it was started, in seconds since 1970.
    """

    def __init__(self, connection: Connection, about: Mapping[str, Any], record: DetachedRecord | None = None) -> None:
        self.id = str(about["id"])
        self.name = printable(str(about.get("name")))
        self.host = connection.host
        self.created = float(about.get("created") or 0)
        self._connection = connection
        self._record = record  # None: it is looked for when it is needed

    # --- state and output ----------------------------------------------------------------------
    async def _ask(self, do: str, **params: Any) -> dict[str, Any]:
        return await _request(self._connection, do=do, id=self.id, **params)

    async def _about(self) -> dict[str, Any]:
        return dict((await self._ask("state"))["task"])

    async def _about_heard(self) -> dict[str, Any]:
        """Return what the host tells of it; while its link is interrupted, that is waited for."""
        while True:
            try:
                return await self._about()
            except (AgentError, ConnectionLostError):
                raise
            except LazyclusterError:
                if self._connection.state != "interrupted":
                    raise

    async def _log_from(self, offset: int, take: Callable[[bytes], Any]) -> int:
        """Have its log read from a byte on; return the number of the byte at which that ended."""
        return int((await self._read(take, do="log", offset=offset))["end"])

    @property
    def state(self) -> str:
        """``running``, ``done``, ``failed``, ``cancelled``, or ``lost`` (its host was restarted, or it was killed)."""
        return str(event_loop.run(self._about())["state"])

    def log(self) -> str:
        """Return what it has printed so far; of very much the beginning and the end, with a line that says so."""
        tail = Tail(_LOG_SHOWN)
        event_loop.run(self._read(tail.put, do="log"))
        text = tail.text()
        return f"[the log is longer; this is the end of it]\n{text}" if tail.cut else text

    async def _read(
        self, take: Callable[[bytes], Any], received: Collected | None = None, *, do: str, **params: Any
    ) -> dict[str, Any]:
        came = 0

        def put(data: bytes) -> None:
            nonlocal came
            came += len(data)
            take(data)

        channel = self._connection.channel("detached", {"id": self.id, "do": do, **params}, output=put)
        if received is not None:
            received.channel = channel
        what = f"more of the {do} of the detached task {self.name!r}"
        return await self._connection.result_of(channel, what, _ANSWER_LIMIT, lambda: came)

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, however it ends.

        Args:
            timeout: Seconds; None: as long as it takes.

        Raises:
            TimeoutError: If it takes longer; it goes on.
        """
        event_loop.run(self._ended(timeout))

    async def _ended(self, timeout: float | None) -> dict[str, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        delay = _FIRST_POLL
        while (about := await self._about_heard())["state"] == "running":
            left = delay if deadline is None else min(delay, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"the detached task {self.name!r} on {self.host} has not ended within {timeout} s")
            await asyncio.sleep(left)
            delay = min(2 * delay, _LONGEST_POLL)
        return about

    def result(self, timeout: float | None = None, *, trust_host: bool = False) -> Any:
        """Wait for its end and return what its last function returned, None if it has none.

        What a function returned or raised is unpickled here, and unpickling can run any code. So it is done only for
        steps that are functions by the record of whoever started the task on this machine; what the host says of that
        does not count.

        Args:
            timeout: Seconds; None: as long as it takes.
            trust_host: Believe the host which steps are functions, if there is no such record here: the task was
                started on another machine, or by another account.

        Raises:
            TaskExecutionError: If a step failed, or it was cancelled or lost.
            LazyclusterError: If a function's result is there, but no record that one was started; or what the host
                says differs from the record.
            TimeoutError: If it takes longer; it goes on.
        """
        return event_loop.run(self._result(timeout, trust_host))

    async def _result(self, timeout: float | None, trust_host: bool) -> Any:
        about = await self._ended(timeout)
        value = None
        for number, fields in enumerate(about["steps"]):
            if not fields["ok"]:
                raise self._failed(about, number, str(fields.get("message")))
            if fields.get("limit"):
                raise self._failed(about, number, f"a limit of the task has ended it: {fields['limit']}")
            if "status" in fields:
                value = await self._returned(about, number, trust_host)
            else:
                self._check_command(about, number, fields)
        if about["state"] != "done":
            why = {"cancelled": "it was cancelled", "lost": "it was killed, or its host was restarted"}
            raise self._failed(about, len(about["steps"]), why.get(about["state"], "it has failed"))
        await self._check_complete(about)
        return value

    async def _returned(self, about: Mapping[str, Any], number: int, trust_host: bool) -> Any:
        """Return what the function in a step has returned, if it may be unpickled."""
        from . import functions

        fields = about["steps"][number]
        received = Collected()
        if fields["status"] in ("returned", "raised"):
            record, why = await self._find_record()
            if record is None and not trust_host:
                raise self._unknown(number, why)
            if record is not None and number not in record.functions:
                raise self._contradiction(
                    f"its step {number + 1} was a function, but it was a command; it is not unpickled"
                )
            await self._read(received.add, received, do="outcome", step=number)
        outcome = await functions.outcome_of(fields, received.taken())
        if outcome.status == "returned":
            return outcome.value
        label = str(about["labels"][number]) if number < len(about["labels"]) else "the function"
        status = -outcome.signal if outcome.signal else outcome.exit
        text = outcome.describe(label.removesuffix("()"))
        raise self._failed(about, number, text, status) from outcome.exception

    # --- its record on this machine ------------------------------------------------------------
    async def _find_record(self) -> tuple[DetachedRecord | None, str]:
        """Return the record of what was started, or None and why there is none."""
        if self._record is not None:
            return self._record, ""
        where = detached_records.directory() / f"{self.id}.json"
        try:
            record = await event_loop.in_thread(detached_records.find, self.id)
        except (OSError, ValueError) as error:
            return None, f"the record {where} cannot be used: {getattr(error, 'strerror', None) or error}"
        if record is None:
            return None, f"there is no record on this machine that one was started ({where})"
        if not _same_host(record.host, self.host):
            return None, f"it was started on {printable(record.host)}, by the record {where}"
        self._record = record
        return record, ""

    async def _check_complete(self, about: Mapping[str, Any]) -> None:
        """Check that the host has reported the end of every step: else the result might be one of fewer."""
        record, _ = await self._find_record()
        reported = {number for number, fields in enumerate(about["steps"]) if "status" in fields}
        if record is not None and (len(about["steps"]) != record.steps or reported != record.functions):
            raise self._contradiction("it is done, but not how each of its steps has ended")

    def _unknown(self, number: int, why: str) -> LazyclusterError:
        return LazyclusterError(
            f"{self.host}: detached task {self.name!r}: the host says that its step {number + 1} is a function, but "
            f"{why}. Its result is not unpickled, since by that the host could run any code here\n"
            "  Next step: ask for it on the machine, and with the account, that have started the task; or, if you "
            "trust the host: result(trust_host=True)"
        )

    def _contradiction(self, said: str) -> LazyclusterError:
        return LazyclusterError(
            f"{self.host}: detached task {self.name!r}: the host says that {said}; that differs from what was started\n"
            "  Next step: see who has changed what is kept there; lazycluster's agent does not say that"
        )

    def _check_command(self, about: Mapping[str, Any], number: int, fields: Mapping[str, Any]) -> None:
        error = exit_error(fields)
        if error is not None:
            raise self._failed(about, number, error.message, error.exit_status)

    def _failed(
        self, about: Mapping[str, Any], number: int, message: str, status: int | None = None
    ) -> TaskExecutionError:
        labels = [printable(str(label)) for label in about["labels"]]
        what = labels[number] if number < len(labels) else ""
        step = f", step {number + 1} of {len(labels)} failed: {what}" if what else ""
        text = f"{self.host}: detached task {self.name!r}{step}\n  {printable(message)}\n  Next step: see its log()"
        return TaskExecutionError(text, host=self.host, task=self.name, step=number, what=what, exit_status=status)

    # --- its end -------------------------------------------------------------------------------
    def cancel(self) -> None:
        """End all that it runs, and wait until it has ended. Does nothing if it has ended already."""
        event_loop.run(self._cancel())

    async def _cancel(self) -> None:
        await self._ask("cancel")
        await self._ended(_END_LIMIT)

    def remove(self) -> None:
        """Remove what is known of it from the host: log, results, and its own working directory. Ends it before."""
        event_loop.run(self._remove_async())

    async def _remove_async(self) -> None:
        """Do what :meth:`remove` does, on the loop."""
        await self._cancel()
        await self._ask("remove")
        await event_loop.in_thread(detached_records.forget, self.id)

    def __repr__(self) -> str:
        return f"<DetachedTask {self.name!r} {self.id} on {self.host}>"


async def detached_tasks(connection: Connection) -> list[DetachedTask]:
    """Return the detached tasks of a host, the oldest first."""
    connection.check()
    return [task for task, _ in await detached_states(connection)]


@dataclass(frozen=True)
class DetachedState:
    """The state of a detached task, as its host tells it. What is text comes from the host.

    Attributes:
        host: The host.
        id: Its name on the host.
        name: The name of the task.
        state: See :attr:`DetachedTask.state`.
        exit_status: Its exit status, as a shell has it: 143 if it was cancelled, 137 if it was lost, 124 if a limit has
            ended it; None while it runs.
        age: Seconds since it began, by the host.
        ended_ago: Seconds since it ended, None if that is not known.
        restarted: True if it is lost since the host was restarted.
        command: What it runs, or the last of its steps.
        problem: What a step has failed with, beside its exit status.
    """

    host: str
    id: str
    name: str
    state: str
    exit_status: int | None
    age: float
    ended_ago: float | None
    restarted: bool
    command: str
    problem: str

    @classmethod
    def of(cls, host: str, about: Mapping[str, Any]) -> DetachedState:
        """Return the state that an answer of a host tells."""
        steps, labels = about["steps"], about["labels"]
        last = steps[-1] if steps else {}
        label = labels[min(len(steps), len(labels) - 1)] if labels else ""
        return cls(
            host,
            about["id"],
            printable(str(about.get("name") or "")),
            about["state"],
            _exit_status(about["state"], last),
            float(about.get("age") or 0),
            about.get("ended_ago"),
            bool(about.get("restarted")),
            printable(str(label)),
            "" if last.get("ok", True) else printable(str(last.get("message") or "")),
        )


def _exit_status(state: str, last: Mapping[str, Any]) -> int | None:
    """Return the exit status of a task in a state, with the fields of its last step."""
    if state == "failed":
        if last.get("limit"):
            return 124
        if last.get("signal"):
            return 128 + int(last["signal"])
        return int(last.get("exit") or (127 if last.get("error") == "os" else 1))
    return {"running": None, "done": 0, "cancelled": 128 + signal.SIGTERM}.get(state, 128 + signal.SIGKILL)


async def detached_states(connection: Connection) -> list[tuple[DetachedTask, DetachedState]]:
    """Return the detached tasks of a host with their states, the oldest first."""
    answer = await _request(connection, do="list")
    found = [(DetachedTask(connection, one), DetachedState.of(connection.host, one)) for one in answer["tasks"]]
    return sorted(found, key=lambda pair: pair[0].created)


async def _request(connection: Connection, **params: Any) -> dict[str, Any]:
    try:
        return await connection.request("detached", within=_ANSWER_LIMIT, **params)
    except NoAnswerError:
        raise LazyclusterError(
            f"{connection.host}: it did not answer within {_ANSWER_LIMIT:g} s; its detached tasks go on\n"
            "  Next step: try again when it can be reached"
        ) from None


def check_options(task: object, options: ExecutionOptions, wait: bool) -> None:
    """Refuse what cannot be detached, and options of other tasks.

    Args:
        task: The task.
        options: Its options.
        wait: Whether its end is to be waited for.

    Raises:
        TypeError, ValueError: It cannot.
    """
    from .task import RuntimeTask

    if not isinstance(task, RuntimeTask):
        raise TypeError(f"a task must be a RuntimeTask, not {type(task).__name__}")
    if options.retries:
        raise ValueError("no process watches a detached task to try it again: leave out retries, or detach")
    if options.debug:
        raise ValueError("a detached task prints nothing here: leave out debug, and see its log(); or leave out detach")
    if options.omit_on_join:
        raise ValueError("no join() waits for a detached task: leave out omit_on_join, or detach")
    if wait:
        raise ValueError(
            "a detached task is not waited for when it is started: leave out execute_async=False, and call join() of "
            "what is returned; or leave out detach"
        )


def detachable_calls(task: RuntimeTask) -> list[PickledCall | None]:
    """Pickle the calls of a task that is to be detached: in the caller's thread, and once for many hosts.

    Args:
        task: The task; it may run commands and functions.

    Raises:
        ValueError: If it has no steps, or one that needs the manager.
        TaskExecutionError: If a function cannot be sent.
    """
    if not task.steps:
        raise ValueError(f"task {task.name!r} has no steps: add one, e.g. with run_command()")
    for step in task.steps:
        if not isinstance(step, (RunCommand, RunFunction)):
            raise ValueError(
                f"task {task.name!r}: {step.label}: a detached task cannot copy files, since the manager may end.\n"
                "  Next step: copy them with the runtime before or after"
            )
    calls: list[PickledCall | None] = []
    for call in pickle_calls(task.steps):
        if isinstance(call, TaskExecutionError):
            raise TaskExecutionError(f"task {task.name!r}: {call}", task=task.name) from call.__cause__
        calls.append(call)
    return calls


async def start_detached(
    task: RuntimeTask,
    context: Context,
    calls: Sequence[PickledCall | None],
    *,
    own_directory: bool,
    cwd_variable: str,
) -> DetachedTask:
    """Start a task that does not end with this process.

    Args:
        task: The task.
        context: Where and how.
        calls: Its calls, from :func:`detachable_calls`.
        own_directory: Whether it gets a working directory of its own, since that of the context will not last.
        cwd_variable: The variable that tells the working directory.

    Raises:
        LazyclusterError: If it cannot be started.
    """
    from .functions import resolve_auto

    context = await context.prepared()
    connection = context.connection
    env = {**context.env, **checked_variables(task._env)}
    python = await resolve_auto(connection, env) if context.python == "auto" else context.python
    cwd = "" if own_directory else context.cwd
    steps, data = [], []
    for step, call in zip(task.steps, calls, strict=True):
        params, pickled = _step_params(step, call, context, dict(env), python, cwd)
        params["limits"] = task.limits.message(time.monotonic())
        steps.append({"op": "call" if call else "run", "params": params, "size": len(pickled), "label": step.label})
        data.append(pickled)
    request = {**_request_of(task.name, cwd, steps), "cwd_variable": cwd_variable}
    try:
        return await _start(connection, request, data, [call is not None for call in calls])
    except AgentError as error:
        await event_loop.in_thread(detached_records.forget, request["id"])
        raise LazyclusterError(f"{connection.host}: task {task.name!r} {start_problem(error)}") from None


async def start_command(connection: Connection, command: DetachedCommand) -> DetachedTask:
    """Start a command that does not end with this process. Its name is that of no other task of the host.

    Args:
        connection: The host.
        command: The command.

    Raises:
        AgentError: If it cannot be started; with the `errno` EEXIST, if the host has a task of that name.
        LazyclusterError: If the host does not answer.
    """
    params: dict[str, Any] = {"cwd": command.cwd or ".", "env": dict(command.env), "task": secrets.token_hex(16)}
    params |= {"merge": True, "startup_files": command.startup_files}
    params |= {"argv": list(command.argv)} if command.argv else {"command": command.line}
    if command.time_limit is not None:
        params["limits"] = Limits(wall=command.time_limit).message(time.monotonic())
    step = {"op": "run", "params": params, "size": len(command.script), "label": command.label}
    request = {**_request_of(command.name, params["cwd"], [{**step, "script": bool(command.script)}]), "unique": True}
    return await _start(connection, request, [command.script])


def start_problem(error: AgentError) -> str:
    """Return why a task has not started, and what to do about it."""
    text = f"cannot be detached: {error.message}"
    if error.evidence.get("errno") in _NOT_WRITABLE:
        text += (
            "\n  Next step: its state and log are written there; in a start-up file of the shell there, set "
            "XDG_STATE_HOME to a directory that can be written to, and stays"
        )
    return text


def _request_of(name: str, cwd: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": secrets.token_hex(8), "name": name, "created": time.time(), "cwd": cwd, "steps": steps}


async def _start(
    connection: Connection, request: dict[str, Any], data: Sequence[bytes], functions: Sequence[bool] = ()
) -> DetachedTask:
    """Start what a request says; which of its steps are functions is recorded here."""
    name = request["name"]
    link = await connection.start_another_agent()
    try:
        record = await _write_record(connection.host, request["id"], functions) if functions else None
        channel = link.open_channel("detach", request)
        await _send(channel, data)
        started = await asyncio.wait_for(channel.result(), _START_LIMIT)
    except AgentError:
        await _stop(link)
        raise
    except asyncio.TimeoutError:
        raise LazyclusterError(
            f"{connection.host}: task {name!r} was not detached within {_START_LIMIT:g} s.\n"
            "  Next step: see how busy the host is, and with detached_tasks() whether the task has started"
        ) from None
    finally:
        link.lost("it goes on alone")
    return DetachedTask(connection, {**request, "id": started["id"]}, record)


async def _stop(link: AgentLink) -> None:
    """Have an agent end that has nothing to do: who leaves the host at once would seem to have lost the link."""
    with contextlib.suppress(LazyclusterError, asyncio.TimeoutError):
        await asyncio.wait_for(link.open_channel("stop", {}).result(), _STOP_LIMIT)


async def _write_record(host: str, task_id: str, functions: Sequence[bool]) -> DetachedRecord:
    """Write down what is about to be started, so that it is known when the task is found again."""
    try:
        return await event_loop.in_thread(detached_records.keep, task_id, host, functions)
    except OSError as error:
        if any(functions):
            _logger.warning(
                "%s: which steps of the detached task are functions cannot be recorded: %s. Other processes need "
                "result(trust_host=True) to get their results",
                host,
                error,
            )
        return DetachedRecord(host, len(functions), frozenset(n for n, one in enumerate(functions) if one))


def _same_host(one: str, other: str) -> bool:
    """Tell whether two names are of one host, whatever account and port stand with them."""
    try:
        return parse_destination(one).host.lower() == parse_destination(other).host.lower()
    except ValueError:
        return one == other


async def _send(channel: Channel, data: Sequence[bytes]) -> None:
    """Send what may be large, under a deadline for each part of it."""
    for part in data:
        for start in range(0, len(part), _PART):
            await asyncio.wait_for(channel.send(memoryview(part)[start : start + _PART]), _START_LIMIT)
    await asyncio.wait_for(channel.send_end(), _START_LIMIT)


def _step_params(
    step: Any, call: PickledCall | None, context: Context, env: dict[str, str], python: str | None, cwd: str
) -> tuple[dict[str, Any], bytes]:
    from .functions import params_for_new_agent

    marker = secrets.token_hex(16)
    if call is not None:
        return params_for_new_agent(call, python, env, cwd, marker), b"".join(call.parts)
    own = {"command": step.command, "cwd": cwd, "env": env, "task": marker, "merge": True}
    return {**context.for_shell(step.shell), **own}, b""
