"""The executions of one task on several hosts."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lazycluster.core.words import counted
from lazycluster.exceptions import GroupTaskError, TaskExecutionError

from .execution import Execution, TaskFuture, raise_failures, wait_for
from .steps import StepResult

__all__ = ["Broadcast"]

_NAMED = 3  # hosts; of more, their number is shown


class Broadcast:
    """The executions of a task's copies, with the interface of one :class:`Execution`.

    Its results are those of all hosts, in the order of the hosts, and its error is that of the one host, or a
    :class:`~lazycluster.exceptions.GroupTaskError`.

    Args:
        name: The task's name.
        executions: One for each host; they have begun.

    Attributes:
        future: Done when all have ended; its result is a list with the result of each.
    """

    omit_on_join = False
    host: str | None = None  # there is not one alone
    log_file: str | None = None  # each has its own
    pid: int | None = None

    def __init__(self, name: str, executions: Sequence[Execution]) -> None:
        self.name = name
        self.executions = tuple(executions)
        self.future = TaskFuture(self)
        self._lock = threading.Lock()
        self._left = len(self.executions)
        self._error: TaskExecutionError | None = None
        for execution in self.executions:
            execution.future.add_done_callback(self._one_ended)

    def _one_ended(self, _: object) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        values = [[result.value for result in one.results if result.has_value] for one in self.executions]
        last = [found[-1] if found else None for found in values]
        self._error = self.error
        self.future.settle(last, self._error, self.status == "cancelled")

    @property
    def where(self) -> str:
        """The hosts, in a few words."""
        hosts = [execution.context.host for execution in self.executions]
        return ", ".join(hosts) if len(hosts) <= _NAMED else counted(len(hosts), "host")

    @property
    def is_over(self) -> bool:
        """Whether all have ended."""
        return all(execution.is_over for execution in self.executions)

    @property
    def status(self) -> str:
        """``pending`` until one is begun, ``running`` until all have ended, then the worst that became of one."""
        found = {execution.status for execution in self.executions}
        if not self.is_over:
            return "pending" if found == {"pending"} else "running"
        return next((status for status in ("failed", "cancelled") if status in found), "done")

    @property
    def results(self) -> list[StepResult]:
        """What came out of each step on each host so far."""
        return [result for execution in self.executions for result in execution.results]

    @property
    def error(self) -> TaskExecutionError | None:
        """Why it failed; of several hosts, all of their errors in one."""
        if self._error is not None:
            return self._error
        errors = [execution.error for execution in self.executions if execution.error is not None]
        return GroupTaskError(errors) if len(errors) > 1 else errors[0] if errors else None

    @property
    def exitcode(self) -> int | None:
        """None until all have ended, then 0, or what the first one that did not end well ended with."""
        codes = [execution.exitcode for execution in self.executions]
        return None if None in codes else next((code for code in codes if code), 0)

    @property
    def asked(self) -> bool:
        """Whether somebody has asked for all errors."""
        return all(execution.asked for execution in self.executions)

    @asked.setter
    def asked(self, asked: bool) -> None:
        for execution in self.executions:
            execution.asked = asked

    def check_waiting(self) -> None:
        """Raise an error where waiting would last for ever."""
        for execution in self.executions:
            execution.check_waiting()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of all, see :meth:`Execution.wait`."""
        return wait_for(self.executions, timeout)

    def too_long(self, timeout: float | None) -> str:
        """Return what is said if it has not ended in time."""
        left = [execution.context.host for execution in self.executions if not execution.is_over]
        return f"task {self.name!r} has not ended within {timeout} s on {', '.join(left)}"

    def cancel(self, kill: bool = False) -> bool:
        """Ask for the end of all, see :meth:`Execution.cancel`."""
        asked = [execution.cancel(kill) for execution in self.executions]
        return any(asked)

    def raise_once(self) -> None:
        """Raise what failed and was not raised yet."""
        raise_failures(self.executions)

    def report(self) -> None:
        """Log the errors that nobody has asked for."""
        for execution in self.executions:
            execution.report()
