"""Runtimes: hosts on which tasks are executed."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from .core import event_loop, lifetime
from .output import progress
from .output.execution_log import show_logs
from .output.view import Shown
from .runtime.belongings import Belongings
from .runtime.registry import Registry, join_all
from .runtime.session import HostSession, HostSpec, connected, may_ask
from .runtime.views import runtime_view
from .ssh.tunnels import close_tunnels
from .tasks import detached
from .tasks.context import Context, ExecutionOptions, checked_variables
from .tasks.detached import DetachedTask
from .tasks.execution import settled
from .tasks.task import RuntimeTask

if TYPE_CHECKING:
    from .tasks.pickling import PickledCall

__all__ = ["LocalRuntime", "Runtime", "RuntimeTask"]

R = TypeVar("R", bound="Runtime")

_END_LIMIT = 25.0  # seconds for all tasks of a runtime to end


class Runtime(Belongings, Shown):
    """A host that can be reached with `ssh`, on which tasks are executed.

    Making one connects to the host and checks it, under a deadline. Everything that it starts there ends with
    :meth:`cleanup`, at the end of a ``with`` block, or when the manager's process ends, however it does. It may be
    used from several threads, and inside a running event loop, but not in a forked child, and it cannot be pickled.

    Args:
        host: As `ssh` takes it: an alias of your ssh configuration, a name, ``user@host`` or ``user@host:port``.
        working_dir: A directory on the host, made if it is missing and kept; ``~`` and environment variables are
            understood. By default a temporary directory, which is removed at the end. Tasks find its path in the
            environment variable :attr:`WORKING_DIR_ENV_VAR_NAME`. One that another user owns or may write to is an
            error; see ``Environment.trust_group`` for groups.
        connection_kwargs: How to reach the host, beyond what your ssh configuration says: ``user``, ``port``,
            ``key_filename``, ``password``, ``passphrase``, ``timeout`` (seconds), ``config_file``, ``proxy_jump``,
            ``host_keys`` (``"strict"`` or ``"accept-new"``), ``ssh_options``, ``relay`` (``"agent"``: ports are carried
            by the agent where the host's sshd forbids to forward them), ``link_timeout`` (seconds within which a link
            that has dropped is noticed, 10), ``grace`` (seconds for which the host goes on with what runs there while
            the link is down, 300; 0: it ends everything at once), ``reconnect`` (seconds for which the link is tried
            again; by default as long as ``grace``).
        python: The interpreter on the host: a path, a name, or ``"auto"`` for one of the manager's minor version.
            By default ``python3``, as the environment there finds it.
        setup: Shell lines that are run once, e.g. ``"conda activate ml"``; the environment that they leave is used for
            commands, functions and workers. A line that fails is an error, unless ``|| true`` follows it.
        env: Environment variables, see :attr:`env_variables`.
        shell: The shell for commands, by default the user's own.
        environment: The Python environment in which functions, commands and workers run; made on the host when it is
            first needed, or by :meth:`prepare`: ``"manager"`` for what is installed here, a list of requirements, a
            ``requirements.txt``, ``pyproject.toml``, ``uv.lock`` or ``pylock.toml`` of this machine, the path of an
            environment on the host, or an :class:`~lazycluster.EnvironmentSpec`.
        startup_files: When the start-up files of the shell (``.bashrc``, ``.zshenv``) are read: ``"once"`` per
            connection, and what they set holds for all commands; or ``"always"``, as the shell itself does it.

    Attributes:
        WORKING_DIR_ENV_VAR_NAME: The environment variable that tells tasks the working directory.

    Raises:
        InvalidRuntimeError: If the host cannot be used; its ``reason`` says what kind of failure it is.
        TypeError, ValueError: If an argument makes no sense.

    Examples:
        >>> with Runtime("host-1") as runtime:                                      # doctest: +SKIP
        ...     task = RuntimeTask("hello").run_command("echo Hello from $(hostname)")
        ...     runtime.execute_task(task, execute_async=False)
        ...     print(task.execution_log[0])
        ...     print(runtime.call(sum, [1, 2, 3]))
        Hello from host-1
        6
    """

    WORKING_DIR_ENV_VAR_NAME = "WORKING_DIR"

    def __init__(
        self,
        host: str,
        working_dir: str | None = None,
        connection_kwargs: Mapping[str, Any] | None = None,
        *,
        python: str | None = None,
        setup: str | None = None,
        env: Mapping[str, Any] | None = None,
        shell: str | None = None,
        environment: Any = None,
        startup_files: str = "once",
    ) -> None:
        own = (host, working_dir, connection_kwargs, python, setup, env or {}, shell)
        spec = HostSpec(*own, ask=may_ask(), environment=environment, startup_files=startup_files)
        # A person who is asked something must see the question.
        with progress.shown(False if spec.ask else None):
            self._begin(event_loop.run(connected(spec)))

    def _begin(self, session: HostSession) -> None:
        self._session = session
        self._ledger = Registry()
        self._env = dict(session.spec.env)
        self._info = None
        self._info_lock = threading.Lock()
        lifetime.register(self)

    @classmethod
    def from_session(cls: type[R], session: HostSession) -> R:
        """Return a runtime on a host that is connected already; for the layers above."""
        runtime = cls.__new__(cls)
        runtime._begin(session)
        return runtime

    # --- what it is ----------------------------------------------------------------------------
    @property
    def class_name(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @property
    def env_variables(self) -> dict[str, str]:
        """Environment variables for the tasks that are started from now on."""
        return self._env

    @env_variables.setter
    def env_variables(self, env_variables: Mapping[str, Any]) -> None:
        self._env = checked_variables(env_variables)

    def add_env_variables(self, env_variables: Mapping[str, Any]) -> None:
        """Add environment variables, or give new values to those that exist.

        Args:
            env_variables: Names and values; numbers and paths are turned into text.

        Raises:
            TypeError, ValueError: If a name or value cannot be used.
        """
        self._env.update(checked_variables(env_variables))

    def task_context(self) -> Context:
        """Return where and how tasks are carried out: directory, environment, interpreter; for the layers above."""
        self._session.check()
        return self._session.context(self._env, self.WORKING_DIR_ENV_VAR_NAME)

    # --- tasks ---------------------------------------------------------------------------------
    @overload
    def execute_task(
        self,
        task: RuntimeTask,
        execute_async: bool = True,
        omit_on_join: bool = False,
        debug: bool = False,
        *,
        retries: int = 0,
        retry_on: str = "host",
    ) -> RuntimeTask: ...
    @overload
    def execute_task(
        self,
        task: RuntimeTask,
        execute_async: bool = True,
        omit_on_join: bool = False,
        debug: bool = False,
        *,
        detach: Literal[True],
    ) -> DetachedTask: ...
    def execute_task(
        self,
        task: RuntimeTask,
        execute_async: bool = True,
        omit_on_join: bool = False,
        debug: bool = False,
        *,
        retries: int = 0,
        retry_on: str = "host",
        detach: bool = False,
    ) -> RuntimeTask | DetachedTask:
        """Execute a task on the host.

        Args:
            task: The task.
            execute_async: Return at once; else wait for its end.
            omit_on_join: Have :meth:`join` pass it over, e.g. for a service that runs until it is cancelled.
            debug: Print what the steps print to standard output as it comes, each line with its host. Else it is
                logged with level debug after each step.
            retries: How often the task is begun again, here, when the host has lost it, as after a restart; it waits
                until the host is back, for as long as the link is tried again.
            retry_on: ``"host"``, or ``"any"`` to try again whatever has failed.
            detach: Let it go on when this process ends; it is not waited for then. It may run commands and functions;
                a limit of time holds for each step. Without a ``working_dir`` of the runtime it gets a directory of its
                own, which stays with it. It is the one thing that stays on a host, because you asked for it:
                :meth:`detached_tasks` finds it again, and :meth:`DetachedTask.remove` removes it.

        Returns:
            The task that holds this execution: the one given, or a fresh copy if that has been executed before. With
            ``detach`` the :class:`DetachedTask`.

        Raises:
            TaskExecutionError: If it is waited for and a step failed.
            ValueError: If the task has no steps, or is to be detached and copies files, or retries make no sense, or
                other options are given with `detach` that do not apply to it.
            LazyclusterError: If the runtime cannot be used any more.
        """
        options = ExecutionOptions(debug, omit_on_join and execute_async, retries, retry_on)
        if detach:
            detached.check_options(task, options, wait=not execute_async)
            return event_loop.run(self.detach_soon(task, detached.detachable_calls(task)))
        started = task if getattr(task, "status", "") == "pending" else None
        try:
            started = self.start_task(task, options)
            if not execute_async:
                started._finish_sync()
        except KeyboardInterrupt:  # maybe before the wait, which ends what it waits for, has begun
            if not execute_async and started is not None:
                started._end_sync()
            raise
        return started

    def detached_tasks(self) -> list[DetachedTask]:
        """Return the tasks that were started on this host with ``detach=True``, by any process of yours, oldest first.

        Raises:
            LazyclusterError: If the runtime cannot be used.
        """
        return event_loop.run(self.detached_tasks_soon())

    async def detached_tasks_soon(self) -> list[DetachedTask]:
        """Do what :meth:`detached_tasks` does; for the layers above, on the loop."""
        self._session.check()
        return await detached.detached_tasks(self.connection)

    async def detach_soon(self, task: RuntimeTask, calls: Sequence[PickledCall | None]) -> DetachedTask:
        """Start a task that does not end with this process; for the layers above, on the loop."""
        own = self._session.spec.working_dir is None
        variable = self.WORKING_DIR_ENV_VAR_NAME
        return await detached.start_detached(task, self.task_context(), calls, own_directory=own, cwd_variable=variable)

    def start_task(self, task: RuntimeTask, options: ExecutionOptions) -> RuntimeTask:
        """Start a task, see :meth:`execute_task`; for the layers above, which may share work between hosts."""
        if not isinstance(task, RuntimeTask):
            raise TypeError(f"a task must be a RuntimeTask, not {type(task).__name__}")
        if options.retries and options.next_context is None:
            options = replace(options, next_context=lambda _: self.context_again())
        started = task._launch(self.task_context(), options)
        self._ledger.add_task(started)
        return started

    def execute_function(
        self, function: Callable[..., Any], execute_async: bool = False, debug: bool = False, **func_kwargs: Any
    ) -> RuntimeTask:
        """Call a Python function on the host, in a process of its own.

        :meth:`call` returns the result itself, and takes arguments of any name.

        Args:
            function: The function, see :meth:`RuntimeTask.run_function`.
            execute_async: Return at once; else wait for the end.
            debug: See :meth:`execute_task`.
            **func_kwargs: The arguments of the function.

        Returns:
            The task that was made for it; what the function returned is its :meth:`~RuntimeTask.result`.

        Raises:
            TaskExecutionError: If it is waited for and fails; the function's own exception is its ``__cause__``.
        """
        name = getattr(function, "__name__", None) or "function"
        return self.execute_task(RuntimeTask(name).call(function, **func_kwargs), execute_async, debug=debug)

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a Python function on the host and return what it returns.

        Args:
            function: The function, see :meth:`RuntimeTask.run_function`.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What the function returned.

        Raises:
            TaskExecutionError: If it fails; the function's own exception is its ``__cause__``.

        Examples:
            >>> runtime.call(pow, 2, 10)        # doctest: +SKIP
            1024
        """
        name = getattr(function, "__name__", None) or "function"
        task, key = RuntimeTask(name).call(function, *args, **kwargs), ""
        try:
            key = self._ledger.add_task(task._launch(self.task_context(), ExecutionOptions()))
            task._finish_sync()
            return task.result()
        except (KeyboardInterrupt, SystemExit):
            task.cancel()
            raise
        finally:
            # Nobody has a name for this task, and its result may be large.
            self._ledger.forget(key)

    def send_file(
        self, local_path: str | os.PathLike[str], remote_path: str | None = None, execute_async: bool = False
    ) -> RuntimeTask:
        """Copy a file or folder from the manager to the host, see :meth:`RuntimeTask.send_file`.

        Args:
            local_path: On this machine.
            remote_path: On the host, by default under the same name in the working directory.
            execute_async: Return at once; else wait for the end.

        Returns:
            The task that was made for it.

        Raises:
            ValueError: If a path is empty.
            TaskExecutionError: If it is waited for and fails.
        """
        return self.execute_task(RuntimeTask("send-file").send_file(local_path, remote_path), execute_async)

    def get_file(
        self, remote_path: str, local_path: str | os.PathLike[str] | None = None, execute_async: bool = False
    ) -> RuntimeTask:
        """Copy a file or folder from the host to the manager, see :meth:`RuntimeTask.get_file`.

        Args:
            remote_path: On the host.
            local_path: On this machine, by default under the same name in the current directory.
            execute_async: Return at once; else wait for the end.

        Returns:
            The task that was made for it.

        Raises:
            ValueError: If a path is empty.
            TaskExecutionError: If it is waited for and fails.
        """
        return self.execute_task(RuntimeTask("get-file").get_file(remote_path, local_path), execute_async)

    @property
    def tasks(self) -> list[RuntimeTask]:
        """The tasks that were started here, in that order, until :meth:`clear_tasks`."""
        return self._ledger.tasks

    @property
    def function_returns(self) -> Generator[Any, None, None]:
        """What the functions of all tasks returned, in the order in which the tasks were started; waits for them.

        Raises:
            TaskExecutionError: If a task failed, when the generator comes to it and no join has raised it before.
        """
        return (value for task in self.tasks for value in task.function_returns)

    def execution_log(self, task_name: str) -> list[str]:
        """Return what each step of a task printed; of the last one, where several had that name. Waits for it.

        Args:
            task_name: The name of the task.

        Raises:
            ValueError: If no task of that name was started here.
        """
        for task in reversed(self.tasks):
            if task.name == task_name:
                return task.execution_log
        known = ", ".join(sorted({task.name for task in self.tasks})) or "none"
        raise ValueError(f"{self.host}: there is no task named {task_name!r}; there are: {known}")

    def print_log(self) -> None:
        """Print what each step of each task printed, as a table."""
        show_logs([log for task in self.tasks for log in task._logs()])

    def clear_tasks(self) -> None:
        """Forget all tasks that have ended. Those that still run are kept, so that :meth:`join` waits for them."""
        self._ledger.clear_tasks()

    def join(self) -> None:
        """Wait for the end of all tasks, except those started with ``omit_on_join``.

        Raises:
            TaskExecutionError: If one failed, and no join has raised it before.
            GroupTaskError: If several failed; it holds all of their errors.
        """
        join_all(self.tasks)

    # --- end -----------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """End all tasks and port exposures, remove temporary directories, and disconnect.

        Results of tasks stay readable. Doing it again does nothing. Errors that nobody has asked for are logged.
        """
        if self.is_ours:
            event_loop.run(self.cleanup_soon())

    async def cleanup_soon(self) -> None:
        """Do what :meth:`cleanup` does; for the layers above, on the loop."""
        self._session.state = "closed"
        try:
            await close_tunnels(exposure.tunnel for exposure in self._ledger.exposures)
            ending = self._ledger.end_tasks()
            if ending:
                ended = asyncio.gather(*(settled(future) for future in ending))
                await self.connection.heard_out(ended, _END_LIMIT)
        finally:  # also if Ctrl-C puts an end to the waiting: with the connection, everything on the host ends
            await self._session.close()
        self._ledger.report()

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            f"{self.host}: a {self.class_name} is a live connection and cannot be copied or sent elsewhere; "
            "hand on the host's name instead"
        )

    def __copy__(self) -> Runtime:
        self.__reduce__()
        return self

    _view = runtime_view

    def __repr__(self) -> str:
        return f"<{self.class_name} {self.host!r} {self.connection.state}>"


class LocalRuntime(Runtime):
    """This very machine as a runtime, without ssh: for those who have no host yet, and for tests.

    Args:
        working_dir: See :class:`Runtime`.
        python: See :class:`Runtime`; by default the manager's own interpreter.
        setup: See :class:`Runtime`.
        env: See :class:`Runtime`.
        shell: See :class:`Runtime`.
        host: The name that it goes by.
        environment: See :class:`Runtime`.
        startup_files: See :class:`Runtime`.

    Examples:
        >>> with LocalRuntime() as runtime:        # doctest: +SKIP
        ...     print(runtime.call(sum, [1, 2, 3]))
        6
    """

    def __init__(
        self,
        working_dir: str | None = None,
        *,
        python: str | None = None,
        setup: str | None = None,
        env: Mapping[str, Any] | None = None,
        shell: str | None = None,
        host: str = "localhost",
        environment: Any = None,
        startup_files: str = "once",
    ) -> None:
        own = sys.executable if python is None and setup is None else python
        more = {"environment": environment, "startup_files": startup_files}
        spec = HostSpec(host, working_dir, None, own, setup, env or {}, shell, True, **more)
        self._begin(event_loop.run(connected(spec)))
