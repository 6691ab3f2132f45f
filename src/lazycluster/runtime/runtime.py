"""`Runtime`: a host on which tasks are executed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from lazycluster.core import event_loop, lifetime
from lazycluster.core.suggestions import suggestion
from lazycluster.exceptions import LazyclusterError
from lazycluster.output import progress
from lazycluster.output.execution_log import show_logs
from lazycluster.output.view import Cell, Fact, Shown, View, show
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.tunnels import Tunnel, check_port, close_tunnels
from lazycluster.tasks import detached
from lazycluster.tasks.context import Context, ExecutionOptions, checked_variables
from lazycluster.tasks.detached import DetachedTask
from lazycluster.tasks.execution import ProcessHandle, settled
from lazycluster.tasks.task import RuntimeTask

from . import directories
from .filters import HostFilter, unmet
from .network import checked_ports, open_from_runtime, open_to_runtime, pick_port
from .registry import Registry, join_all
from .session import ANSWER_LIMIT, HostSession, HostSpec, connect, may_ask
from .views import MACHINE, account, info_view, known_infos, lasting, state_cell

if TYPE_CHECKING:
    from lazycluster.tasks.pickling import PickledCall

__all__ = ["Runtime"]

R = TypeVar("R", bound="Runtime")
T = TypeVar("T")

_MEGABYTE = 1024 * 1024
_END_LIMIT = 25.0  # seconds for all tasks of a runtime to end


class Runtime(Shown):
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
        address: The IP address at which other hosts reach this one, for what they say to each other without the
            manager (``network="direct"``). By default one of its own, of which it is tried whether they do.

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
        address: str | None = None,
    ) -> None:
        own = (host, working_dir, connection_kwargs, python, setup, env or {}, shell)
        more = {"environment": environment, "startup_files": startup_files, "address": address}
        spec = HostSpec(*own, ask=may_ask(), **more)
        # A person who is asked something must see the question.
        with progress.shown(False if spec.ask else None):
            self._begin(event_loop.run(connect(spec)))

    def _begin(self, session: HostSession) -> None:
        self._session = session
        self._registry = Registry()
        self._env = dict(session.spec.env)
        self._info: concurrent.futures.Future[dict[str, Any]] | None = None
        self._info_lock = threading.Lock()
        lifetime.register(self)

    @classmethod
    def _from_session(cls: type[R], session: HostSession) -> R:
        """Return a runtime on a host that is connected already."""
        runtime = cls.__new__(cls)
        runtime._begin(session)
        return runtime

    # --- the runtime -------------------------------------------------------------------------------
    @property
    def class_name(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @property
    def host(self) -> str:
        """The host, as it was named when the runtime was made."""
        return self._session.host

    @property
    def working_dir(self) -> str:
        """The absolute path of the working directory on the host."""
        return self._session.working_dir

    @property
    def has_temporary_working_dir(self) -> bool:
        """True if the working directory was made for this runtime alone, and is removed at the end."""
        return self._session.spec.working_dir is None

    @property
    def _connection(self) -> Connection:
        """The connection to the host."""
        return self._session.connection

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

    def _context(self) -> Context:
        """Return where and how tasks are carried out: directory, environment, interpreter."""
        self._session.check()
        return self._session.context(self._env, self.WORKING_DIR_ENV_VAR_NAME)

    async def _context_when_back(self) -> Context | None:
        """Return where tasks are carried out, once the host is back if it is away.

        None if it is not coming back.
        """
        try:
            await self._connection.wait_until_open()
            return self._context()
        except LazyclusterError:
            return None

    def prepare(self, refresh: bool = False) -> None:
        """Make the Python environment on the host now, instead of when it is first needed.

        Packages from directories of this machine that have changed are built and sent anew.

        Args:
            refresh: Take the newest versions that are allowed, whatever was found before.

        Raises:
            EnvironmentBuildError: If it cannot be made; the message has the package concerned and the next step.
        """
        self._wait(self._prepare_async(refresh))

    async def _prepare_async(self, refresh: bool = False) -> None:
        """Do what :meth:`prepare` does."""
        self._session.check()
        if self._session.environment is not None:
            await self._session.environment.ready(again=True, refresh=refresh)

    @property
    def environment_path(self) -> str | None:
        """The directory of the Python environment on the host; None if there is none, or it was not made yet."""
        environment = self._session.environment
        active = environment.active if environment is not None else None
        return active.prefix or None if active is not None else None

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            self._session.check()
        except BaseException:
            coroutine.close()
            raise
        return event_loop.run(coroutine)

    def _ask(self, op: str, **params: Any) -> dict[str, Any]:
        return self._wait(self._session.ask(op, **params))

    # --- the host ----------------------------------------------------------------------------------
    @property
    def info(self) -> dict[str, Any]:
        """The known facts of the host; asked once, see :meth:`refresh_info`.

        A new dictionary with ``os``, ``cpu_cores`` and ``memory`` (bytes; what the host's control groups allow),
        ``python_version``, ``gpus`` (those that ``CUDA_VISIBLE_DEVICES`` allows; if there is none, ``gpu_problem``
        says why), and more: load, free memory, disk.
        """
        return dict(self.fill_info_buffer().result(ANSWER_LIMIT + 5))

    def fill_info_buffer(self) -> concurrent.futures.Future[dict[str, Any]]:
        """Ask for :attr:`info` unless it was asked before, without waiting for the answer."""
        with self._info_lock:
            failed = (
                self._info is not None
                and self._info.done()
                and (self._info.cancelled() or self._info.exception() is not None)
            )
            if self._info is None or failed:
                self._session.check()
                self._info = event_loop.submit(self._session.ask("info", env=dict(self._context().env)))
            return self._info

    def refresh_info(self) -> dict[str, Any]:
        """Ask the host again, e.g. for its present load and free memory, and return :attr:`info`."""
        with self._info_lock:
            self._info = None
        return self.info

    @property
    def os(self) -> str:
        """The operating system, e.g. ``Debian GNU/Linux 12 (bookworm)``."""
        return str(self.info["os"])

    @property
    def cpu_cores(self) -> int:
        """The number of CPU cores that may be used."""
        return int(self.info["cpu_cores"])

    @property
    def memory(self) -> int:
        """The memory that may be used, in bytes."""
        return int(self.info["memory"])

    @property
    def memory_in_mb(self) -> int:
        """The memory that may be used, in megabytes (2**20 bytes)."""
        return self.memory // _MEGABYTE

    @property
    def python_version(self) -> str:
        """The version of the host's Python, e.g. ``3.11.7``."""
        return str(self.info["python_version"])

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """The GPUs, one dictionary for each."""
        return list(self.info["gpus"])

    @property
    def gpu_count(self) -> int:
        """The number of GPUs."""
        return len(self.gpus)

    def is_valid_runtime(self) -> bool:
        """Return True if the host can be used now: it is connected, and answers within a few seconds."""
        try:
            self._ask("expand", path=".")
        except LazyclusterError:
            return False
        return True

    def print_info(self) -> None:
        """Print what is known of the host."""
        show(info_view(self.host, self.info, self.working_dir))

    def check_filter(
        self,
        gpu_required: bool = False,
        min_memory: int | None = None,
        min_cpu_cores: int | None = None,
        installed_executables: str | list[str] | None = None,
        filter_commands: str | list[str] | None = None,
    ) -> bool:
        """Check whether the host meets all of some conditions.

        Args:
            gpu_required: It must have a GPU.
            min_memory: It must have so many megabytes.
            min_cpu_cores: It must have so many CPU cores.
            installed_executables: These programs must be found on it.
            filter_commands: Each of these shell commands must print ``true`` in the end; everything else means no.

        Returns:
            True if it does.

        Raises:
            TypeError, ValueError: If a condition makes no sense.

        Examples:
            >>> runtime.check_filter(min_memory=500, installed_executables="rsync")        # doctest: +SKIP
            True
            >>> runtime.check_filter(filter_commands='[ -d /data ] && echo true')          # doctest: +SKIP
            False
        """
        wanted = HostFilter(gpu_required, min_memory, min_cpu_cores, installed_executables, filter_commands)
        return self._wait(unmet(self._session, self._context(), wanted)) is None

    def echo(self, msg: str) -> str:
        """Let the host print a text, literally, and return what came back.

        Args:
            msg: The text.

        Raises:
            TypeError: If it is not a string.
            LazyclusterError: If the host does not do it.
        """
        if not isinstance(msg, str):
            raise TypeError(f"a message must be a string, not {type(msg).__name__}")
        argv = ["/bin/sh", "-c", 'printf "%s" "$1"', "sh", msg]
        status, output = self._wait(self._session.capture(self._context(), argv=argv))
        if status != 0:
            raise LazyclusterError(f"{self.host}: echo ended with {status}: {output}")
        return output

    # --- tasks -------------------------------------------------------------------------------------
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
            return event_loop.run(self._detach_async(task, detached.detachable_calls(task)))
        started = task if getattr(task, "status", "") == "pending" else None
        try:
            started = self._start_task(task, options)
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
        return event_loop.run(self._detached_tasks_async())

    async def _detached_tasks_async(self) -> list[DetachedTask]:
        """Do what :meth:`detached_tasks` does."""
        self._session.check()
        return await detached.detached_tasks(self._connection)

    async def _detach_async(self, task: RuntimeTask, calls: Sequence[PickledCall | None]) -> DetachedTask:
        """Start a task that does not end with this process."""
        own = self._session.spec.working_dir is None
        variable = self.WORKING_DIR_ENV_VAR_NAME
        return await detached.start_detached(task, self._context(), calls, own_directory=own, cwd_variable=variable)

    def _start_task(self, task: RuntimeTask, options: ExecutionOptions) -> RuntimeTask:
        """Start a task, see :meth:`execute_task`."""
        if not isinstance(task, RuntimeTask):
            raise TypeError(f"a task must be a RuntimeTask, not {type(task).__name__}")
        if options.retries and options.next_context is None:
            options = replace(options, next_context=lambda _: self._context_when_back())
        started = task._launch(self._context(), options)
        self._registry.add_task(started)
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
            The function's result.

        Raises:
            TaskExecutionError: If it fails; the function's own exception is its ``__cause__``.

        Examples:
            >>> runtime.call(pow, 2, 10)        # doctest: +SKIP
            1024
        """
        name = getattr(function, "__name__", None) or "function"
        task, key = RuntimeTask(name).call(function, *args, **kwargs), ""
        try:
            key = self._registry.add_task(task._launch(self._context(), ExecutionOptions()))
            task._finish_sync()
            return task.result()
        except (KeyboardInterrupt, SystemExit):
            task.cancel()
            raise
        finally:
            # Nobody has a name for this task, and its result may be large.
            self._registry.forget(key)

    def send_file(
        self, local_path: str | PathLike[str], remote_path: str | None = None, execute_async: bool = False
    ) -> RuntimeTask:
        """Copy a file or directory from the manager to the host, see :meth:`RuntimeTask.send_file`.

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
        self, remote_path: str, local_path: str | PathLike[str] | None = None, execute_async: bool = False
    ) -> RuntimeTask:
        """Copy a file or directory from the host to the manager, see :meth:`RuntimeTask.get_file`.

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
        return self._registry.tasks

    @property
    def function_returns(self) -> Generator[Any, None, None]:
        """The results of the functions of all tasks, in the order in which the tasks were started; waits for them.

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
        known = suggestion(task_name, sorted({task.name for task in self.tasks}))
        raise ValueError(f"{self.host}: there is no task {task_name!r}{known}")

    def print_log(self) -> None:
        """Print what each step of each task printed, as a table."""
        show_logs([log for task in self.tasks for log in task._logs()])

    def clear_tasks(self) -> None:
        """Forget all tasks that have ended. Those that still run are kept, so that :meth:`join` waits for them."""
        self._registry.clear_tasks()

    def join(self) -> None:
        """Wait for the end of all tasks, except those started with ``omit_on_join``.

        Raises:
            TaskExecutionError: If one failed, and no join has raised it before.
            GroupTaskError: If several failed; it holds all of their errors.
        """
        join_all(self.tasks)

    def _take_over(self, task: RuntimeTask, before: Runtime | None) -> None:
        """Count a task that goes on here among those of this runtime.

        Args:
            task: The task.
            before: The runtime that had it.
        """
        if before is not None:
            before._registry.drop(task)
        self._registry.add_task(task)

    # --- tasks and port exposures, as processes ----------------------------------------------------
    @property
    def task_processes(self) -> list[ProcessHandle]:
        """Handles of the tasks, which behave like :class:`multiprocessing.Process`."""
        return [process for key, process in self._registry.processes().items() if self._registry.is_task(key)]

    @property
    def alive_process_count(self) -> int:
        """The number of tasks that run and ports that are exposed."""
        return len(self.get_processes(only_alive=True))

    @property
    def alive_task_process_count(self) -> int:
        """The number of tasks that run."""
        return self._registry.running

    @property
    def started_task_count(self) -> int:
        """The number of tasks that were started here since the beginning."""
        return self._registry.started

    def get_processes(self, only_alive: bool = False) -> dict[str, ProcessHandle]:
        """Return handles of all tasks and port exposures by their keys.

        Args:
            only_alive: Only those that have not ended.
        """
        processes = self._registry.processes()
        return {key: process for key, process in processes.items() if not only_alive or process.is_alive()}

    def get_process(self, key: str) -> ProcessHandle:
        """Return the handle of a task or port exposure.

        Args:
            key: Its key.

        Raises:
            ValueError: If there is none with this key.
        """
        try:
            return self._registry.processes()[key]
        except KeyError:
            raise ValueError(f"{self.host}: there is no process with the key {key!r}") from None

    def is_runtime_task_process(self, process_key: str) -> bool:
        """Return True if a key is that of a task of this runtime."""
        return self._registry.is_task(process_key)

    def is_port_exposure_process(self, process_key: str) -> bool:
        """Return True if a key is that of a port exposure of this runtime."""
        return self._registry.is_exposure(process_key)

    def stop_process(self, key: str) -> None:
        """End a task or a port exposure, and wait until it has ended.

        Args:
            key: Its key.

        Raises:
            ValueError: If there is none with this key.
        """
        process = self.get_process(key)
        process.terminate()
        process.join(_END_LIMIT)

    # --- ports -------------------------------------------------------------------------------------
    def has_free_port(self, port: int) -> bool:
        """Check whether a port is free on the host, by trying to listen on it.

        Args:
            port: The port.

        Raises:
            TypeError, ValueError: If it is no port.
        """
        return bool(self._ask("ports", ports=[check_port(port)])["free"])

    def get_free_port(self, ports: list[int]) -> int:
        """Return the first of some ports that is free on the host.

        Args:
            ports: The ports.

        Raises:
            NoPortsLeftError: If none is free.
            TypeError, ValueError: If one is no port.
        """
        candidates = checked_ports(ports)
        free = self._ask("ports", ports=candidates, first=True)["free"] if candidates else []
        return pick_port(candidates, free, self.host)

    def expose_port_to_runtime(self, local_port: int, runtime_port: int | Iterable[int] | None = None) -> str:
        """Make a port of the manager reachable on the host, on its loopback.

        Args:
            local_port: The port on this machine.
            runtime_port: The port on the host, or several, of which the first free one is taken. By default
                ``local_port``.

        Returns:
            A key for :meth:`get_process` and :meth:`stop_process`.

        Raises:
            PortInUseError: If the port on the host is taken.
            NoPortsLeftError: If several were given and none is free.
            TunnelError: If the host does not allow it.
        """
        return self._add_exposure(self._wait(open_to_runtime(self._connection, local_port, runtime_port)))

    def expose_port_from_runtime(self, runtime_port: int, local_port: int | Iterable[int] | None = None) -> str:
        """Make a port of the host reachable on the manager, on its loopback.

        Args:
            runtime_port: The port on the host.
            local_port: The port on this machine, or several, of which the first free one is taken. By default
                ``runtime_port``.

        Returns:
            A key for :meth:`get_process` and :meth:`stop_process`.

        Raises:
            PortInUseError: If the port on this machine is taken.
            NoPortsLeftError: If several were given and none is free.
            TunnelError: If the host does not allow it.
        """
        return self._add_exposure(self._wait(open_from_runtime(self._connection, runtime_port, local_port)))

    def _add_exposure(self, tunnel: Tunnel) -> str:
        """Take over a tunnel that was opened for this runtime, and return its key."""
        return self._registry.add_exposure(tunnel)

    # --- directories -------------------------------------------------------------------------------
    def create_dir(self, path: str) -> None:
        """Make a directory on the host, and those above it; it may exist already.

        Args:
            path: Relative to the working directory; ``~`` and environment variables are understood.

        Raises:
            PathCreationError: If it cannot be made.
            ValueError: If the path is empty.
        """
        self._wait(directories.make(self._session, self._context(), path))

    def create_tempdir(self) -> str:
        """Make an empty directory on the host that is removed when the runtime is cleaned up.

        Returns:
            Its absolute path.

        Raises:
            PathCreationError: If it cannot be made.
        """
        return self._wait(directories.make_temporary(self._session))

    def delete_dir(self, path: str) -> bool:
        """Remove a directory on the host with all that it holds. Of a link, only the link itself is removed.

        What another file system is mounted on stays, with the directories that it is in.

        Args:
            path: See :meth:`create_dir`.

        Returns:
            True if it is removed, False if something in it cannot be; the log says what.

        Raises:
            ValueError: If the path is empty, a file, a mount point, a directory of the system, or, however it is
                written, the root, the home or working directory, or a directory that one of these is in.
        """
        return self._wait(directories.remove(self._session, self._context(), path))

    # --- end ---------------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """End all tasks and port exposures, remove temporary directories, and disconnect.

        Results of tasks stay readable. Doing it again does nothing. Errors that were not asked for are logged.
        """
        if self._session.is_ours:
            event_loop.run(self._cleanup_async())

    async def _cleanup_async(self) -> None:
        """Do what :meth:`cleanup` does."""
        self._session.state = "closed"
        try:
            await close_tunnels(exposure.tunnel for exposure in self._registry.exposures)
            ending = self._registry.end_tasks()
            if ending:
                ended = asyncio.gather(*(settled(future) for future in ending))
                await self._connection.wait_while_heard(ended, _END_LIMIT)
        finally:  # also if Ctrl-C puts an end to the waiting: with the connection, everything on the host ends
            await self._session.close()
        self._registry.report()

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

    def _view(self) -> View:
        shown = lasting(known_infos([self])[0])
        where = self.working_dir + (" (temporary)" if self.has_temporary_working_dir else "")
        facts: list[Fact] = [("account", account(self._connection)), ("working directory", where)]
        facts += [(name, shown[name]) for name in MACHINE if shown.get(name)]
        facts.append(("tasks", f"{self.alive_task_process_count} running, {len(self.tasks)} in all"))
        for key, process in self.get_processes(only_alive=True).items():
            if self.is_port_exposure_process(key):
                facts.append(("port", process.name))
        if self._connection.why:
            facts.append(("why", Cell(self._connection.why, "bad")))
        return View(f"{self.class_name} {self.host}", state_cell(self._connection), facts)

    def __repr__(self) -> str:
        return f"<{self.class_name} {self.host!r} {self._connection.state}>"
