"""`RuntimeTask`: steps that are carried out one after the other on a host."""

from __future__ import annotations

import concurrent.futures
import copy
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lazycluster.core.words import counted
from lazycluster.exceptions import LazyclusterError, TaskExecutionError
from lazycluster.output.execution_log import LoggedTask, show_logs
from lazycluster.output.view import Shown, View

from .broadcast import Broadcast
from .context import Context, ExecutionOptions
from .execution import Execution
from .process_handles import TaskProcess
from .recipe import Recipe
from .variables import checked_variables
from .views import broadcast_view, task_log, task_view

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["RuntimeTask"]

_CLEANUP_LIMIT = 30.0  # seconds for a cancelled task to end what it started


@runtime_checkable
class Executor(Protocol):
    """What a runtime is to a task."""

    def execute_task(
        self, task: RuntimeTask, execute_async: bool = True, omit_on_join: bool = False, debug: bool = False
    ) -> RuntimeTask:
        """Execute a task."""


class RuntimeTask(Recipe, Shown):
    """Steps that are carried out one after the other on a host: copy files, run commands and Python functions.

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
        super().__init__(name)
        self._execution: Execution | Broadcast | None = None

    def _refuse_while_running(self) -> None:
        if self._execution is not None and not self._execution.is_over:
            raise LazyclusterError(f"task {self.name!r} is being executed: a step added now would never be carried out")

    # --- executing it --------------------------------------------------------------------------
    def execute(self, connection: Executor | Connection, debug: bool = False) -> RuntimeTask:
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
        if isinstance(connection, Executor):
            return connection.execute_task(self, execute_async=False, debug=debug)
        task = self._launch(Context(connection.host, connection, connection.hello.home), ExecutionOptions(debug=debug))
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
                self._execution = execution  # before it begins: whoever is interrupted can end it
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
        """Note that copies of the task are executed on several hosts: what comes out of them is shown for it, too."""
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
        """Why the task has failed; None if it has not, or not yet. Does not wait."""
        if self._execution is None or self._execution.error is None:
            return None
        self._execution.asked = True
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
            raise TimeoutError(self._started().too_long(timeout)) from None

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
            raise TimeoutError(self._execution.too_long(timeout))
        self._execution.raise_once()

    def cancel(self) -> bool:
        """Ask for the end of all that the task runs on the host: interrupted first, then terminated, then killed.

        Returns:
            Whether there was something to end. Use :meth:`join` to wait until it has ended.
        """
        return self._execution.cancel() if self._execution else False

    @property
    def execution_log(self) -> list[str]:
        """What each step printed, one entry per step that was carried out; long output is cut to its end.

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
        """What the functions of the task returned, in order. Waits for the end of the task, see :attr:`execution_log`.

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
            execution.asked = True
            return [task_log(self.name, self.steps, one, one.error) for one in execution.executions]
        return [task_log(self.name, self.steps, execution, self.exception)]

    def cleanup(self) -> None:
        """End the task if it runs, and wait until it has ended. Its results stay readable."""
        if self._execution is not None:
            self._execution.cancel()
            self._execution.wait(_CLEANUP_LIMIT)
            self._execution.report()

    def _view(self) -> View:
        if isinstance(self._execution, Broadcast):
            return broadcast_view(self._execution)
        return task_view(self.name, self.steps, self._execution)

    def __repr__(self) -> str:
        where = f" on {self._execution.where}" if self._execution else ""
        return f"<RuntimeTask {self.name!r}: {counted(len(self._steps), 'step')}, {self.status}{where}>"
