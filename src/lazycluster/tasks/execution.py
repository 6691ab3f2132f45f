"""Executions of a task on one host or on several, from start to end, with their futures and process handles."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lazycluster.core import event_loop, interruptible
from lazycluster.core.words import counted
from lazycluster.exceptions import (
    AgentError,
    ConnectionLostError,
    GroupTaskError,
    LazyclusterError,
    NoAnswerError,
    TaskExecutionError,
)
from lazycluster.output import progress

from .context import Context, ExecutionOptions
from .limits import Limits
from .step_runner import StepRunner
from .steps import RunFunction, Step, StepResult
from .task_log import TaskLog

__all__ = ["Broadcast", "Execution", "ProcessHandle", "TaskProcess", "raise_failures", "settled", "wait_for"]

_logger = logging.getLogger("lazycluster")

_CLEANUP_LIMIT = 30.0  # seconds for a cancelled execution to end what it started
_NAMED = 3  # hosts; of more, their number is shown
_SHOWN_LINES, _SHOWN = 20, 4000  # of the output that an error shows, the lines and the characters


class TaskFuture(interruptible.Future[Any]):
    """The future of an execution; asking it for the result retrieves the error."""

    def __init__(self, execution: Execution | Broadcast) -> None:
        super().__init__()
        self._execution = execution

    def running(self) -> bool:
        """Return whether the task is being executed."""
        return self._execution.status == "running"

    def cancel(self) -> bool:
        """Ask for the end of the task; the future is done when everything that it started has ended."""
        return self._execution.cancel()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result, see :meth:`concurrent.futures.Future.result`."""
        self._execution.check_waiting()
        try:
            return super().result(timeout)
        finally:
            self._execution.retrieved = self._execution.retrieved or self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return the error, see :meth:`concurrent.futures.Future.exception`."""
        self._execution.check_waiting()
        try:
            return super().exception(timeout)
        finally:
            self._execution.retrieved = self._execution.retrieved or self.done()

    def settle(self, value: Any, error: BaseException | None, cancelled: bool) -> None:
        """Set what came out, once."""
        if cancelled:
            super().cancel()
            self.set_running_or_notify_cancel()
        elif error is not None:
            self.set_exception(error)
        else:
            self.set_result(value)


class Execution:
    """One execution of a task.

    Args:
        name: The task's name.
        steps: What to do.
        context: The host and its environment.
        env: The task's own environment variables.
        options: Its options.
        limits: The limits of what it may use of its host.

    Attributes:
        status: ``pending``, ``running``, ``done``, ``failed`` or ``cancelled``.
        future: Done at the end.
        results: What came out of each step that has ended, the failed one included.
        error: Why it failed.
        retrieved: Whether the error was asked for; else it is logged at the end.
        raised: Whether `join` has raised the error.
        exitcode: None until its end, then 0, 1 or what a failed process ended with.
        board: Shows its progress to those who wait for it.
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        context: Context,
        env: Mapping[str, str],
        options: ExecutionOptions,
        limits: Limits,
    ) -> None:
        self.name = name
        self.steps = tuple(steps)
        self.omit_on_join = options.omit_on_join
        self.status = "pending"
        self.results: list[StepResult] = []
        self.error: TaskExecutionError | None = None
        self.retrieved = False
        self.raised = False
        self.exitcode: int | None = None
        self.board = progress.present()
        self.future = TaskFuture(self)
        self._env = env
        self._options = options
        self._retries_left = options.retries
        self._tried: list[str] = []
        self._take_context(context)
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._killing = False
        self._inner: concurrent.futures.Future[None] | None = None
        self._runner = StepRunner(self.steps, options, limits, self._log.write)

    def _take_context(self, context: Context) -> None:
        """Use a context from now on, with a log file of its own."""
        self._connection_owner = context.owner
        self.context = replace(context, owner=None, env={**context.env, **self._env})
        self._log = TaskLog(context.host, self.name, self._options.debug)

    @property
    def log_file(self) -> str | None:
        """The path of the log file, None if it cannot be written."""
        return str(self._log.path) if self._log.path is not None else None

    @property
    def is_over(self) -> bool:
        """True once it has ended."""
        return self.future.done()

    @property
    def host(self) -> str:
        """The host that executes it."""
        return self.context.host

    @property
    def where(self) -> str:
        """The host, for people."""
        return self.context.host

    @property
    def pid(self) -> int | None:
        """The process on the host that carries out the present step."""
        return self._runner.pid

    def start(self) -> Execution:
        """Begin; returns itself."""
        with self.board.in_use():
            self._inner = inner = event_loop.LoopFuture(self._run())
            try:
                inner.add_done_callback(self._ran)
                inner.begin()
            except BaseException:  # Ctrl-C: the caller does not get to know it
                inner.cancel()
                raise
        return self

    # --- on the loop ---------------------------------------------------------------------------
    async def _run(self) -> None:
        try:
            self.status = "running"
            while True:
                try:
                    if self.context.prepare is not None:
                        await self._prepare()
                    for index, step in enumerate(self.steps):
                        await self._step(index, step)
                    break
                except TaskExecutionError as error:
                    await self._begin_again(error)
        except asyncio.CancelledError:
            self._finish("cancelled", -9 if self._killing else -15)
        except TaskExecutionError as error:
            self._finish("failed", error.exit_status or 1, error)
        else:
            self._finish("done", 0)

    def _ran(self, inner: concurrent.futures.Future[None]) -> None:
        # A coroutine that is cancelled before its first line runs none of them, its clean-up neither.
        if self.future.done():
            return
        error = None if inner.cancelled() else inner.exception()
        if error is None:
            self._finish("cancelled", -9 if self._killing else -15)
        else:
            failure = TaskExecutionError(f"{self.context.host}: task {self.name!r}: {error!r}")
            failure.__cause__ = error
            self._finish("failed", 1, failure)

    async def _begin_again(self, error: TaskExecutionError) -> None:
        """Get ready to begin again, on another host or on this one when it is back, or raise the error."""
        if not self._options.retries:
            raise error
        context = await self._next_context(error)
        if context is None:
            raise self._with_tries(error) from error.__cause__
        self._log.close()
        self._take_context(context)
        self._runner.write = self._log.write
        self.results.clear()

    async def _next_context(self, error: TaskExecutionError) -> Context | None:
        """Return where the task is tried again after an error; None if it is not."""
        host, options = self.context.host, self._options
        self._tried.append(host)
        host_failed = isinstance(error.__cause__, ConnectionLostError) or self.context.connection.state == "lost"
        if options.next_context is None or not self._retries_left or not (options.retry_on == "any" or host_failed):
            return None
        found = await options.next_context(self._tried)
        if found is not None:
            self._retries_left -= 1
            # The first line of the message says which step it is, the second why.
            why = str(error.__cause__ or error.message.partition("\n")[2] or error.message).strip().partition("\n")[0]
            _logger.warning("%s: task %r has failed and is tried again on %s: %s", host, self.name, found.host, why)
        return found

    def _with_tries(self, error: TaskExecutionError) -> TaskExecutionError:
        """Return the last error so that it says what was tried before."""
        if len(self._tried) < 2:
            return error
        text = f"{error.message}\n  It was tried {len(self._tried)} times, on {', '.join(self._tried)}."
        values = {name: value for name, value in error.__dict__.items() if name != "message"}
        return TaskExecutionError(text, **values)

    async def _prepare(self) -> None:
        try:
            self.context = await self.context.prepared()
        except LazyclusterError as error:
            host = self.context.host
            raise TaskExecutionError(
                f"{host}: task {self.name!r} was not started: {error}", host=host, task=self.name
            ) from error

    async def _step(self, index: int, step: Step) -> None:
        result = StepResult()
        try:
            if (lost := self._lost_agent()) is not None:
                raise lost
            result = await self._runner.run(index, step, self.context)
        except TaskExecutionError as error:
            self._runner.pid = None
            result = StepResult(self._log.end_step(step.label), error.exit_status)
            if isinstance(error.__cause__, AgentError):
                error = self._lost_agent() or error  # which is a consequence of that
            raise self._step_error(index, step, error, result.output) from _cause(error, step)
        except asyncio.CancelledError:
            result = StepResult(self._log.end_step(step.label))
            raise
        else:
            self._runner.pid = None
            result = StepResult(self._log.end_step(step.label), result.exit_status, result.value, result.has_value)
        finally:
            self.results.append(result)

    def _lost_agent(self) -> TaskExecutionError | None:
        """Return the error of a host that has lost its agent, and with it what earlier steps have left there."""
        host, connection = self.context.host, self.context.connection
        if self.context.generation in (0, connection.generation):
            return None
        lost = ConnectionLostError(host, "its agent has ended since the task began, and with it its working directory")
        error = TaskExecutionError(str(lost))
        error.__cause__ = lost
        return error

    def _step_error(self, index: int, step: Step, error: TaskExecutionError, output: str) -> TaskExecutionError:
        """Return the error of a step, with the host, the task, the step and its output."""
        host = self.context.host
        lines = [f"{host}: task {self.name!r}, step {index + 1} of {len(self.steps)} failed: {_short(step.label)}"]
        lines.append(f"  {error.message}")
        shown = output.strip()
        if shown and shown not in error.message:
            end = "\n".join(shown.splitlines()[-_SHOWN_LINES:])[-_SHOWN:]
            lines += ["  The end of its output:", *(f"    {line}" for line in end.splitlines())]
        log_file = self.log_file if shown else None
        if log_file:
            lines.append(f"  All of its output: {log_file}")
        return TaskExecutionError(
            "\n".join(lines),
            host=host,
            task=self.name,
            step=index,
            what=step.label,
            exit_status=error.exit_status,
            output=output,
            log_file=log_file,
        )

    def _finish(self, status: str, exitcode: int, error: TaskExecutionError | None = None) -> None:
        self._log.close()
        self._connection_owner = None
        if error is not None:
            error.__traceback__ = None  # it is the way through the loop; those who get the error add their own
        self.error, self.exitcode = error, exitcode
        self.status = status
        values = [result.value for result in self.results if result.has_value]
        self.future.settle(values[-1] if values else None, error, status == "cancelled")

    # --- from any thread -----------------------------------------------------------------------
    def check_waiting(self) -> None:
        """Raise an error where waiting would last for ever."""
        if self.future.done():
            return
        if os.getpid() != self._owner:
            raise LazyclusterError(
                f"task {self.name!r} runs for the process {self._owner}; a forked child cannot wait for it"
            )
        if event_loop.in_loop():
            raise LazyclusterError(
                f"task {self.name!r} cannot be waited for in a callback of the library: it would never end"
            )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end.

        Args:
            timeout: Seconds; None: as long as it takes.

        Returns:
            Whether it has ended.
        """
        return wait_for([self], timeout)

    def timeout_message(self, timeout: float | None) -> str:
        """Return the message of a wait that has timed out."""
        connection = self.context.connection
        waiting = f"; the link to it is interrupted: {connection.why}" if connection.state == "interrupted" else ""
        return f"task {self.name!r} on {self.host} has not ended within {timeout} s{waiting}"

    def wait_or_cancel(self) -> None:
        """Wait for the end; if the wait is interrupted (Ctrl-C), the execution is ended, too."""
        try:
            wait_for([self])
        except LazyclusterError:  # it cannot be waited for
            self.cancel()
            raise
        except BaseException:
            self.end_and_wait()
            raise

    def end_and_wait(self) -> None:
        """Have it end, and wait until it has."""
        self.cancel()
        self.future.wait(_CLEANUP_LIMIT)

    def cancel(self, kill: bool = False) -> bool:
        """Ask for the end of all that it runs.

        Args:
            kill: Do not let it clean up.

        Returns:
            Whether it was still to be ended.
        """
        with self._lock:
            if self.future.done() or self._inner is None or os.getpid() != self._owner:
                return False
            self._killing = self._killing or kill
            if kill and self._runner.kill is not None:
                event_loop.get_loop().call_soon_threadsafe(self._runner.kill)
            return self._inner.cancel()

    def raise_once(self) -> None:
        """Raise the error if there is one and `join` has not raised it yet."""
        with self._lock:
            error = None if self.raised else self.error
            self.raised = self.retrieved = True
        if error is not None:
            raise error

    def report(self) -> None:
        """Log the error if it was not retrieved."""
        if self.error is not None and not self.retrieved:
            self.retrieved = True
            _logger.error("a task has failed, and its error was never retrieved:\n%s", self.error)

    def __del__(self) -> None:
        # An execution whose constructor failed has no error yet.
        if getattr(self, "error", None) is not None and os.getpid() == self._owner:
            self.report()


class Broadcast:
    """The executions of a task's copies, with the interface of one :class:`Execution`.

    Its results are those of all hosts, in the order of the hosts, and its error is that of the one host, or a
    :class:`~lazycluster.exceptions.GroupTaskError`.

    Args:
        name: The task's name.
        executions: One for each host; they have begun.

    Attributes:
        future: Done when all have ended; its result is a list with the result of each.
    """

    omit_on_join = False
    host: str | None = None  # there is not one alone
    log_file: str | None = None  # each has its own
    pid: int | None = None

    def __init__(self, name: str, executions: Sequence[Execution]) -> None:
        self.name = name
        self.executions = tuple(executions)
        self.future = TaskFuture(self)
        self._lock = threading.Lock()
        self._left = len(self.executions)
        self._error: TaskExecutionError | None = None
        for execution in self.executions:
            execution.future.add_done_callback(self._one_ended)

    def _one_ended(self, _: object) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        values = [[result.value for result in one.results if result.has_value] for one in self.executions]
        last = [found[-1] if found else None for found in values]
        self._error = self.error
        self.future.settle(last, self._error, self.status == "cancelled")

    @property
    def where(self) -> str:
        """The hosts, in a few words."""
        hosts = [execution.context.host for execution in self.executions]
        return ", ".join(hosts) if len(hosts) <= _NAMED else counted(len(hosts), "host")

    @property
    def is_over(self) -> bool:
        """True once all have ended."""
        return all(execution.is_over for execution in self.executions)

    @property
    def status(self) -> str:
        """``pending`` until one is begun, ``running`` until all have ended, then the worst that became of one."""
        found = {execution.status for execution in self.executions}
        if not self.is_over:
            return "pending" if found == {"pending"} else "running"
        return next((status for status in ("failed", "cancelled") if status in found), "done")

    @property
    def results(self) -> list[StepResult]:
        """The results of each step on each host so far."""
        return [result for execution in self.executions for result in execution.results]

    @property
    def error(self) -> TaskExecutionError | None:
        """The error of the host that failed; of several hosts, all of their errors in one."""
        if self._error is not None:
            return self._error
        errors = [execution.error for execution in self.executions if execution.error is not None]
        return GroupTaskError(errors) if len(errors) > 1 else errors[0] if errors else None

    @property
    def exitcode(self) -> int | None:
        """None until all have ended, then 0, or what the first one that did not end well ended with."""
        codes = [execution.exitcode for execution in self.executions]
        return None if None in codes else next((code for code in codes if code), 0)

    @property
    def retrieved(self) -> bool:
        """True if all errors were asked for."""
        return all(execution.retrieved for execution in self.executions)

    @retrieved.setter
    def retrieved(self, retrieved: bool) -> None:
        for execution in self.executions:
            execution.retrieved = retrieved

    def check_waiting(self) -> None:
        """Raise an error where waiting would last for ever."""
        for execution in self.executions:
            execution.check_waiting()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of all, see :meth:`Execution.wait`."""
        return wait_for(self.executions, timeout)

    def timeout_message(self, timeout: float | None) -> str:
        """Return the message of a wait that has timed out."""
        left = [execution.context.host for execution in self.executions if not execution.is_over]
        return f"task {self.name!r} has not ended within {timeout} s on {', '.join(left)}"

    def cancel(self, kill: bool = False) -> bool:
        """Ask for the end of all, see :meth:`Execution.cancel`."""
        asked = [execution.cancel(kill) for execution in self.executions]
        return any(asked)

    def raise_once(self) -> None:
        """Raise what failed and was not raised yet."""
        raise_failures(self.executions)

    def report(self) -> None:
        """Log the errors that were not retrieved."""
        for execution in self.executions:
            execution.report()


class ProcessHandle(abc.ABC):
    """Work on a host or on its behalf, with the interface of :class:`multiprocessing.Process`.

    Attributes:
        name: A name for people.
    """

    name: str

    @property
    @abc.abstractmethod
    def pid(self) -> int | None:
        """The process that does the work, where one can be named."""

    @property
    @abc.abstractmethod
    def exitcode(self) -> int | None:
        """None while it is alive, 0 after success, the negative number of the signal that ended it, else another."""

    @abc.abstractmethod
    def is_alive(self) -> bool:
        """Return whether it has not ended."""

    @abc.abstractmethod
    def join(self, timeout: float | None = None) -> None:
        """Wait for its end; never raises what went wrong in it.

        Args:
            timeout: Seconds; None: as long as it takes.
        """

    @abc.abstractmethod
    def terminate(self) -> None:
        """Ask for its end, in stages."""

    def kill(self) -> None:
        """Ask for its end at once."""
        self.terminate()

    def __repr__(self) -> str:
        state = "alive" if self.is_alive() else f"ended with {self.exitcode}"
        return f"<{type(self).__name__} {self.name!r} pid={self.pid} {state}>"


class TaskProcess(ProcessHandle):
    """The work of one task on its host, or hosts.

    Args:
        execution: The execution of the task, or those of its copies.
    """

    def __init__(self, execution: Execution | Broadcast) -> None:
        self._execution = execution
        self.name = execution.name

    @property
    def pid(self) -> int | None:
        """The process on the host that carries out the present step, None between steps and for copies of files.

        None also if the task is executed on several hosts.
        """
        return self._execution.pid

    @property
    def exitcode(self) -> int | None:
        """None while it is alive, else 0, or what the failed step's process ended with."""
        return self._execution.exitcode if self._execution.is_over else None

    def is_alive(self) -> bool:
        """Return whether the task is pending or running."""
        return not self._execution.is_over

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the task."""
        self._execution.wait(timeout)

    def terminate(self) -> None:
        """Cancel the task: what it runs on the host is interrupted, terminated, killed."""
        self._execution.cancel()

    def kill(self) -> None:
        """Cancel the task without letting it clean up."""
        self._execution.cancel(kill=True)


def wait_for(executions: Sequence[Execution], timeout: float | None = None) -> bool:
    """Wait for the end of executions, and show their progress meanwhile.

    Args:
        executions: What to wait for.
        timeout: Seconds; None: as long as it takes.

    Returns:
        Whether all have ended.
    """
    for execution in executions:
        execution.check_waiting()
    boards = [execution.board for execution in executions]
    board = progress.Board(any(board.wanted for board in boards), boards)
    try:
        return board.wait([execution.future for execution in executions], timeout)
    finally:
        board.close()


def raise_failures(executions: Sequence[Execution]) -> None:
    """Raise what failed in executions and was not raised yet.

    Raises:
        TaskExecutionError: If one failed.
        GroupTaskError: If several failed.
    """
    errors = []
    for execution in executions:
        try:
            execution.raise_once()
        except TaskExecutionError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise GroupTaskError(errors)


async def settled(future: concurrent.futures.Future[Any]) -> None:
    """Wait until a future is done, without asking it what came out, as :func:`asyncio.wrap_future` would."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(over.set))
    await over.wait()


def _cause(error: TaskExecutionError, step: Step) -> BaseException | None:
    """Return the cause of an error, if it says more than the error: what a user's function raised, a lost host."""
    cause = error.__cause__
    if isinstance(cause, (ConnectionLostError, NoAnswerError)):
        return cause
    if isinstance(step, RunFunction):
        return None if isinstance(cause, AgentError) else cause
    return None if isinstance(cause, (LazyclusterError, OSError)) else cause


def _short(text: str) -> str:
    line = " ".join(text.split("\n"))
    return line if len(line) <= 200 else line[:197] + "..."
