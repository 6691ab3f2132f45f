"""Where a task of a group is tried again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        self._task: RuntimeTask | None = None
        self._runtime: Runtime | None = None

    def begun(self, task: RuntimeTask, runtime: Runtime) -> None:
        """Note where the first try takes place."""
        self._task = task
        if self._runtime is None:
            self._runtime = runtime

    async def next_context(self, tried: Sequence[str]) -> Context | None:
        """Return where the task is tried again; None if there is no such host.

        Args:
            tried: The hosts that were tried.
        """

        def worth(runtime: Runtime) -> tuple[bool, int, int]:
            return runtime._connection.state != "open", tried.count(runtime.host), runtime.alive_task_process_count

        usable = [runtime for runtime in self._members.all if runtime._connection.state in ("open", "interrupted")]
        for runtime in sorted(usable, key=worth):
            context = await runtime._context_when_back()
            if context is None:  # it was lost or closed just now
                continue
            if self._task is not None and runtime is not self._runtime:
                runtime._take_over(self._task, self._runtime)
            self._runtime = runtime
            return context
        return None
