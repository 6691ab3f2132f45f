"""`RuntimeTask`: steps that are carried out one after the other on a host."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lazycluster.exceptions import LazyclusterError, TaskExecutionError

from .execution import Context, Execution
from .handles import TaskProcess
from .steps import GetFile, RunCommand, RunFunction, SendFile, Step
from .variables import checked_variables

if TYPE_CHECKING:
    import asyncio

    from lazycluster.ssh.connection import Connection

    from .pickling import PickledCall

__all__ = ["RuntimeTask"]

_numbers = itertools.count(1)
_CLEANUP_LIMIT = 30.0  # seconds for a cancelled task to end what it started


@runtime_checkable
class Executor(Protocol):
    """What a runtime is to a task."""

    def execute_task(
        self, task: RuntimeTask, execute_async: bool = True, omit_on_join: bool = False, debug: bool = False
    ) -> RuntimeTask:
        """Execute a task."""


class RuntimeTask:
    """Steps that are carried out one after the other on a host: copy files, run commands and Python functions.

    A task is written down with methods that return the task itself, and is then executed by a
    :class:`~lazycluster.Runtime` or a :class:`~lazycluster.RuntimeGroup`. The first step that fails ends it.

    A task object keeps what came out of **one** execution. To execute it again, also while it is running, is allowed:
    that makes a fresh copy, which is what the executing method returns. The results of the first stay as they are.

    Args:
        name: A name for logs and messages; by default ``task-<number>``.

    Raises:
        TypeError: If the name is not a string.
        ValueError: If the name is empty.

    Examples:
        >>> task = RuntimeTask("prepare").send_file("data.csv").run_command("wc -l data.csv")
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
        self._execution: Execution | None = None
        self._lock = threading.Lock()

    # --- writing it down -----------------------------------------------------------------------
    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, as frozen dataclasses."""
        return tuple(self._steps)

    def _add(self, step: Step) -> RuntimeTask:
        with self._lock:
            self._refuse_while_running()
            self._steps.append(step)
        return self

    def _refuse_while_running(self) -> None:
        if self._execution is not None and not self._execution.is_over:
            raise LazyclusterError(f"task {self.name!r} is being executed: a step added now would never be carried out")

    def replace_steps(self, steps: Sequence[Step]) -> RuntimeTask:
        """Take other steps instead of the present ones; for the layers above.

        Args:
            steps: The new ones.

        Returns:
            The task itself.
        """
        with self._lock:
            self._refuse_while_running()
            self._steps = list(steps)
        return self

    def send_file(self, local_path: str | os.PathLike[str], remote_path: str | None = None) -> RuntimeTask:
        """Add a step that copies a file or folder from the manager to the host.

        Args:
            local_path: The file or folder on this machine.
            remote_path: Where it goes on the host: relative to the working directory, with ``~`` and environment
                variables as in a shell. By default it keeps its name, in the working directory.

        Returns:
            The task itself.

        Raises:
            ValueError: If a path is empty.
        """
        return self._add(SendFile(local_path, remote_path))  # type: ignore[arg-type]

    def get_file(self, remote_path: str, local_path: str | os.PathLike[str] | None = None) -> RuntimeTask:
        """Add a step that copies a file or folder from the host to the manager.

        Args:
            remote_path: The file or folder on the host, see :meth:`send_file`.
            local_path: Where it goes on this machine; an existing directory, or a path that ends with ``/``, takes it
                under its own name. By default it keeps its name, in the current directory.

        Returns:
            The task itself.

        Raises:
            ValueError: If a path is empty.
        """
        return self._add(GetFile(remote_path, local_path))  # type: ignore[arg-type]

    def run_command(self, command: str, shell: str | None = None) -> RuntimeTask:
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

    def run_function(self, function: Callable[..., Any], **func_kwargs: Any) -> RuntimeTask:
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

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> RuntimeTask:
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
        task = self._launch(Context(connection.host, connection, connection.hello.home), debug=debug)
        task._finish_sync()
        return task

    def _launch(
        self,
        context: Context,
        *,
        debug: bool = False,
        omit_on_join: bool = False,
        calls: Sequence[PickledCall | Exception | None] | None = None,
        gate: asyncio.Lock | None = None,
    ) -> RuntimeTask:
        """Start an execution, see :class:`Execution`; returns the task that holds it."""
        with self._lock:
            if not self._steps:
                raise ValueError(f"task {self.name!r} has no steps: add one, e.g. with run_command()")
            if self._execution is None:
                execution = Execution(
                    self.name,
                    self._steps,
                    context,
                    checked_variables(self._env),
                    debug=debug,
                    omit_on_join=omit_on_join,
                    calls=calls,
                    gate=gate,
                )
                self._execution = execution.start()
                return self
        return self._copy()._launch(context, debug=debug, omit_on_join=omit_on_join, calls=calls, gate=gate)

    def _finish_sync(self) -> None:
        """Wait for the end and raise what went wrong; an interrupted wait ends the execution."""
        execution = self._started()
        execution.wait_or_cancel()
        execution.raise_once()

    def _started(self) -> Execution:
        if self._execution is None:
            raise LazyclusterError(f"task {self.name!r} has not been executed yet")
        return self._execution

    # --- what came out -------------------------------------------------------------------------
    @property
    def host(self) -> str | None:
        """The host that executes it; None before."""
        return self._execution.context.host if self._execution else None

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
            raise TimeoutError(self._too_long(timeout)) from None

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
            raise TimeoutError(self._too_long(timeout))
        self._execution.raise_once()

    def _too_long(self, timeout: float | None) -> str:
        return f"task {self.name!r} on {self.host} has not ended within {timeout} s"

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
        """Print what each step printed; see :attr:`execution_log`."""
        entries = self.execution_log
        lines = [f"--- task {self.name} on {self.host or 'no host yet'}: {self.status}"]
        for number, (step, output) in enumerate(zip(self._ran(), entries, strict=False), 1):
            lines += [f"[{number}] {step.label}", output.rstrip("\n")]
        sys.stdout.write("\n".join(line for line in lines if line) + "\n")

    def _ran(self) -> tuple[Step, ...]:
        return self._execution.steps if self._execution else self.steps

    def cleanup(self) -> None:
        """End the task if it runs, and wait until it has ended. Its results stay readable."""
        if self._execution is not None:
            self._execution.cancel()
            self._execution.wait(_CLEANUP_LIMIT)
            self._execution.report()

    # --- copies --------------------------------------------------------------------------------
    def _copy(self) -> RuntimeTask:
        copy = type(self).__new__(type(self))
        RuntimeTask.__init__(copy, self.name)
        copy._steps = list(self._steps)
        copy._env = dict(self._env)
        return copy

    def __copy__(self) -> RuntimeTask:
        return self._copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeTask:
        """Return a fresh task with the same steps, which has not been executed."""
        return self._copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.name, self.steps, self._env)

    def __repr__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        return f"<RuntimeTask {self.name!r}: {len(self._steps)} steps, {self.status}{where}>"


def _rebuilt(cls: type[RuntimeTask], name: str, steps: tuple[Step, ...], env: dict[str, str]) -> RuntimeTask:
    task = cls.__new__(cls)
    RuntimeTask.__init__(task, name)
    task._steps, task._env = list(steps), dict(env)
    return task
