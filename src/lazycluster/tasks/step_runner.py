"""Execution of the steps of a task on a host: commands, functions, copies of files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazycluster.core.words import signal_name
from lazycluster.exceptions import LazyclusterError, TaskExecutionError, one_line
from lazycluster.output.progress import Progress

from .limits import Limits, memory_hint
from .steps import GetFile, RunCommand, RunFunction, SendFile, Step, StepResult

if TYPE_CHECKING:
    from lazycluster.ssh.channel import Channel
    from lazycluster.ssh.transfer import TransferResult

    from .context import Context, ExecutionOptions
    from .pickling import PickledCall

__all__ = ["StepRunner", "claimed", "exit_error", "pickle_calls"]

_logger = logging.getLogger("lazycluster")

_PIDS = range(1, 2**31)
_END_LIMIT = 20.0  # seconds that the host gets to end a command in stages
_REMEMBERED = 10_000  # paths on the manager that hosts have written


class StepRunner:
    """Executes the steps of one task on a host, one at a time.

    Args:
        steps: All steps of the task.
        options: The options of its execution.
        limits: What the task may use of its host.
        write: Takes output.

    Attributes:
        write: The same.
        pid: The process on the host that does the present step, if one does.
        kill: Kills that process at once; to be called on the loop.
    """

    def __init__(
        self, steps: Sequence[Step], options: ExecutionOptions, limits: Limits, write: Callable[[bytes], Any]
    ) -> None:
        self.write = write
        self.pid: int | None = None
        self.kill: Callable[[], Any] | None = None
        self._marker = secrets.token_hex(16)  # what its processes on the host carry in their environment
        self._limits = limits
        self._began = time.monotonic()
        self._send_lock = options.send_lock
        self._send = options.send
        self._keep_calls = options.retries > 0
        self._calls = list(pickle_calls(steps) if options.calls is None else options.calls)

    async def run(self, index: int, step: Step, context: Context) -> StepResult:
        """Execute one step.

        Args:
            index: Its place among the steps of the task.
            step: What to do.
            context: Where.

        Returns:
            What came out; its output has gone to `write` alone.

        Raises:
            TaskExecutionError: If it failed; the message says why, and nothing of where.
        """
        try:
            if isinstance(step, RunCommand):
                return await self._run_command(step, context)
            if isinstance(step, RunFunction):
                return await self._run_function(index, step, context)
            copying = self._send_file(step, context) if isinstance(step, SendFile) else self._get_file(step, context)
            try:
                return await asyncio.wait_for(copying, self._limits.message(self._began).get("wall"))
            except asyncio.TimeoutError:
                raise self._limits.time_is_up() from None
        except TaskExecutionError:
            raise
        except (LazyclusterError, OSError, ValueError, TypeError) as error:
            raise TaskExecutionError(str(error) or type(error).__name__) from error
        except Exception as error:
            raise TaskExecutionError(f"{type(error).__name__}: {error}") from error
        finally:
            self.kill = None

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if event.get("pid") in _PIDS:
            self.pid = event["pid"]

    # --- commands ------------------------------------------------------------------------------
    async def _run_command(self, step: RunCommand, context: Context) -> StepResult:
        params: dict[str, Any] = {
            "command": step.command,
            **context.for_shell(step.shell),
            "env": dict(context.env),
            "task": self._marker,
            # One stream, so that errors stand where they belong.
            "merge": True,
            "limits": self._limits.message(self._began),
        }
        channel = context.connection.channel("run", params, stdout=self.write, event=self._on_event)
        self.kill = lambda: channel.control(signal="KILL")
        try:
            result = await channel.result()
        except asyncio.CancelledError:
            await self._end(context, channel)
            raise
        if result.get("limit"):
            raise self._limits.time_is_up()
        error = exit_error(result, self._limits)
        if error is not None:
            raise error
        return StepResult(exit_status=0)

    async def _end(self, context: Context, channel: Channel) -> None:
        channel.control(signal="END")
        try:
            await context.connection.wait_while_heard(asyncio.ensure_future(channel.result()), _END_LIMIT)
        finally:
            channel.close()

    # --- functions -----------------------------------------------------------------------------
    async def _run_function(self, index: int, step: RunFunction, context: Context) -> StepResult:
        from . import functions

        pickled = self._calls[index]
        if not self._keep_calls:
            self._calls[index] = None  # it may be large
        if isinstance(pickled, TaskExecutionError):
            raise pickled
        outcome = await functions.call(
            context.connection,
            pickled or step.function,
            python=context.python,
            env=dict(context.env),
            cwd=context.cwd,
            task=self._marker,
            stdout=self.write,
            stderr=self.write,
            event=self._on_event,
            limits=self._limits.message(self._began),
        )
        if outcome.limit:
            raise self._limits.time_is_up()
        if outcome.status == "returned":
            return StepResult(exit_status=0, value=outcome.value, has_value=True)
        status = -outcome.signal if outcome.signal else outcome.exit
        message = outcome.describe(step.label.removesuffix("()"))
        if status != 0:
            message = self._limits.explain(message, status, outcome.type_name == "MemoryError")
        raise TaskExecutionError(message, exit_status=status) from outcome.exception

    # --- copies --------------------------------------------------------------------------------
    async def _send_file(self, step: SendFile, context: Context) -> StepResult:
        from lazycluster.ssh import transfer

        name = os.path.basename(os.fspath(step.local_path).rstrip("/"))
        with Progress(f"Sending {name}", unit="B") as progress:
            async with self._send_lock or contextlib.nullcontext():
                result = await (self._send or transfer.send)(
                    context.connection,
                    step.local_path,
                    step.remote_path,
                    cwd=context.cwd,
                    env=dict(context.env),
                    progress=lambda done, total, _files: progress.set(done, total),
                )
        self.write(_summary("sent", step.local_path, f"{context.host}:{result.path}", result))
        return StepResult()

    async def _get_file(self, step: GetFile, context: Context) -> StepResult:
        from lazycluster.ssh import transfer

        name = os.path.basename(step.remote_path.rstrip("/"))
        with claimed(step.target(), context.host), Progress(f"Getting {name}", unit="B") as progress:
            result = await transfer.get(
                context.connection,
                step.remote_path,
                step.local_path,
                cwd=context.cwd,
                env=dict(context.env),
                progress=lambda done, total, _files: progress.set(done, total),
            )
        self.write(_summary("got", f"{context.host}:{step.remote_path}", result.path, result))
        return StepResult()


def pickle_calls(steps: Sequence[Step]) -> list[PickledCall | TaskExecutionError | None]:
    """Pickle the calls of functions: in the caller's thread, since it may take long, and once for many hosts.

    Args:
        steps: The steps of a task.

    Returns:
        For each step the pickled call, an error that says why it cannot be pickled, or None if it is no function.
    """
    return [_pickled(step) if isinstance(step, RunFunction) else None for step in steps]


def _pickled(step: RunFunction) -> PickledCall | TaskExecutionError:
    from .pickling import dump_call

    try:
        return dump_call(step.function, step.args, step.kwargs)
    except TypeError as error:
        failure = TaskExecutionError(str(error))
        failure.__cause__ = error.__cause__  # the error itself says nothing more
        return failure


def exit_error(result: Mapping[str, Any], limits: Limits | None = None) -> TaskExecutionError | None:
    """Return the error of a command that has not ended well; None if it has.

    Args:
        result: What the host says of its end: ``exit``, ``signal``, ``out_of_memory``.
        limits: The limits under which it ran.
    """
    number, status = result.get("signal"), result.get("exit")
    out_of_memory = result.get("out_of_memory") or ""
    if number:
        hint = memory_hint(out_of_memory) if number == signal.SIGKILL else ""
        message = f"it was ended by the signal {signal_name(number).removeprefix('signal ')}{hint}"
        status = -number
    elif status:
        message = f"exit status {status}{memory_hint(out_of_memory) if out_of_memory else _HINTS.get(status, '')}"
    else:
        return None
    return TaskExecutionError(limits.explain(message, status) if limits else message, exit_status=status)


_HINTS = {
    126: " (found, but not executable)",
    127: " (command not found: install it, name its full path, or extend PATH with setup= or env_variables)",
    137: " (killed, as when the memory is used up)",
}


def _summary(verb: str, source: str, target: str, result: TransferResult) -> bytes:
    files = f"{result.files} file" + ("s" if result.files != 1 else "")
    text = f"{verb} {one_line(source)} as {one_line(target)}: {files}, {result.bytes} bytes"
    if result.skipped:
        text += f"; {result.skipped} of them were there already, unchanged"
    for left_out in result.left_out:
        text += f"\nnot copied: {one_line(left_out)}"
    return f"{text}\n".encode("utf-8", "backslashreplace")


# --- files on the manager, and the hosts that they came from -------------------------------------
_lock = threading.Lock()
_being_written: dict[str, str] = {}
_written: OrderedDict[str, tuple[str, tuple[int, int, int]]] = OrderedDict()


@contextlib.contextmanager
def claimed(path: str, host: str) -> Iterator[None]:
    """Hold a path on the manager while a file from a host is written there.

    Args:
        path: The path.
        host: The host.

    Raises:
        TaskExecutionError: If a file from another host is being written there.
    """
    key = os.path.realpath(path)
    with _lock:
        other = _being_written.get(key)
        if other is not None:
            whose = "this host" if other == host else other
            raise TaskExecutionError(f"{path} is being written with a file from {whose}: give each its own local_path")
        _being_written[key] = host
    try:
        _warn_of_loss(key, host)
        yield
    finally:
        with _lock:
            del _being_written[key]
            _written.pop(key, None)
            stamp = _stamp(key)
            if stamp is not None:
                _written[key] = host, stamp
                while len(_written) > _REMEMBERED:
                    _written.popitem(last=False)


def _warn_of_loss(key: str, host: str) -> None:
    before = _written.get(key)
    # If it is still what the other host gave, it was not renamed or changed, so it may be unread.
    if before is not None and before[0] != host and _stamp(key) == before[1]:
        _logger.warning("%s: what came from %s is replaced by what comes from %s", key, before[0], host)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
