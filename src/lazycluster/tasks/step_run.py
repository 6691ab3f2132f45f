"""How each kind of step is carried out on a host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import LazyclusterError, TaskExecutionError, one_line
from lazycluster.output.progress import Progress

from .limits import Limits, memory_hint
from .steps import GetFile, RunCommand, RunFunction, SendFile, Step, StepResult

if TYPE_CHECKING:
    from lazycluster.ssh.channel import Channel
    from lazycluster.ssh.transfer import TransferResult

    from .context import Context
    from .pickling import PickledCall

__all__ = ["StepRun", "claimed", "failure_of", "perform", "prepare"]

_PIDS = range(1, 2**31)
_END_LIMIT = 20.0  # seconds that the host gets to end a command in stages


@dataclass
class StepRun:
    """What is going on in an execution, and where its output goes.

    Attributes:
        task: The task's name.
        marker: What its processes on the host carry in their environment.
        write: Takes output.
        pid: The process on the host that does the present step, if one does.
        kill: Kills that process at once; to be called on the loop.
        calls: For each step the pickled call of its function, if it is one, or why there is none.
        send_lock: Held while files are sent, see :class:`~lazycluster.tasks.context.ExecutionOptions`.
        keep_calls: Whether a call may be needed again.
        limits: What it may use of its host.
        began: When it began, by the monotonic clock.
    """

    task: str
    marker: str
    write: Callable[[bytes], Any]
    pid: int | None = None
    kill: Callable[[], Any] | None = None
    calls: list[PickledCall | Exception | None] = field(default_factory=list)
    send_lock: asyncio.Lock | None = None
    keep_calls: bool = False
    limits: Limits = field(default_factory=Limits)
    began: float = field(default_factory=time.monotonic)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take what the host tells of the process."""
        if event.get("pid") in _PIDS:
            self.pid = event["pid"]


def prepare(steps: Sequence[Step]) -> list[PickledCall | Exception | None]:
    """Pickle the calls of functions: in the caller's thread, since it may take long, and once for many hosts.

    Args:
        steps: The steps of a task.

    Returns:
        For each step the pickled call, why it cannot be pickled, or None if it is no function.
    """
    return [_pickled(step) if isinstance(step, RunFunction) else None for step in steps]


def _pickled(step: RunFunction) -> PickledCall | Exception:
    from .pickling import dump_call

    try:
        return dump_call(step.function, step.args, step.kwargs)
    except Exception as error:  # noqa: BLE001 - whatever the user's objects raise is the step's failure, raised in its turn
        return error


async def perform(index: int, step: Step, context: Context, env: Mapping[str, str], work: StepRun) -> StepResult:
    """Carry out one step.

    Args:
        index: Which step of its task it is.
        step: What to do.
        context: Where.
        env: What is added to the host's environment.
        work: Where output goes.

    Returns:
        What came out; its output has gone to `work` alone.

    Raises:
        TaskExecutionError: If it failed; the message says why, and nothing of where.
    """
    try:
        if isinstance(step, RunCommand):
            return await _run_command(step, context, env, work)
        if isinstance(step, RunFunction):
            return await _run_function(index, step, context, env, work)
        copying = (
            _send_file(step, context, env, work) if isinstance(step, SendFile) else _get_file(step, context, env, work)
        )
        try:
            return await asyncio.wait_for(copying, work.limits.message(work.began).get("wall"))
        except asyncio.TimeoutError:
            raise work.limits.time_is_up() from None
    except TaskExecutionError:
        raise
    except (LazyclusterError, OSError, ValueError, TypeError) as error:
        raise TaskExecutionError(str(error) or type(error).__name__) from error
    except Exception as error:
        raise TaskExecutionError(f"{type(error).__name__}: {error}") from error
    finally:
        work.kill = None


async def _run_command(step: RunCommand, context: Context, env: Mapping[str, str], work: StepRun) -> StepResult:
    params: dict[str, Any] = {
        "command": step.command,
        **context.for_shell(step.shell),
        "env": dict(env),
        "task": work.marker,
        # One stream, so that errors stand where they belong.
        "merge": True,
        "limits": work.limits.message(work.began),
    }
    channel = context.connection.channel("run", params, stdout=work.write, event=work.on_event)
    work.kill = lambda: channel.control(signal="KILL")
    try:
        result = await channel.result()
    except asyncio.CancelledError:
        await _end(context, channel)
        raise
    if result.get("limit"):
        raise work.limits.time_is_up()
    try:
        return StepResult(exit_status=failure_of(result.get("exit"), result.get("signal"), result.get("out_of_memory")))
    except TaskExecutionError as error:
        text = work.limits.explain(error.message, error.exit_status)
        raise TaskExecutionError(text, exit_status=error.exit_status) from None


async def _end(context: Context, channel: Channel) -> None:
    channel.control(signal="END")
    try:
        await context.connection.heard_out(asyncio.ensure_future(channel.result()), _END_LIMIT)
    finally:
        channel.close()


def failure_of(status: int | None, number: int | None, out_of_memory: str | None = None) -> int:
    """Return the exit status of a command that has ended well.

    Args:
        status: Its exit status.
        number: The signal that ended it.
        out_of_memory: What the host knows of memory that has run out.

    Raises:
        TaskExecutionError: If it has not ended well.
    """
    if number:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = str(number)
        hint = memory_hint(out_of_memory or "") if name == "SIGKILL" else ""
        raise TaskExecutionError(f"it was ended by the signal {name}{hint}", exit_status=-number)
    if status:
        hint = memory_hint(out_of_memory) if out_of_memory else _HINTS.get(status, "")
        raise TaskExecutionError(f"exit status {status}{hint}", exit_status=status)
    return 0


_HINTS = {
    126: " (found, but not executable)",
    127: " (command not found: install it, name its full path, or extend PATH with setup= or env_variables)",
    137: " (killed, as when the memory is used up)",
}


async def _run_function(
    index: int, step: RunFunction, context: Context, env: Mapping[str, str], work: StepRun
) -> StepResult:
    from . import functions

    pickled = work.calls[index]
    if not work.keep_calls:
        work.calls[index] = None  # it may be large
    if isinstance(pickled, Exception):
        raise pickled
    outcome = await functions.call(
        context.connection,
        pickled or step.function,
        python=context.python,
        env=dict(env),
        cwd=context.cwd,
        task=work.marker,
        stdout=work.write,
        stderr=work.write,
        event=work.on_event,
        limits=work.limits.message(work.began),
    )
    if outcome.limit:
        raise work.limits.time_is_up()
    if outcome.status == "returned":
        return StepResult(exit_status=0, value=outcome.value, has_value=True)
    status = -outcome.signal if outcome.signal else outcome.exit
    message = outcome.describe(step.label.removesuffix("()"))
    message = work.limits.explain(message, status, outcome.type_name == "MemoryError") if status != 0 else message
    raise TaskExecutionError(message, exit_status=status) from outcome.exception


async def _send_file(step: SendFile, context: Context, env: Mapping[str, str], work: StepRun) -> StepResult:
    from lazycluster.ssh import transfer

    name = os.path.basename(os.fspath(step.local_path).rstrip("/"))
    with Progress(f"Sending {name}", unit="B") as progress:
        async with work.send_lock or contextlib.nullcontext():
            result = await transfer.send(
                context.connection,
                step.local_path,
                step.remote_path,
                cwd=context.cwd,
                env=dict(env),
                progress=lambda done, total, _files: progress.set(done, total),
            )
    work.write(_summary("sent", step.local_path, f"{context.host}:{result.path}", result))
    return StepResult()


async def _get_file(step: GetFile, context: Context, env: Mapping[str, str], work: StepRun) -> StepResult:
    from lazycluster.ssh import transfer

    name = os.path.basename(step.remote_path.rstrip("/"))
    with claimed(step.target(), context.host), Progress(f"Getting {name}", unit="B") as progress:
        result = await transfer.get(
            context.connection,
            step.remote_path,
            step.local_path,
            cwd=context.cwd,
            env=dict(env),
            progress=lambda done, total, _files: progress.set(done, total),
        )
    work.write(_summary("got", f"{context.host}:{step.remote_path}", result.path, result))
    return StepResult()


def _summary(verb: str, source: str, target: str, result: TransferResult) -> bytes:
    files = f"{result.files} file" + ("s" if result.files != 1 else "")
    text = f"{verb} {one_line(source)} as {one_line(target)}: {files}, {result.bytes} bytes"
    if result.skipped:
        text += f"; {result.skipped} of them were there already, unchanged"
    for left_out in result.left_out:
        text += f"\nnot copied: {one_line(left_out)}"
    return f"{text}\n".encode("utf-8", "backslashreplace")


# --- which host a file on the manager came from ----------------------------------------------------
_logger = logging.getLogger("lazycluster")
_lock = threading.Lock()
_being_written: dict[str, str] = {}
_written: OrderedDict[str, tuple[str, tuple[int, int, int]]] = OrderedDict()
_REMEMBERED = 10_000


@contextlib.contextmanager
def claimed(path: str, host: str) -> Iterator[None]:
    """Hold a path on the manager while a file from a host is written there.

    Args:
        path: The path.
        host: The host.

    Raises:
        TaskExecutionError: If a file from another host is just being written there.
    """
    key = os.path.realpath(path)
    with _lock:
        other = _being_written.get(key)
        if other is not None:
            whose = "this host" if other == host else other
            raise TaskExecutionError(
                f"{path} is just being written with what comes from {whose}: give each its own local_path"
            )
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
    # If it is still what the other host gave, nobody has taken notice of it by renaming or changing it.
    if before is not None and before[0] != host and _stamp(key) == before[1]:
        _logger.warning("%s: what came from %s is replaced with what comes from %s", key, before[0], host)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
