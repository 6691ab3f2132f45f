"""`RuntimeGroup`: several runtimes, used together."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from lazycluster.core import event_loop, ipython
from lazycluster.environments.spec import ROOT
from lazycluster.exceptions import LazyclusterError
from lazycluster.output import progress as progress_display
from lazycluster.output.execution_log import show_logs
from lazycluster.output.view import Shown, View, show
from lazycluster.runtime.network import checked_ports, pick_port
from lazycluster.runtime.reachability import ReachabilityCache
from lazycluster.runtime.registry import join_all
from lazycluster.runtime.views import info_table
from lazycluster.runtimes import Runtime
from lazycluster.ssh.tunnels import Tunnel, check_port
from lazycluster.tasks.context import ExecutionOptions
from lazycluster.tasks.detached import DetachedTask, check_options
from lazycluster.tasks.execution import ProcessHandle
from lazycluster.tasks.task import RuntimeTask

from .broadcast import detach_on, detached_tasks_on, join_or_end, send_to_all, start_on_all
from .failover import start_on_one
from .members import Members, ask_all, checked_hosts, clean_up_all, connect, prepare_all, warn_of_aliases
from .ports import expose_from_one, expose_to_all, free_everywhere
from .settings import GroupSettings, PerHost, host_names, listed, read_settings
from .status import HostCallback, HostStatus, host_status, watch
from .views import group_view, hosts_view, info_or_error

if TYPE_CHECKING:
    from lazycluster.environments.cache import Host, HostCache, Removal
    from lazycluster.pool.executor import GroupExecutor

__all__ = ["RuntimeGroup"]

T = TypeVar("T")


class RuntimeGroup(Shown):
    """Several runtimes: most methods do on all of them, at once, what :class:`Runtime` does on one.

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
        startup_files: See :class:`Runtime`.
        settings: Settings of single hosts: a dictionary such as ``{"host-1": {"user": "me", "python": "auto"}}``,
            or the path of a TOML file with a table for each host. Keys are those of `connection_kwargs` and
            ``working_dir``, ``python``, ``setup``, ``env``, ``shell``, ``environment``, ``startup_files``, and
            ``address``, see :class:`Runtime`; a name may be a pattern such as ``"gpu-*"``. Without `hosts`, the hosts
            that it names are the group.
        on_unreachable: ``"raise"`` if all hosts must be usable, or ``"skip"`` to go on without the others, see
            :attr:`unreachable_hosts`.
        progress: Whether the progress of what takes more than two seconds is shown, on a terminal or in a notebook, in
            clusters on this group, too; by default as ``Environment.progress`` says.

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
        startup_files: str = "once",
        settings: PerHost | str | os.PathLike[str] | None = None,
        on_unreachable: str = "raise",
        progress: bool | None = None,
    ) -> None:
        if on_unreachable not in ("raise", "skip"):
            raise ValueError(f"on_unreachable must be 'raise' or 'skip', not {on_unreachable!r}")
        per_host = read_settings(settings)
        if hosts is None and runtimes is None and per_host:
            hosts = host_names(per_host)
        if (runtimes is None) == (hosts is None):
            raise ValueError("either runtimes or hosts must be given, and not both")
        self._settings = GroupSettings(
            working_dir, connection_kwargs, python, setup, env, shell, per_host,
            environment=environment, progress=progress, startup_files=startup_files,
        )  # fmt: skip
        self._lock = threading.RLock()
        self._tasks: list[RuntimeTask] = []
        self._unreachable: dict[str, str] = {}
        self._closed = False
        self._reachability = ReachabilityCache()
        self._executors: set[GroupExecutor] = set()  # those that were not shut down
        self._kept: tuple[tuple[list[Runtime], float | None, bool], GroupExecutor] | None = None
        if hosts is not None:
            runtimes, self._unreachable = connect(checked_hosts(hosts), self._settings, on_unreachable)
        assert runtimes is not None
        if not runtimes:
            raise ValueError("a group needs at least one runtime")
        self._members = Members(runtimes)
        ipython.register(self)
        warn_of_aliases(runtimes)

    # --- members -------------------------------------------------------------------------------
    @property
    def hosts(self) -> list[str]:
        """The hosts."""
        return self._members.hosts

    @property
    def runtimes(self) -> list[Runtime]:
        """The runtimes, in the order in which they were added."""
        return self._members.all

    @property
    def runtime_count(self) -> int:
        """Number of runtimes."""
        return len(self._members.all)

    @property
    def unreachable_hosts(self) -> dict[str, str]:
        """The hosts that were skipped, each with the reason."""
        return dict(self._unreachable)

    @property
    def progress(self) -> bool | None:
        """True if the progress of what takes long is shown; None: as ``Environment.progress`` says."""
        return self._settings.progress

    @property
    def status(self) -> list[HostStatus]:
        """State of each host: of its connection, and how many tasks run there."""
        return [host_status(runtime) for runtime in self.runtimes]

    def on_state(self, callback: HostCallback) -> Callable[[], None]:
        """Have a function called whenever the state of a present host changes.

        It is called on the thread that serves all connections: it must not wait, nor use the group itself.

        Args:
            callback: The function; it gets a `HostStatus`.

        Returns:
            A function that ends it.

        Examples:
            >>> group.on_state(print)                                            # doctest: +SKIP
        """
        return watch(self.runtimes, callback)

    def contains_runtime(self, host: str) -> bool:
        """Check whether a host is in the group.

        Args:
            host: The host.
        """
        return host in self._members

    def get_runtime(self, host: str | None = None) -> Runtime:
        """Return a runtime.

        Args:
            host: Its host; by default the one that executes the fewest tasks is returned.

        Raises:
            ValueError: If the host is not in the group.
        """
        return self._members.least_busy() if host is None else self._members.get(host)

    def get_runtimes(
        self, include_hosts: str | list[str] | None = None, exclude_hosts: str | list[str] | None = None
    ) -> dict[str, Runtime]:
        """Return some of the runtimes by host.

        Args:
            include_hosts: Only these; by default all.
            exclude_hosts: All but these.

        Raises:
            ValueError: If both are given, or a host is not in the group.
        """
        return self._members.some(include_hosts, exclude_hosts)

    def _check_open(self) -> None:
        if self._closed:
            raise LazyclusterError("the group was closed (cleanup() was called); make a new one")

    def add_runtime(self, host: str | None = None, runtime: Runtime | None = None) -> None:
        """Add a runtime.

        Args:
            host: A host that is connected now, with what was said when the group was made.
            runtime: Or a runtime that exists already.

        Raises:
            ValueError: If not exactly one of them is given, or the host is in the group already.
            InvalidRuntimeError: If the host cannot be used.
            LazyclusterError: If the group has been cleaned up.
        """
        self._check_open()
        if (host is None) == (runtime is None):
            raise ValueError("either host or runtime must be given, and not both")
        if host is not None:
            self._members.refuse_duplicate(host)
            runtime = connect([host], self._settings, "raise")[0][0]
        assert runtime is not None
        with self._lock:
            self._members.add(runtime)
        warn_of_aliases(self.runtimes)

    def remove_runtime(self, host: str) -> Runtime:
        """Remove a runtime from the group. It is not cleaned up: that is up to the caller now.

        Args:
            host: Its host.

        Returns:
            The runtime.

        Raises:
            ValueError: If it is not in the group.
            LazyclusterError: If it executes tasks.
        """
        with self._lock:
            busy = self._members.get(host).alive_task_process_count
            if busy:
                raise LazyclusterError(
                    f"{host} executes {busy} tasks and cannot be removed: wait for them with join(), or cancel them"
                )
            return self._members.remove(host)

    # --- the Python environment ----------------------------------------------------------------
    def prepare(self, refresh: bool = False) -> None:
        """Make the Python environment on all hosts at once, see :meth:`Runtime.prepare`.

        Args:
            refresh: Take the newest versions that are allowed, whatever was found before.

        Raises:
            EnvironmentBuildError: If it cannot be made on a host; if there are several, it holds all of their errors.
        """
        self._check_open()
        with progress_display.shown(self.progress):
            event_loop.run(prepare_all(self.runtimes, refresh))

    def list_environments(self, cache_dir: str = ROOT) -> dict[str, HostCache]:
        """Return the Python environments that the hosts keep, with sizes, age and last use, by host.

        Hosts that cannot be asked are left out, with a warning in the log; so they are below.

        Args:
            cache_dir: Where they are kept, see :class:`~lazycluster.EnvironmentSpec`.

        Raises:
            LazyclusterError: If no host can be asked.
        """
        from lazycluster.environments.cache import list_on

        return self._on_stores(lambda host: list_on(host, cache_dir), "its environments are not listed")

    def remove_environments(self, ids: str | Iterable[str], cache_dir: str = ROOT) -> dict[str, Removal]:
        """Remove Python environments from the hosts; those in use stay.

        Args:
            ids: Their names, which are the same on all hosts.
            cache_dir: See :meth:`list_environments`.
        """
        from lazycluster.environments.cache import remove_on

        names = listed(ids)
        return self._on_stores(lambda host: remove_on(host, names, cache_dir), "its environments are not removed")

    def prune_environments(
        self, size_limit: int | None = None, unused_for: float | None = None, cache_dir: str = ROOT
    ) -> dict[str, Removal]:
        """Remove what was used longest ago, and what broken builds left; never an environment in use.

        Args:
            size_limit: Until environments and packages together take no more bytes than this on a host.
            unused_for: All that was not used for so many seconds.
            cache_dir: See :meth:`list_environments`.
        """
        from lazycluster.environments.cache import prune_on

        return self._on_stores(
            lambda host: prune_on(host, size_limit, unused_for, cache_dir), "its environments are not pruned"
        )

    def _on_stores(self, work: Callable[[Host], Awaitable[T]], problem: str) -> dict[str, T]:
        self._check_open()
        return event_loop.run(ask_all(self.runtimes, lambda runtime: work(runtime._connection), problem))

    # --- environment variables -----------------------------------------------------------------
    def set_env_variables(self, env_variables: Mapping[str, Any]) -> None:
        """Set the environment variables of tasks, instead of the present ones.

        Args:
            env_variables: Names and values.
        """
        for runtime in self.runtimes:
            runtime.env_variables = env_variables

    def add_env_variables(self, env_variables: Mapping[str, Any]) -> None:
        """Add environment variables, or give new values to those that exist.

        Args:
            env_variables: Names and values.
        """
        for runtime in self.runtimes:
            runtime.add_env_variables(env_variables)

    # --- tasks -----------------------------------------------------------------------------------
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
        detach: bool = False,
    ) -> Any:
        """Execute a task on one host or on all.

        Args:
            task: The task.
            host: Where; by default on the host that executes the fewest tasks at the moment.
            broadcast: On all hosts. Copies of the task are made, since each holds what came out of it; the task itself
                shows what becomes of all. What a step fetches goes to ``<directory>/<host>/<name>``, so that no host
                overwrites what another gave.
            execute_async: Return at once; else wait for the end.
            debug: Print what the steps print to standard output as it comes, each line with its host. Else it is
                logged with level debug after each step.
            retries: How often the task is begun again when its host is lost: on another host; or, with `host` or
                `broadcast`, on the same one when that is back.
            retry_on: ``"host"``, or ``"any"`` to try again whatever has failed.
            detach: Let it go on when this process ends, see :meth:`Runtime.execute_task`; it is not waited for then.
                :meth:`detached_tasks` finds it again.

        Returns:
            The task that holds the execution, see :class:`RuntimeTask`; with `detach` the :class:`DetachedTask`. With
            `broadcast` a list of them, one per host.

        Raises:
            ValueError: If the host is not in the group, or given together with `broadcast`, or retries make no sense,
                or other options are given with `detach` that do not apply to it.
            TaskExecutionError: If it is waited for and fails.
            GroupTaskError: If it is waited for and fails on several hosts; holds all of their errors.
            LazyclusterError: If it cannot be detached; then it runs on no host.
        """
        if not isinstance(task, RuntimeTask):
            raise TypeError(f"a task must be a RuntimeTask, not {type(task).__name__}")
        options = ExecutionOptions(debug, retries=retries, retry_on=retry_on)
        if broadcast and host is not None:
            raise ValueError("either host or broadcast can be given, not both")
        with progress_display.shown(self.progress):
            if detach:
                check_options(task, options, wait=not execute_async)
                found = detach_on(self.runtimes if broadcast else [self.get_runtime(host)], task)
                return found if broadcast else found[0]
            if not broadcast:
                with self._lock:  # so that two threads do not both see the same host as the least busy one
                    started = start_on_one(self._members, task, host, options)
                    self._tasks.append(started)
                if not execute_async:
                    join_or_end([started])
                return started
            tasks = start_on_all(self.runtimes, task, options)
            task._was_broadcast(tasks)
            with self._lock:
                self._tasks += tasks
            if not execute_async:
                join_or_end(tasks)
            return tasks

    def detached_tasks(self) -> list[DetachedTask]:
        """Return the tasks that were started on these hosts with ``detach=True``, by any process of yours.

        Hosts that cannot be asked are left out, with a warning in the log.

        Returns:
            The tasks, the oldest first; their ``host`` says where they are.

        Raises:
            LazyclusterError: If no host can be asked.
        """
        return detached_tasks_on(self.runtimes)

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
        tasks = start_on_all(self.runtimes, RuntimeTask(name).call(function, *args, **kwargs), ExecutionOptions())
        join_or_end(tasks)
        return {str(task.host): task.result() for task in tasks}

    def send_file(
        self,
        local_path: str | os.PathLike[str],
        remote_path: str | None = None,
        execute_async: bool | None = True,
        *,
        network: str = "tunnel",
    ) -> list[RuntimeTask]:
        """Copy a file or directory from the manager to all hosts, see :meth:`RuntimeTask.send_file`.

        Args:
            local_path: On this machine.
            remote_path: On the hosts, by default under the same name in the working directories.
            execute_async: Return at once; else wait for the end.
            network: ``"tunnel"``: it goes from the manager to each host, over ssh. ``"auto"``: a file of at least 8 MiB
                leaves the manager once, and each host passes it on to the next one, over TLS, as far as they reach each
                other on a port from 25100 to 25199; smaller files, directories, and what a host gets from no other come
                from the manager. ``"direct"``: the same, but hosts that do not reach each other are an error, and so is
                a directory.

        Returns:
            The tasks that were made for it, one per host.

        Raises:
            ValueError: If a path is empty, or the network is unknown.
            TaskExecutionError: If it is waited for and fails.
        """
        with progress_display.shown(self.progress):
            tasks = send_to_all(self.runtimes, local_path, remote_path, network, self._reachability)
            with self._lock:
                self._tasks += tasks
            if not execute_async:
                join_or_end(tasks)
            return tasks

    @property
    def function_returns(self) -> Generator[Any, None, None]:
        """Return values of the functions of the tasks that were started through the group, in the order of their start.

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
        """Print the output of each step of the tasks that were started through the group, as a table."""
        show_logs([log for task in list(self._tasks) for log in task._logs()])

    def clear_tasks(self) -> None:
        """Forget all tasks that have ended, here and in the runtimes."""
        with self._lock:
            self._tasks = [task for task in self._tasks if not task.future.done()]
        for runtime in self.runtimes:
            runtime.clear_tasks()

    # --- calls spread over the hosts -------------------------------------------------------------
    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
        gpus_per_call: float | None = None,
        idle_gpus: bool = False,
    ) -> Iterator[T]:
        """Call a function with each item, spread over all cores of all hosts.

        The worker processes stay for the next `map`. Each host takes as many calls as it can do; what was on a host
        that is lost runs elsewhere. What is bound into the function (``functools.partial(f, data)``) goes to each host
        once.

        Args:
            fn: The function, see :meth:`RuntimeTask.run_function`.
            *iterables: Their items are the arguments, as with :func:`map`. They may be endless.
            timeout: Seconds from now within which each result must come.
            chunksize: Calls that go to a worker together: many for calls that take less than a millisecond.
            buffersize: Items that are taken beyond the results that were handed on, at most; by default as many as
                keep the hosts busy.
            ordered: Whether results come in the order of the items, or as they are there.
            gpus_per_call: How many GPUs each call has for itself, see :meth:`executor`.
            idle_gpus: Whether GPUs are left alone that others use, as nvidia-smi says.

        Returns:
            An iterator over the results. Closing it ends what still runs.

        Raises:
            TypeError: If the function cannot be sent; when iterating, what an argument or result cannot be.
            TimeoutError: When iterating, if a result does not come in time.
            WorkerLostError: When iterating, if workers or hosts have died under a call each time that it was tried.
            Exception: When iterating, what the function has raised.

        Examples:
            >>> list(group.map(pow, range(4), range(4)))        # doctest: +SKIP
            [1, 1, 4, 27]
        """
        return self._kept_executor(gpus_per_call, idle_gpus).map(
            fn, *iterables, timeout=timeout, chunksize=chunksize, buffersize=buffersize, ordered=ordered
        )

    def executor(
        self,
        max_workers: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        workers_per_host: int | Mapping[str, int] | None = None,
        gpus_per_call: float | None = None,
        idle_gpus: bool = False,
        debug: bool = False,
    ) -> GroupExecutor:
        """Return the group as a :class:`concurrent.futures.Executor` with worker processes of its own on all hosts.

        Args:
            max_workers: Workers in all; by default as many on each host as it has cores.
            initializer: Is called in each worker before anything else.
            initargs: Its arguments.
            workers_per_host: See :class:`GroupExecutor`, as for the next ones.
            gpus_per_call: See :class:`GroupExecutor`.
            idle_gpus: See :class:`GroupExecutor`.
            debug: See :class:`GroupExecutor`.

        Returns:
            The executor. At the end of a ``with`` block it waits for its calls; after an error it ends them.

        Raises:
            TypeError, ValueError: If an argument makes no sense.

        Examples:
            >>> with group.executor() as executor:              # doctest: +SKIP
            ...     future = executor.submit(pow, 2, 10)
            ...     print(future.result())
            1024
        """
        self._check_open()
        from lazycluster.pool.executor import GroupExecutor

        executor = GroupExecutor(
            self.runtimes, max_workers, initializer, initargs,
            workers_per_host=workers_per_host, gpus_per_call=gpus_per_call, idle_gpus=idle_gpus, debug=debug,
        )  # fmt: skip
        self._executors.add(executor)
        executor._at_end.append(self._executors.discard)
        return executor

    def _kept_executor(self, gpus_per_call: float | None = None, idle_gpus: bool = False) -> GroupExecutor:
        """Return the executor of `map`: a new one if the group has changed, or the last one cannot be used any more."""
        self._check_open()
        with self._lock:
            wanted = (self.runtimes, gpus_per_call, idle_gpus)
            if self._kept is None or self._kept[0] != wanted or not self._kept[1].usable:
                if self._kept is not None:
                    self._kept[1]._retire()
                self._kept = wanted, self.executor(gpus_per_call=gpus_per_call, idle_gpus=idle_gpus)
            return self._kept[1]

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
        return bool(event_loop.run(free_everywhere(runtimes, [check_port(port)], False)))

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
        free = event_loop.run(free_everywhere(self.runtimes, candidates, enforce_check_on_localhost))
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
        exposed = event_loop.run(expose_to_all(runtimes, local_port, runtime_port))
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
        if not isinstance(host, str):
            raise TypeError(f"a host must be a string, not {type(host).__name__}")
        source = self.get_runtime(host)
        others = [runtime for runtime in self.runtimes if runtime is not source]
        port, exposed = event_loop.run(expose_from_one(source, others, runtime_port, group_port))
        self._note(exposed)
        return port

    def _note(self, exposed: Iterable[tuple[Runtime, Tunnel]]) -> None:
        for runtime, tunnel in exposed:
            runtime._add_exposure(tunnel)

    # --- information ---------------------------------------------------------------------------
    def fill_runtime_info_buffers_async(self) -> None:
        """Have all runtimes ask their hosts for their :attr:`Runtime.info`, without waiting for the answers.

        If a host cannot be asked, reading its information raises the error.
        """
        for runtime in self.runtimes:
            with contextlib.suppress(LazyclusterError):
                runtime.fill_info_buffer()

    def print_hosts(self) -> None:
        """Print the hosts."""
        show(hosts_view("Hosts of the group", self.hosts, "Skipped hosts", self._unreachable))

    def print_runtime_info(self) -> None:
        """Print the machines of the hosts as a table; if a host cannot be asked, its row has the reason."""
        self.fill_runtime_info_buffers_async()
        show(View(tables=(info_table(self.hosts, [info_or_error(runtime) for runtime in self.runtimes]),)))

    # --- end -----------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """Clean up all runtimes, at once, see :meth:`Runtime.cleanup`. Doing it again does nothing."""
        self._closed = True
        ours = [runtime for runtime in self.runtimes if runtime._session.is_ours]
        if ours:
            self._kept = None
            for executor in list(self._executors):
                executor.cleanup()
            event_loop.run(clean_up_all(ours))

    def __enter__(self) -> RuntimeGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()

    def _view(self) -> View:
        return group_view(self.runtimes, self.unreachable_hosts)

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return f"<RuntimeGroup of {self.runtime_count}: {', '.join(self.hosts)}{closed}>"
