"""A task on one host of a group, tried again on other hosts when that one is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazycluster.tasks.retries import Retries

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime
    from lazycluster.tasks.context import Context
    from lazycluster.tasks.task import RuntimeTask

    from .members import Members

__all__ = ["start_on_one"]


def start_on_one(
    members: Members, task: RuntimeTask, host: str | None, debug: bool, retries: int, retry_on: str
) -> RuntimeTask:
    """Start a task on a host, or on the one that executes the fewest tasks; only this one has others to stand in.

    Args:
        members: The group's.
        task: The task.
        host: The host, None for any.
        debug: Whether output is printed live.
        retries: How often it is tried again.
        retry_on: ``host`` or ``any``.

    Returns:
        The task that holds the execution.
    """
    runtime = members.least_busy() if host is None else members.get(host)
    if not retries or host is not None:
        return runtime.start_task(task, debug=debug, retries=runtime.own_retries(retries, retry_on))
    failover = _Failover(members, retries, retry_on, runtime)
    failover.task = started = runtime.start_task(task, debug=debug, retries=failover.retries)
    return started


class _Failover:
    """The tries of one task: each is a task of the runtime where it takes place.

    Args:
        members: The group's.
        count: How often it is tried again.
        retry_on: ``host`` or ``any``.
        runtime: Where the first try takes place.

    Attributes:
        retries: What the task is told.
        task: The task, once it has been started.
    """

    def __init__(self, members: Members, count: int, retry_on: str, runtime: Runtime) -> None:
        self.retries = Retries(count, retry_on == "any", self.next_context)
        self._members = members
        self._runtime = runtime
        self.task: RuntimeTask | None = None

    async def next_context(self, tried: Sequence[str]) -> Context | None:
        """Return where the task is tried again; None if there is no such host.

        Args:
            tried: The hosts that were tried.
        """

        def preference(runtime: Runtime) -> tuple[bool, int, int]:
            return runtime.connection.state != "open", tried.count(runtime.host), runtime.alive_task_process_count

        usable = [runtime for runtime in self._members.all if runtime.connection.state in ("open", "interrupted")]
        for runtime in sorted(usable, key=preference):
            context = await runtime.context_again()
            if context is None:  # it was lost or closed just now
                continue
            if self.task is not None and runtime is not self._runtime:
                runtime.take_over(self.task, self._runtime)
            self._runtime = runtime
            return context
        return None
