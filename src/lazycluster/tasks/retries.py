"""Tasks that are tried again when their host has failed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazycluster.exceptions import ConnectionLostError, TaskExecutionError

if TYPE_CHECKING:
    from .context import Context

__all__ = ["Retries", "checked_retries"]

_logger = logging.getLogger("lazycluster")


@dataclass
class Retries:
    """How often a task is tried again, and where.

    Attributes:
        left: How often.
        any_failure: Whatever has failed; else only when the host was lost.
        elsewhere: Returns where, given the hosts that were tried, perhaps after waiting for one; None if there is
            nowhere. It is called on the loop.
        tried: The hosts that were tried.
    """

    left: int
    any_failure: bool
    elsewhere: Callable[[Sequence[str]], Awaitable[Context | None]]
    tried: list[str] = field(default_factory=list)

    async def next(self, task: str, context: Context, error: TaskExecutionError) -> Context | None:
        """Return where a task that has failed is to be tried again; None if it is not.

        Args:
            task: Its name.
            context: Where it has failed.
            error: How.
        """
        self.tried.append(context.host)
        host_failed = isinstance(error.__cause__, ConnectionLostError) or context.connection.state == "lost"
        if not self.left or not (self.any_failure or host_failed):
            return None
        found = await self.elsewhere(self.tried)
        if found is not None:
            self.left -= 1
            # The first line of the message says which step it is, the second why.
            why = str(error.__cause__ or error.message.partition("\n")[2] or error.message).strip().partition("\n")[0]
            _logger.warning("%s: task %r has failed and is tried again on %s: %s", context.host, task, found.host, why)
        return found

    def told(self, error: TaskExecutionError) -> TaskExecutionError:
        """Return the last error so that it says what was tried before."""
        if len(self.tried) < 2:
            return error
        text = f"{error.message}\n  It was tried {len(self.tried)} times, on {', '.join(self.tried)}."
        values = {name: value for name, value in error.__dict__.items() if name != "message"}
        return TaskExecutionError(text, **values)


def checked_retries(retries: int, retry_on: str) -> None:
    """Refuse what makes no sense.

    Raises:
        TypeError, ValueError: It does not.
    """
    if not isinstance(retries, int) or isinstance(retries, bool):
        raise TypeError(f"retries must be an integer, not {type(retries).__name__}")
    if retries < 0:
        raise ValueError(f"retries must be >= 0, not {retries}")
    if retry_on not in ("host", "any"):
        raise ValueError(f"retry_on must be 'host' or 'any', not {retry_on!r}")
