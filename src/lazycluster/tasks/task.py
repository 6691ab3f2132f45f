"""`RuntimeTask`: steps that are executed one after the other on a host."""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from lazycluster.core.words import counted
from lazycluster.exceptions import LazyclusterError, TaskExecutionError
from lazycluster.output.execution_log import LoggedStep, LoggedTask, show_logs
from lazycluster.output.view import Cell, Fact, Shown, Table, Tone, View

from .context import Context, ExecutionOptions, checked_variables
from .execution import Broadcast, Execution, TaskProcess
from .limits import Limits
from .recipe import _rebuilt
from .steps import GetFile, RunCommand, RunFunction, SendFile, Step

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["RuntimeTask"]

T = TypeVar("T", bound="RuntimeTask")

_numbers = itertools.count(1)

_CLEANUP_LIMIT = 30.0  # seconds for a cancelled task to end what it started
_TONES: dict[str, Tone] = {"done": "good", "failed": "bad", "cancelled": "bad", "pending": "dim"}
_LABEL = 200  # characters of a step


@runtime_checkable
class TaskExecutor(Protocol):
    """The interface of a runtime that a task uses."""

    def execute_task(
        self, task: RuntimeTask, execute_async: bool = True, omit_on_join: bool = False, debug: bool = False
    ) -> RuntimeTask:
        """Execute a task."""


class RuntimeTask(Shown):
    """Steps that are executed one after the other on a host: copy files, run commands and Python functions.

    A task is written down with methods that return the task itself, and is then executed by a
    :class:`~lazycluster.Runtime` or a :class:`~lazycluster.RuntimeGroup`. The first step that fails ends it.

    A task object keeps what came out of **one** execution. To execute it again, also while it is running, is allowed:
    that makes a fresh copy, which is what the executing method returns. The results of the first stay as they are.
    Executed on all hosts of a group at once (``broadcast=True``), it keeps what came out of all, host by host.

    Args:
        name: A name for logs and messages; by default ``task-<number>``.

    Raises:
        TypeError: If the name is not a string.
        ValueError: If the name is empty.

    Examples:
        >>> task = RuntimeTask("prepare").send_file("data.csv")
        >>> task = task.run_command("wc -l data.csv")
        >>> task = Runtime("host-1").execute_task(task)        # doctest: +SKIP
        >>> print(task.execution_log[1])                       # doctest: +SKIP
        1000 data.csv
    """

    def __init__(self, name: str | None = None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"the name of a task must be a string, not {type(name).__name__}")
        if name == "":
            raise ValueError("the name of a task is empty")
        self.name = name or f"task-{next(_numbers)}"
        self._steps: list[Step] = []
        self._env: dict[str, str] = {}
        self._limits = Limits()
        self._lock = threading.Lock()
        self._execution: Execution | Broadcast | None = None

    # --- what it does --------------------------------------------------------------------------
    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, as frozen dataclasses."""
        return tuple(self._steps)

    def _add(self: T, step: Step) -> T:
        with self._lock:
            if self._execution is not None and not self._execution.is_over:
                raise LazyclusterError(
                    f"task {self.name!r} is being executed: a step that is added now would never be executed"
                )
            self._steps.append(step)
        return self

    def send_file(self: T, local_path: str | os.PathLike[str], remote_path: str | None = None) -> T:
        """Add a step that copies a file or directory from the manager to the host.

        Args:
            local_path: The file or directory on this machine.
            remote_path: Where it goes on the host: relative to the working directory, with ``~`` and environment
                variables as in a shell. By default it keeps its name, in the working directory.

        Returns:
            The task itself.

        Raises:
            ValueError: If a path is empty.
        """
        return self._add(SendFile(local_path, remote_path))  # type: ignore[arg-type]

    def get_file(self: T, remote_path: str, local_path: str | os.PathLike[str] | None = None) -> T:
        """Add a step that copies a file or directory from the host to the manager.

        Args:
            remote_path: The file or directory on the host, see :meth:`send_file`.
            local_path: Where it goes on this machine; an existing directory, or a path that ends with ``/``, takes it
                under its own name. By default it keeps its name, in the current directory.

        Returns:
            The task itself.

        Raises:
            ValueError: If a path is empty.
        """
        return self._add(GetFile(remote_path, local_path))  # type: ignore[arg-type]

    def run_command(self: T, command: str, shell: str | None = None) -> T:
        """Add a step that runs a line of shell, without a terminal or input, in the working directory.

        It is over when the shell has exited and its output has ended. It fails if the exit status is not 0.

        Args:
            command: The line.
            shell: Another shell than the user's own, e.g. ``bash``.

        Returns:
            The task itself.

        Raises:
            ValueError: If the command is empty.
        """
        return self._add(RunCommand(command, shell))

    def run_function(self: T, function: Callable[..., Any], **func_kwargs: Any) -> T:
        """Add a step that calls a Python function on the host, in a process of its own.

        The function may be a lambda, a closure, or stand in a notebook or a local module; the host needs the
        manager's minor version of Python, and the packages that the function imports. What it returns is found in
        :attr:`function_returns` and :meth:`result`.

        Args:
            function: The function; it may be asynchronous.
            **func_kwargs: Its arguments. For arguments of other kinds or names see :meth:`call`.

        Returns:
            The task itself.

        Raises:
            TypeError: If it cannot be called.
        """
        return self._add(RunFunction(function, (), func_kwargs))

    def call(self: T, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> T:
        """Add a step that calls a Python function with any arguments, else as :meth:`run_function`.

        Args:
            function: The function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments, whatever their names.

        Returns:
            The task itself.
        """
        return self._add(RunFunction(function, args, kwargs))

    @property
    def env_variables(self) -> dict[str, str]:
        """Environment variables of this task, which come on top of those of the runtime."""
        return self._env

    @env_variables.setter
    def env_variables(self, env_variables: Mapping[str, Any]) -> None:
        self._env = checked_variables(env_variables)

    @property
    def limits(self) -> Limits:
        """The limits of what the task may use of its host."""
        return self._limits

    def limit(
        self: T, memory: str | int | None = None, cpu_time: float | None = None, wall_time: float | None = None
    ) -> T:
        """Limit what the task may use of its host. One that wants more is ended; its error says which limit it was.

        Args:
            memory: Bytes, or a size such as ``"2 GB"``, for each process of the task: of its address space, which is
                more than what it touches; for a function, beyond what its interpreter had before the call.
            cpu_time: Seconds of processor time for each process of the task.
            wall_time: Seconds from the start of the task to its end.

        Returns:
            The task itself.

        Raises:
            TypeError, ValueError: If a limit makes no sense.

        Examples:
            >>> task = RuntimeTask("train").run_command("./train")
            >>> task = task.limit(memory="8 GB", wall_time=3600)
        """
        self._limits = Limits.checked(memory, cpu_time, wall_time)
        return self

    # --- executing it --------------------------------------------------------------------------
    def execute(self, connection: TaskExecutor | Connection, debug: bool = False) -> RuntimeTask:
        """Execute the task and wait for its end.

        :meth:`Runtime.execute_task` and :meth:`RuntimeGroup.execute_task` are the usual ways.

        Args:
            connection: The runtime that executes it.
            debug: Print what the steps print to standard output as it comes, each line with its host. Else it is
                logged with level debug after each step.

        Returns:
            The task that holds this execution: itself, or a copy if it has been executed before.

        Raises:
            TaskExecutionError: If a step failed.
        """
        if isinstance(connection, TaskExecutor):
            return connection.execute_task(self, execute_async=False, debug=debug)
        connection.check()
        task = self._launch(
            Context(connection.host, connection, connection.agent_info.home), ExecutionOptions(debug=debug)
        )
        task._finish_sync()
        return task

    def _launch(self, context: Context, options: ExecutionOptions) -> RuntimeTask:
        """Start an execution, see :class:`Execution`; returns the task that holds it."""
        with self._lock:
            if not self._steps:
                raise ValueError(f"task {self.name!r} has no steps: add one, e.g. with run_command()")
            if self._execution is None:
                env = checked_variables(self._env)
                execution = Execution(self.name, self._steps, context, env, options, self._limits)
                self._execution = execution  # before it begins, so that an interrupted caller can end it
                try:
                    execution.start()
                except LazyclusterError:
                    self._execution = None
                    raise
                return self
        return copy.copy(self)._launch(context, options)

    def _finish_sync(self) -> None:
        """Wait for the end and raise what went wrong; an interrupted wait ends the execution."""
        execution = self._started()
        assert isinstance(execution, Execution)
        execution.wait_or_cancel()
        execution.raise_once()

    def _end_sync(self) -> None:
        """End what was to be waited for, if it has begun."""
        if isinstance(self._execution, Execution):
            self._execution.end_and_wait()

    def _was_broadcast(self, copies: Sequence[RuntimeTask]) -> None:
        """Have the task show the executions of its copies on several hosts as its own."""
        with self._lock:
            if self._execution is None:
                self._execution = Broadcast(self.name, [one for task in copies for one in task._executions()])

    def _executions(self) -> Sequence[Execution]:
        execution = self._started()
        return execution.executions if isinstance(execution, Broadcast) else [execution]

    def _started(self) -> Execution | Broadcast:
        if self._execution is None:
            raise LazyclusterError(f"task {self.name!r} has not been executed yet")
        return self._execution

    # --- what came out -------------------------------------------------------------------------
    @property
    def host(self) -> str | None:
        """The host that executes it; None before, and if copies of it are executed on several."""
        return self._execution.host if self._execution else None

    @property
    def status(self) -> str:
        """One of ``pending``, ``running``, ``done``, ``failed`` and ``cancelled``."""
        return self._execution.status if self._execution else "pending"

    @property
    def future(self) -> concurrent.futures.Future[Any]:
        """The execution as a future, e.g. for :func:`concurrent.futures.wait` and :func:`asyncio.wrap_future`.

        Its result is that of :meth:`result`. If it is cancelled, it is done when all that ran has ended.

        Raises:
            LazyclusterError: If the task has not been executed yet.
        """
        return self._started().future

    @property
    def exception(self) -> TaskExecutionError | None:
        """The error of a task that has failed; None if it has not, or not yet. Does not wait."""
        if self._execution is None or self._execution.error is None:
            return None
        self._execution.retrieved = True
        return self._execution.error

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end and return what the last function of the task returned, None if it has none.

        Of a task that was executed on all hosts of a group, a list with what it returned on each.

        Args:
            timeout: Seconds; None: as long as it takes.

        Raises:
            TaskExecutionError: If a step failed, each time that it is asked.
            TimeoutError: If it takes longer.
            concurrent.futures.CancelledError: If it was cancelled.
            LazyclusterError: If the task has not been executed yet.
        """
        try:
            return self.future.result(timeout)
        except concurrent.futures.TimeoutError:
            raise TimeoutError(self._started().timeout_message(timeout)) from None

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end. Returns at once if it has not been executed, and silently if it was cancelled.

        Args:
            timeout: Seconds; None: as long as it takes.

        Raises:
            TaskExecutionError: If a step failed and neither this nor another join has raised it before.
            TimeoutError: If it takes longer; it goes on.
        """
        if self._execution is None:
            return
        if not self._execution.wait(timeout):
            raise TimeoutError(self._execution.timeout_message(timeout))
        self._execution.raise_once()

    def cancel(self) -> bool:
        """Ask for the end of all that the task runs on the host: interrupted first, then terminated, then killed.

        Returns:
            Whether there was something to end. Use :meth:`join` to wait until it has ended.
        """
        return self._execution.cancel() if self._execution else False

    @property
    def execution_log(self) -> list[str]:
        """The output of each step, one entry per step that was executed; long output is cut to its end.

        Waits for the end of the task, unless it was started with ``omit_on_join``: then it is what there is so far.
        """
        if self._execution is None:
            return []
        if not self._execution.omit_on_join:
            self._execution.wait()
        return [result.output for result in self._execution.results]

    @property
    def execution_log_file_path(self) -> str | None:
        """The file on this machine that takes all output as it comes, byte for byte; it exists once there is some.

        None before the execution.
        """
        return self._execution.log_file if self._execution else None

    @property
    def function_returns(self) -> Generator[Any, None, None]:
        """The results of the functions of the task, in order. Waits for the end of the task, see :attr:`execution_log`.

        Raises:
            TaskExecutionError: If a step failed and no join has raised it before, when the generator is used.
        """
        return self._returns()

    def _returns(self) -> Generator[Any, None, None]:
        execution = self._execution
        if execution is None:
            return
        if not execution.omit_on_join:
            execution.wait()
        if execution.is_over:
            execution.raise_once()
        yield from [result.value for result in execution.results if result.has_value]

    @property
    def process(self) -> TaskProcess | None:
        """A handle of the work on the host that behaves like :class:`multiprocessing.Process`; None before."""
        return TaskProcess(self._execution) if self._execution else None

    def print_log(self) -> None:
        """Print what each step printed, as a table; see :attr:`execution_log`."""
        show_logs(self._logs())

    def _logs(self) -> list[LoggedTask]:
        execution = self._execution
        if execution is not None and not execution.omit_on_join:
            execution.wait()
        if isinstance(execution, Broadcast):
            execution.retrieved = True
            return [_task_log(self.name, self.steps, one, one.error) for one in execution.executions]
        return [_task_log(self.name, self.steps, execution, self.exception)]

    def cleanup(self) -> None:
        """End the task if it runs, and wait until it has ended. Its results stay readable."""
        if self._execution is not None:
            self._execution.cancel()
            self._execution.wait(_CLEANUP_LIMIT)
            self._execution.report()

    def _view(self) -> View:
        if isinstance(self._execution, Broadcast):
            return _broadcast_view(self._execution)
        return _task_view(self.name, self.steps, self._execution)

    # --- copies: tasks with the same steps, which have not been executed -----------------------
    def _with_steps(self: T, steps: Sequence[Step]) -> T:
        """Return a copy with other steps."""
        return _rebuilt(type(self), self.name, steps, self._env, self._limits)

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        return self._with_steps(self.steps)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.name, self.steps, self._env, self._limits)

    def __repr__(self) -> str:
        where = f" on {self._execution.where}" if self._execution else ""
        return f"<RuntimeTask {self.name!r}: {counted(len(self._steps), 'step')}, {self.status}{where}>"


# --- how it is shown -----------------------------------------------------------------------------
def _status_cell(status: str) -> Cell:
    """Return the status of a task or a step as a cell."""
    return Cell(status, _TONES.get(status, ""))


def _task_view(name: str, steps: tuple[Step, ...], execution: Execution | None) -> View:
    """Return the view of a task in a notebook."""
    facts: list[Fact] = []
    status = "pending"
    if execution is not None:
        steps, status = execution.steps, execution.status
        facts.append(("host", execution.context.host))
        if execution.log_file is not None and execution.results:
            facts.append(("log", execution.log_file))
        if execution.error is not None:
            facts.append(("error", Cell(_cause(execution.error), "bad")))
    rows: list[list[Cell | str]] = [
        [str(number), _short(step.label), _step_status(number - 1, execution)] for number, step in enumerate(steps, 1)
    ]
    table = Table(("", "step", "status"), rows, right=frozenset({""}))
    return View(f"RuntimeTask {name}", _status_cell(status), facts, (table,))


def _broadcast_view(broadcast: Broadcast) -> View:
    """Return the view of a task that was executed on several hosts."""
    rows: list[list[Cell | str]] = []
    for one in broadcast.executions:
        done = max(0, len(one.results) - (one.is_over and one.status != "done"))
        error = Cell(_cause(one.error), "bad") if one.error is not None else ""
        rows.append([one.context.host, f"{done} of {len(one.steps)}", _status_cell(one.status), error])
    table = Table(("host", "steps", "status", "error"), rows, right=frozenset({"steps"}))
    return View(f"RuntimeTask {broadcast.name}", _status_cell(broadcast.status), tables=(table,))


def _task_log(name: str, steps: tuple[Step, ...], execution: Execution | None, failure: Exception | None) -> LoggedTask:
    """Return the output of a task on a host."""
    if execution is None:
        status = _status_cell("pending")
        return LoggedTask("", name, "pending", [LoggedStep(_short(step.label), status, "") for step in steps])
    outputs = [result.output for result in execution.results]
    logged = [
        LoggedStep(_short(step.label), _step_status(index, execution), outputs[index] if index < len(outputs) else "")
        for index, step in enumerate(execution.steps)
    ]
    error = "" if failure is None else _cause(failure)
    return LoggedTask(execution.context.host, name, execution.status, logged, error)


def _step_status(index: int, execution: Execution | None) -> Cell:
    if execution is None or index > len(execution.results):
        return _status_cell("pending" if execution is None or not execution.is_over else "not reached")
    if index == len(execution.results):
        return _status_cell("not reached" if execution.is_over else "running")
    last = index == len(execution.results) - 1
    if last and execution.is_over and execution.status != "done":
        return _status_cell(execution.status)
    return _status_cell("done")


def _cause(error: Exception) -> str:
    """Return the cause of a failed step: the first line of the message names the step, the second says why."""
    return "\n".join(str(error).splitlines()[:2][-1:]).strip()


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 3]}..."
