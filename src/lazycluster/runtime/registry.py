"""The tasks and port exposures that a runtime has started, each under a key."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Sequence

from lazycluster.ssh.tunnels import Tunnel
from lazycluster.tasks.execution import ProcessHandle, TaskProcess, raise_failures, wait_for
from lazycluster.tasks.task import RuntimeTask

__all__ = ["PortExposure", "Registry", "join_all"]


class PortExposure(ProcessHandle):
    """A port that is exposed, with the interface of a process.

    Attributes:
        tunnel: The tunnel.
    """

    def __init__(self, tunnel: Tunnel) -> None:
        self.tunnel = tunnel
        arrow = "to" if tunnel.direction == "to_runtime" else "from"
        self.name = f"port-{arrow}-runtime {tunnel.host} local:{tunnel.local_port} runtime:{tunnel.remote_port}"

    @property
    def pid(self) -> int | None:
        """None: the bytes are moved by the host's one ssh process."""
        return None

    @property
    def exitcode(self) -> int | None:
        """None while the port is exposed, then 0."""
        return None if self.is_alive() else 0

    def is_alive(self) -> bool:
        """Return True while the port is exposed."""
        return self.tunnel.is_open

    def join(self, timeout: float | None = None) -> None:
        """Wait until somebody ends the exposure, or the connection ends."""
        self.tunnel.wait(timeout)

    def terminate(self) -> None:
        """End the exposure."""
        self.tunnel.close()


class Registry:
    """Tasks and exposures in the order in which they were started. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._tasks: dict[str, RuntimeTask] = {}
        self._exposures: dict[str, PortExposure] = {}
        self.started = 0

    def add_task(self, task: RuntimeTask) -> str:
        """Note a task that was started; returns its key."""
        with self._lock:
            self.started += 1
            key = f"task-{next(self._numbers)}:{task.name}"
            self._tasks[key] = task
            return key

    def forget(self, key: str) -> None:
        """Forget a task."""
        with self._lock:
            self._tasks.pop(key, None)

    def drop(self, task: RuntimeTask) -> None:
        """Forget a task that goes on elsewhere."""
        with self._lock:
            for key in [key for key, known in self._tasks.items() if known is task]:
                del self._tasks[key]

    def add_exposure(self, tunnel: Tunnel) -> str:
        """Note a tunnel that was opened; returns its key."""
        exposure = PortExposure(tunnel)
        with self._lock:
            key = f"port-{next(self._numbers)}:{exposure.name}"
            self._exposures[key] = exposure
            return key

    @property
    def tasks(self) -> list[RuntimeTask]:
        """The tasks, in the order in which they were started."""
        with self._lock:
            return list(self._tasks.values())

    @property
    def exposures(self) -> list[PortExposure]:
        """The exposures."""
        with self._lock:
            return list(self._exposures.values())

    @property
    def running(self) -> int:
        """The number of tasks that have not ended."""
        return sum(not task._started().is_over for task in self.tasks)

    def processes(self) -> dict[str, ProcessHandle]:
        """Return handles of all tasks and exposures by their keys."""
        with self._lock:
            handles: dict[str, ProcessHandle] = {k: TaskProcess(t._started()) for k, t in self._tasks.items()}
            handles.update(self._exposures)
            return handles

    def is_task(self, key: str) -> bool:
        """Return True if the key is that of a task."""
        return key in self._tasks

    def is_exposure(self, key: str) -> bool:
        """Return True if the key is that of an exposure."""
        return key in self._exposures

    def clear_tasks(self) -> None:
        """Forget the tasks that have ended."""
        with self._lock:
            ended = {key: task for key, task in self._tasks.items() if task._started().is_over}
            for key in ended:
                del self._tasks[key]
        for task in ended.values():
            task._started().report()

    def end_tasks(self) -> list[concurrent.futures.Future[object]]:
        """Ask for the end of all tasks; returns what to wait for."""
        waiting: list[concurrent.futures.Future[object]] = []
        for task in self.tasks:
            execution = task._started()
            if execution.cancel():
                waiting.append(execution.future)
        return waiting

    def report(self) -> None:
        """Log the errors that were not asked for."""
        for task in self.tasks:
            task._started().report()


def join_all(tasks: Sequence[RuntimeTask]) -> None:
    """Wait for the end of tasks, then raise what failed and was not raised yet.

    Args:
        tasks: Those started with ``omit_on_join`` are passed over.

    Raises:
        TaskExecutionError: If one failed.
        GroupTaskError: If several failed.
    """
    executions = [execution for task in tasks for execution in task._executions()]
    executions = [execution for execution in executions if not execution.omit_on_join]
    wait_for(executions)
    raise_failures(executions)
