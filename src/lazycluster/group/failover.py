"""A task on one host of a group, tried again on other hosts when that one is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime
    from lazycluster.tasks.context import Context, ExecutionOptions
    from lazycluster.tasks.task import RuntimeTask

    from .members import Members

__all__ = ["start_on_one"]


def start_on_one(members: Members, task: RuntimeTask, host: str | None, options: ExecutionOptions) -> RuntimeTask:
    """Start a task on a host, or on the one that executes the fewest tasks; only this one has others to stand in.

    Args:
        members: The group's.
        task: The task.
        host: The host, None for any.
        options: The options of the execution.

    Returns:
        The task that holds the execution.
    """
    runtime = members.least_busy() if host is None else members.get(host)
    if not options.retries or host is not None:
        return runtime._start_task(task, options)
    failover = _Failover(members, runtime)
    failover.task = started = runtime._start_task(task, replace(options, next_context=failover.next_context))
    return started


class _Failover:
    """The tries of one task: each is a task of the runtime where it takes place.

    Args:
        members: The group's.
        runtime: Where the first try takes place.

    Attributes:
        task: The task, once it has been started.
    """

    def __init__(self, members: Members, runtime: Runtime) -> None:
        self._members = members
        self._runtime = runtime
        self.task: RuntimeTask | None = None

    async def next_context(self, tried: Sequence[str]) -> Context | None:
        """Return where the task is tried again; None if there is no such host.

        Args:
            tried: The hosts that were tried.
        """

        def preference(runtime: Runtime) -> tuple[bool, int, int]:
            return runtime._connection.state != "open", tried.count(runtime.host), runtime.alive_task_process_count

        usable = [runtime for runtime in self._members.all if runtime._connection.state in ("open", "interrupted")]
        for runtime in sorted(usable, key=preference):
            context = await runtime._context_when_back()
            if context is None:  # it was lost or closed just now
                continue
            if self.task is not None and runtime is not self._runtime:
                runtime._take_over(self.task, self._runtime)
            self._runtime = runtime
            return context
        return None
