"""Where a task of a group is tried again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazycluster.tasks.retries import Retries

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime
    from lazycluster.tasks.context import Context
    from lazycluster.tasks.task import RuntimeTask

    from .members import Members

__all__ = ["Failover"]


class Failover:
    """The tries of one task: each is a task of the runtime where it takes place.

    Args:
        members: The group's.
        count: How often it is tried again.
        retry_on: ``host`` or ``any``.

    Attributes:
        retries: What the task is told.
    """

    def __init__(self, members: Members, count: int, retry_on: str) -> None:
        self.retries = Retries(count, retry_on == "any", self._elsewhere)
        self._members = members
        self._task: RuntimeTask | None = None
        self._runtime: Runtime | None = None

    def begun(self, task: RuntimeTask, runtime: Runtime) -> None:
        """Note where the first try takes place."""
        self._task = task
        if self._runtime is None:
            self._runtime = runtime

    async def _elsewhere(self, tried: Sequence[str]) -> Context | None:
        def worth(runtime: Runtime) -> tuple[bool, int, int]:
            return runtime.connection.state != "open", tried.count(runtime.host), runtime.alive_task_process_count

        usable = [runtime for runtime in self._members.all if runtime.connection.state in ("open", "interrupted")]
        for runtime in sorted(usable, key=worth):
            context = await runtime.context_again()
            if context is None:  # it was lost or closed just now
                continue
            if self._task is not None and runtime is not self._runtime:
                runtime.take_over(self._task, self._runtime)
            self._runtime = runtime
            return context
        return None
