"""Limit and delays of restarts: by the agent, and by the manager if the agent is lost."""

from __future__ import annotations

import time

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import List, Optional

WINDOW = 300.0  # seconds within which restarts are counted
_BACKOFF, _LONGEST_BACKOFF = 0.25, 30.0


class RestartPolicy:
    """Counts restarts.

    Args:
        limit: How many there may be within `WINDOW`.

    Attributes:
        count: How many there were in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._moments: List[float] = []

    def next(self, blameless: bool = False) -> Optional[float]:
        """Count one more; returns the seconds until it may begin, None if there were too many.

        Args:
            blameless: Whether it was others that ended what is started again; that does not count against the limit.
        """
        now = time.monotonic()
        if blameless:
            self.count += 1
            return _BACKOFF
        self._moments = [moment for moment in self._moments if now - moment < WINDOW]
        if len(self._moments) >= self.limit:
            return None
        delay = min(_LONGEST_BACKOFF, _BACKOFF * 2.0 ** len(self._moments))
        self._moments.append(now)
        self.count += 1
        return delay

    def exhausted(self) -> str:
        """Say that there were too many."""
        if not self.limit:
            return "it ended"
        return "it ended again after {} restarts within {:g} s".format(len(self._moments), WINDOW)
