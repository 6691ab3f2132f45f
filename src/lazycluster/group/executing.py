"""The tasks of a group: on one of its hosts, or on all."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from lazycluster.output import progress
from lazycluster.output.execution_log import show_logs
from lazycluster.runtime.registry import join_all
from lazycluster.tasks.context import ExecutionOptions
from lazycluster.tasks.detached import DetachedTask, check_options
from lazycluster.tasks.execution import ProcessHandle
from lazycluster.tasks.task import RuntimeTask

from .broadcast import start_on_all
from .detached import detach_on, detached_on
from .failover import Failover
from .membership import Membership

__all__ = ["Executing"]


class Executing(Membership):
    """The part of a group that executes tasks."""

    _tasks: list[RuntimeTask]

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
        with progress.shown(self.progress):
            if detach:
                check_options(task, options, wait=not execute_async)
                found = detach_on(self.runtimes if broadcast else [self.get_runtime(host)], task)
                return found if broadcast else found[0]
            if not broadcast:
                return self._execute_on_one(task, host, execute_async, options)
            tasks = start_on_all(self.runtimes, task, options)
            task._was_broadcast(tasks)
            with self._lock:
                self._tasks += tasks
            if not execute_async:
                self._finish(tasks)
            return tasks

    def _execute_on_one(
        self, task: RuntimeTask, host: str | None, execute_async: bool, options: ExecutionOptions
    ) -> RuntimeTask:
        failover = Failover(self._members) if options.retries and host is None else None
        if failover is not None:
            options = replace(options, next_context=failover.next_context)
        with self._lock:  # so that two threads do not both see the same host as the least busy one
            runtime = self.get_runtime(host)
            started = runtime.start_task(task, options)
            self._tasks.append(started)
        if failover is not None:
            failover.begun(started, runtime)
        if not execute_async:
            self._finish([started])
        return started

    def detached_tasks(self) -> list[DetachedTask]:
        """Return the tasks that were started on these hosts with ``detach=True``, by any process of yours.

        Hosts that cannot be asked are left out, with a warning in the log.

        Returns:
            The tasks, the oldest first; their ``host`` says where they are.

        Raises:
            LazyclusterError: If no host can be asked.
        """
        return detached_on(self.runtimes)

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
        tasks = start_on_all(self.runtimes, RuntimeTask(name).call(function, *args, **kwargs), ExecutionOptions())
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
        """Print what each step of each task printed that was started through the group, as a table."""
        show_logs([log for task in list(self._tasks) for log in task._logs()])

    def clear_tasks(self) -> None:
        """Forget all tasks that have ended, here and in the runtimes."""
        with self._lock:
            self._tasks = [task for task in self._tasks if not task.future.done()]
        for runtime in self.runtimes:
            runtime.clear_tasks()
