"""`RuntimeGroup`: runtimes that belong together."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from types import TracebackType
from typing import Any

from lazycluster import _ipython, _loop, _progress
from lazycluster._runtime.ledger import join_all
from lazycluster._runtime.questions import checked_ports, pick_port
from lazycluster._views.view import Shown, View
from lazycluster.runtimes import Runtime
from lazycluster.ssh.tunnels import Tunnel, check_port
from lazycluster.tasks.handles import ProcessHandle
from lazycluster.tasks.retrying import checked_retries
from lazycluster.tasks.task import RuntimeTask

from .broadcast import start_on_all
from .members import Members, connect, distinct, warn_of_aliases
from .membership import Membership
from .ports import expose_from_one, expose_to_all, free_everywhere
from .settings import Common, PerHost, host_names, read_settings
from .spreading import Spreading
from .trying import Trying
from .views import group_view

__all__ = ["RuntimeGroup"]


class RuntimeGroup(Membership, Spreading, Shown):
    """Runtimes that belong together: most methods do on all of them, at once, what :class:`Runtime` does on one.

    Two names of one account on one machine may both be members; a warning is logged, ports are exposed there once, and
    where members share a file system, a file that is sent to all of them is written once.

    Args:
        runtimes: Runtimes that exist already. They belong to the group from now on: its clean-up is theirs.
        hosts: Hosts that are connected now, all at once, with what the following arguments say.
        working_dir: See :class:`Runtime`, as for the next ones.
        connection_kwargs: See :class:`Runtime`.
        python: See :class:`Runtime`.
        setup: See :class:`Runtime`.
        env: See :class:`Runtime`.
        shell: See :class:`Runtime`.
        environment: See :class:`Runtime`; made on all hosts at once.
        settings: What holds for single hosts: a dictionary such as ``{"host-1": {"user": "me", "python": "auto"}}``,
            or the path of a TOML file with a table for each host. Keys are those of `connection_kwargs` and
            ``working_dir``, ``python``, ``setup``, ``env``, ``shell``, ``environment``; a name may be a pattern such as
            ``"gpu-*"``. Without `hosts`, the hosts that it names are the group.
        on_unreachable: ``"raise"`` if all hosts must be usable, or ``"skip"`` to go on without the others, see
            :attr:`unreachable_hosts`.
        progress: Whether it is shown, on a terminal or in a notebook, how far things are that take more than two
            seconds, in clusters on this group, too; by default as ``Environment.progress`` says.

    Raises:
        ValueError: If not exactly one of `runtimes` and `hosts` is given, a host is given twice, or there is none.
        InvalidRuntimeError: If a host cannot be used; if there are several, it holds all of their errors.
        NoRuntimesError: If unusable hosts are skipped, and none is left.

    Examples:
        Execute a task on one host, and on all:

        >>> group = RuntimeGroup(hosts=["host-1", "host-2"])                             # doctest: +SKIP
        >>> task = RuntimeTask("group-demo").run_command("echo Hello Group!")
        >>> print(group.execute_task(task).execution_log[0])                             # doctest: +SKIP
        Hello Group!
        >>> tasks = group.execute_task(task, broadcast=True)                             # doctest: +SKIP
        >>> group.join()                                                                 # doctest: +SKIP

        Make a database on this machine reachable on all hosts:

        >>> port = group.expose_port_to_runtimes(27017, list(range(60000, 60010)))       # doctest: +SKIP
    """

    def __init__(
        self,
        runtimes: list[Runtime] | None = None,
        hosts: list[str] | None = None,
        working_dir: str | None = None,
        *,
        connection_kwargs: Mapping[str, Any] | None = None,
        python: str | None = None,
        setup: str | None = None,
        env: Mapping[str, Any] | None = None,
        shell: str | None = None,
        environment: Any = None,
        settings: PerHost | str | os.PathLike[str] | None = None,
        on_unreachable: str = "raise",
        progress: bool | None = None,
    ) -> None:
        if on_unreachable not in ("raise", "skip"):
            raise ValueError(f"on_unreachable must be 'raise' or 'skip', not {on_unreachable!r}")
        per_host = read_settings(settings)
        if hosts is None and runtimes is None and per_host:
            hosts = host_names(per_host)
            if not hosts:
                raise ValueError(f"the settings name no host, only patterns ({', '.join(per_host)}): give hosts, too")
        if (runtimes is None) == (hosts is None):
            raise ValueError("either runtimes or hosts must be given, and not both")
        self._common = Common(
            working_dir,
            connection_kwargs,
            python,
            setup,
            env,
            shell,
            per_host,
            environment=environment,
            progress=progress,
        )
        self._lock = threading.RLock()
        self._tasks: list[RuntimeTask] = []
        self._unreachable: dict[str, str] = {}
        self._closed = False
        self._executors = set()
        self._kept = None
        if hosts is not None:
            runtimes, self._unreachable = connect(distinct(hosts), self._common, on_unreachable)
        assert runtimes is not None
        if not runtimes:
            raise ValueError("a group needs at least one runtime")
        self._members = Members(runtimes)
        _ipython.register(self)
        warn_of_aliases(runtimes)

    # --- tasks ---------------------------------------------------------------------------------
    def execute_task(
        self,
        task: RuntimeTask,
        host: str | None = None,
        broadcast: bool = False,
        execute_async: bool = True,
        debug: bool = False,
        *,
        retries: int = 0,
        retry_on: str = "host",
    ) -> Any:
        """Execute a task on one host or on all.

        Args:
            task: The task.
            host: Where; by default on the host that executes the fewest tasks at the moment.
            broadcast: On all hosts. Copies of the task are made, since each holds what came out of it. What a step
                fetches goes to ``<directory>/<host>/<name>``, so that no host overwrites what another gave.
            execute_async: Return at once; else wait for the end.
            debug: Print what the steps print to standard output as it comes, each line with its host. Else it is
                logged with level debug after each step.
            retries: How often the task is begun again when its host is lost: on another host, unless `host` is given.
            retry_on: ``"host"``, or ``"any"`` to try again whatever has failed.

        Returns:
            The task that holds the execution, see :class:`RuntimeTask`; with `broadcast` a list of them, one per host.

        Raises:
            ValueError: If the host is not in the group, or given together with `broadcast`, or retries make no sense.
            TaskExecutionError: If it is waited for and fails.
            GroupTaskError: If it is waited for and fails on several hosts; holds all of their errors.
        """
        if not isinstance(task, RuntimeTask):
            raise TypeError(f"a task must be a RuntimeTask, not {type(task).__name__}")
        checked_retries(retries, retry_on)
        if broadcast and host is not None:
            raise ValueError("either host or broadcast can be given, not both")
        if broadcast and retries:
            raise ValueError("a task for all hosts cannot be tried elsewhere: leave out retries, or broadcast")
        with _progress.shown(self.progress):
            if not broadcast:
                trying = Trying(self._members, retries, retry_on, pinned=host is not None) if retries else None
                return self._execute_on_one(task, host, execute_async, debug, trying)
            tasks = start_on_all(self.runtimes, task, debug)
            with self._lock:
                self._tasks += tasks
            if not execute_async:
                self._finish(tasks)
            return tasks

    def _execute_on_one(
        self, task: RuntimeTask, host: str | None, execute_async: bool, debug: bool, trying: Trying | None
    ) -> RuntimeTask:
        with self._lock:  # so that two threads do not both see the same host as the least busy one
            runtime = self.get_runtime(host)
            started = runtime.start_task(task, debug=debug, retries=trying.retries if trying else None)
            self._tasks.append(started)
        if trying is not None:
            trying.begun(started, runtime)
        if not execute_async:
            self._finish([started])
        return started

    def _finish(self, tasks: list[RuntimeTask]) -> None:
        try:
            join_all(tasks)
        except (KeyboardInterrupt, SystemExit):
            for task in tasks:
                task.cancel()
            for task in tasks:
                task.cleanup()
            raise

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call a Python function on all hosts at once and return what it returned on each.

        Args:
            function: The function, see :meth:`RuntimeTask.run_function`.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The results by host.

        Raises:
            TaskExecutionError: If it fails on one host.
            GroupTaskError: If it fails on several.

        Examples:
            >>> group.call(os.cpu_count)        # doctest: +SKIP
            {'host-1': 8, 'host-2': 16}
        """
        name = getattr(function, "__name__", None) or "function"
        tasks = start_on_all(self.runtimes, RuntimeTask(name).call(function, *args, **kwargs), False)
        self._finish(tasks)
        return {str(task.host): task.result() for task in tasks}

    def send_file(
        self,
        local_path: str | os.PathLike[str],
        remote_path: str | None = None,
        execute_async: bool | None = True,
    ) -> list[RuntimeTask]:
        """Copy a file or folder from the manager to all hosts, see :meth:`RuntimeTask.send_file`.

        Args:
            local_path: On this machine.
            remote_path: On the hosts, by default under the same name in the working directories.
            execute_async: Return at once; else wait for the end.

        Returns:
            The tasks that were made for it, one per host.

        Raises:
            ValueError: If a path is empty.
            TaskExecutionError: If it is waited for and fails.
        """
        task = RuntimeTask("send-file").send_file(local_path, remote_path)
        tasks: list[RuntimeTask] = self.execute_task(task, broadcast=True, execute_async=bool(execute_async))
        return tasks

    @property
    def function_returns(self) -> Generator[Any, None, None]:
        """What the functions of the tasks that were started through the group returned, in the order of their start.

        Waits for each task when the generator comes to it.

        Raises:
            TaskExecutionError: If a task failed, when the generator comes to it and no join has raised it before.
        """
        return (value for task in list(self._tasks) for value in task.function_returns)

    @property
    def task_processes(self) -> list[ProcessHandle]:
        """Handles of all tasks of all runtimes, which behave like :class:`multiprocessing.Process`."""
        return [process for runtime in self.runtimes for process in runtime.task_processes]

    def join(self) -> None:
        """Wait for the end of all tasks that were started through the group.

        Raises:
            TaskExecutionError: If one failed, and no join has raised it before.
            GroupTaskError: If several failed; holds all of their errors.
        """
        join_all(list(self._tasks))

    def print_log(self) -> None:
        """Print what each step of each task printed that was started through the group."""
        for task in list(self._tasks):
            task.print_log()

    def clear_tasks(self) -> None:
        """Forget all tasks that have ended, here and in the runtimes."""
        with self._lock:
            self._tasks = [task for task in self._tasks if not task.future.done()]
        for runtime in self.runtimes:
            runtime.clear_tasks()

    # --- ports ---------------------------------------------------------------------------------
    def has_free_port(self, port: int, exclude_hosts: str | list[str] | None = None) -> bool:
        """Check whether a port is free on all hosts, by trying to listen on it.

        Args:
            port: The port.
            exclude_hosts: Hosts that are not asked.

        Raises:
            ValueError: If it is no port, or a host is not in the group.
        """
        runtimes = list(self.get_runtimes(exclude_hosts=exclude_hosts).values())
        return bool(_loop.run(free_everywhere(runtimes, [check_port(port)], False)))

    def get_free_port(self, ports: list[int], enforce_check_on_localhost: bool = False) -> int:
        """Return the first of some ports that is free on all hosts.

        Args:
            ports: The ports.
            enforce_check_on_localhost: It must be free on the manager, too.

        Raises:
            NoPortsLeftError: If none is.
            ValueError: If one is no port.
        """
        candidates = checked_ports(ports)
        free = _loop.run(free_everywhere(self.runtimes, candidates, enforce_check_on_localhost))
        return pick_port(candidates, free, "the group")

    def expose_port_to_runtimes(
        self,
        local_port: int,
        runtime_port: int | list[int] | None = None,
        exclude_hosts: str | list[str] | None = None,
    ) -> int:
        """Make a port of the manager reachable on all hosts, under the same port; if one fails, on none.

        Args:
            local_port: The port on this machine.
            runtime_port: The port on the hosts, or several, of which the first that is free everywhere is taken. By
                default `local_port`.
            exclude_hosts: Hosts that are left out.

        Returns:
            The port on the hosts.

        Raises:
            PortInUseError: If the port is taken on a host.
            NoPortsLeftError: If several were given, and none is free everywhere.
            ValueError: If a host is not in the group, or none is left.
            TunnelError: If a host does not allow it.
        """
        runtimes = list(self.get_runtimes(exclude_hosts=exclude_hosts).values())
        if not runtimes:
            raise ValueError("exclude_hosts leaves no host")
        exposed = _loop.run(expose_to_all(runtimes, local_port, runtime_port))
        self._note(exposed)
        return exposed[0][1].remote_port

    def expose_port_from_runtime_to_group(
        self, host: str, runtime_port: int, group_port: int | list[int] | None = None
    ) -> int:
        """Make a port of one host reachable on the manager and on all other hosts, under the same port.

        Args:
            host: The host.
            runtime_port: The port on it.
            group_port: The port everywhere else, or several, of which the first that is free everywhere is taken. By
                default `runtime_port`.

        Returns:
            The port everywhere else.

        Raises:
            ValueError: If the host is not in the group.
            PortInUseError: If the port is taken on the manager or a host.
            NoPortsLeftError: If several were given, and none is free everywhere.
            TunnelError: If a host does not allow it.
        """
        source = self.get_runtime(_named(host))
        others = [runtime for runtime in self.runtimes if runtime is not source]
        port, exposed = _loop.run(expose_from_one(source, others, runtime_port, group_port))
        self._note(exposed)
        return port

    def _note(self, exposed: Iterable[tuple[Runtime, Tunnel]]) -> None:
        for runtime, tunnel in exposed:
            runtime.note_exposure(tunnel)

    # --- end -----------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """Clean up all runtimes, at once, see :meth:`Runtime.cleanup`. Doing it again does nothing."""
        if not self._closed:
            self._closed = True
            ours = [runtime for runtime in self.runtimes if runtime.is_ours]
            if ours:
                self._end_executors()
                _loop.run(_clean_up(ours))

    def __enter__(self) -> RuntimeGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()

    def _view(self) -> View:
        return group_view(self.runtimes, self.unreachable_hosts)

    def __repr__(self) -> str:
        return f"<RuntimeGroup of {self.runtime_count}: {', '.join(self.hosts)}>"


async def _clean_up(runtimes: list[Runtime]) -> None:
    results = await asyncio.gather(*(runtime.cleanup_soon() for runtime in runtimes), return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise errors[0]


def _named(host: str) -> str:
    if not isinstance(host, str):
        raise TypeError(f"a host must be a string, not {type(host).__name__}")
    return host
