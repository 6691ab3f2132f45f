"""Handles of work that runs elsewhere; they behave like :class:`multiprocessing.Process`."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .broadcast import Broadcast
    from .execution import Execution

__all__ = ["ProcessHandle", "TaskProcess"]


class ProcessHandle(abc.ABC):
    """Work on a host or on its behalf, with the interface of :class:`multiprocessing.Process`.

    Attributes:
        name: A name for people.
    """

    name: str

    @property
    @abc.abstractmethod
    def pid(self) -> int | None:
        """The process that does the work, where one can be named."""

    @property
    @abc.abstractmethod
    def exitcode(self) -> int | None:
        """None while it is alive, 0 after success, the negative number of the signal that ended it, else another."""

    @abc.abstractmethod
    def is_alive(self) -> bool:
        """Whether it is still there."""

    @abc.abstractmethod
    def join(self, timeout: float | None = None) -> None:
        """Wait for its end; never raises what went wrong in it.

        Args:
            timeout: Seconds; None: as long as it takes.
        """

    @abc.abstractmethod
    def terminate(self) -> None:
        """Ask for its end, in stages."""

    def kill(self) -> None:
        """Ask for its end at once."""
        self.terminate()

    def __repr__(self) -> str:
        state = "alive" if self.is_alive() else f"ended with {self.exitcode}"
        return f"<{type(self).__name__} {self.name!r} pid={self.pid} {state}>"


class TaskProcess(ProcessHandle):
    """The work of one task on its host, or hosts.

    Args:
        execution: The execution of the task, or those of its copies.
    """

    def __init__(self, execution: Execution | Broadcast) -> None:
        self._execution = execution
        self.name = execution.name

    @property
    def pid(self) -> int | None:
        """The process on the host that carries out the present step, None between steps and for copies of files.

        None also if the task is executed on several hosts.
        """
        return self._execution.pid

    @property
    def exitcode(self) -> int | None:
        """None while it is alive, else 0, or what the failed step's process ended with."""
        return self._execution.exitcode if self._execution.is_over else None

    def is_alive(self) -> bool:
        """Whether the task is pending or running."""
        return not self._execution.is_over

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the task."""
        self._execution.wait(timeout)

    def terminate(self) -> None:
        """Cancel the task: what it runs on the host is interrupted, terminated, killed."""
        self._execution.cancel()

    def kill(self) -> None:
        """Cancel the task without letting it clean up."""
        self._execution.cancel(kill=True)
