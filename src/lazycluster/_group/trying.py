"""Where a task of a group is tried again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazycluster.exceptions import LazyclusterError
from lazycluster.tasks.retrying import Retries

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime
    from lazycluster.tasks.context import Context
    from lazycluster.tasks.task import RuntimeTask

    from .members import Members

__all__ = ["Trying"]


class Trying:
    """The tries of one task: each is a task of the runtime where it takes place.

    Args:
        members: The group's.
        count: How often it is tried again.
        retry_on: ``host`` or ``any``.
        pinned: Whether it must stay on its host.

    Attributes:
        retries: What the task is told.
    """

    def __init__(self, members: Members, count: int, retry_on: str, pinned: bool) -> None:
        self.retries = Retries(count, retry_on == "any", self._elsewhere)
        self._members, self._pinned = members, pinned
        self._task: RuntimeTask | None = None
        self._runtime: Runtime | None = None

    def begun(self, task: RuntimeTask, runtime: Runtime) -> None:
        """Note where the first try takes place."""
        self._task = task
        if self._runtime is None:
            self._runtime = runtime

    def _elsewhere(self, tried: Sequence[str]) -> Context | None:
        usable = [runtime for runtime in self._members.all if runtime.connection.state in ("open", "interrupted")]
        if self._pinned:
            usable = [runtime for runtime in usable if runtime.host == tried[-1]]
        if not usable:
            return None
        runtime = min(usable, key=lambda one: (tried.count(one.host), one.alive_task_process_count))
        try:
            context = runtime.task_context()
        except LazyclusterError:  # it was closed just now
            return None
        if self._task is not None and runtime is not self._runtime:
            runtime.take_over(self._task, self._runtime)
        self._runtime = runtime
        return context
