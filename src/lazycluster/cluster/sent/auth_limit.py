"""Connections of those who have not shown who they are: limits, so that they keep nobody out.

How many of them there may be, and for how long, and how many lines of the log they may fill.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from typing import Generic, TypeVar

SILENT_LIMIT = 30.0  # seconds for the first request: Dask waits as long for a connection
IDLE_LIMIT = 60.0  # seconds between two: drivers ask every ten how the server is, on connections that never log in
MOST_SILENT = 1000  # connections that have asked for nothing yet; all workers of a large cluster may come at once
MOST = 2000  # those that have, and have not logged in
LINES = 20  # of the log, within a period
PERIOD = 600.0  # seconds
_OTHER_FILES = 64  # descriptors that are for something else than connections

C = TypeVar("C")


class AuthLimit(Generic[C]):
    """Knows since when each of them says nothing, and ends those that do for too long, or are too many.

    Args:
        clock: Tells the time.
        end: Ends a connection, soon if not at once.
        room: How many there may be at all.
    """

    def __init__(self, clock: Callable[[], float], end: Callable[[C], object], room: int = 2 * MOST) -> None:
        self._clock = clock
        self._end = end
        self._most_silent, self._most = min(MOST_SILENT, room // 2), min(MOST, room // 2)
        self._silent: dict[C, float] = {}  # in the order of the times, as the next
        self._heard: dict[C, float] = {}

    def __len__(self) -> int:
        return len(self._silent) + len(self._heard)

    def came(self, connection: C) -> None:
        """Note a new one."""
        self._put(self._silent, connection, self._most_silent)

    def heard(self, connection: C) -> None:
        """Note that one has asked for something."""
        self.gone(connection)
        self._put(self._heard, connection, self._most)

    def gone(self, connection: C) -> None:
        """Note that one has logged in, or has ended."""
        self._silent.pop(connection, None)
        self._heard.pop(connection, None)

    def _put(self, place: dict[C, float], connection: C, most: int) -> None:
        place[connection] = self._clock()
        if len(place) > most:
            self._drop(next(iter(place)))  # who means it logs in long before that many others have come

    def sweep(self) -> None:
        """End those whose time is up."""
        now = self._clock()
        for place, limit in ((self._silent, SILENT_LIMIT), (self._heard, IDLE_LIMIT)):
            for connection in [one for one, since in place.items() if now - since >= limit]:
                self._drop(connection)

    def _drop(self, connection: C) -> None:
        self.gone(connection)
        self._end(connection)


def limited_logger() -> logging.Logger:
    """Return the logger for what unauthenticated clients cause."""
    logger = logging.getLogger("lazycluster.strangers")  # a name that programs may have settings for
    limit_lines(logger.name)
    return logger


def limit_lines(*names: str) -> None:
    """Have loggers write few lines. Doing it again does nothing."""
    for name in names:
        logger = logging.getLogger(name)
        if not any(isinstance(one, FewLines) for one in logger.filters):
            logger.addFilter(FewLines())


class FewLines(logging.Filter):
    """Lets few lines of a logger through within a period: clients that are not authenticated decide how many there are.

    The first line of the next period says how many were left out.

    Args:
        clock: Tells the time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._since: float | None = None
        self._count = self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is written."""
        now = self._clock()
        if self._since is None or now - self._since >= PERIOD:
            left_out, self._since, self._count, self._left_out = self._left_out, now, 0, 0
            if left_out:
                record.msg, record.args = f"{record.getMessage()} [{left_out} such lines were left out]", ()
        self._count += 1
        if self._count == LINES:
            record.msg, record.args = f"{record.getMessage()} [further such lines are left out for a while]", ()
        self._left_out += self._count > LINES
        return self._count <= LINES


def room_for_connections(most: int) -> int:
    """Have as many descriptors as are needed and allowed; returns how many connections there may be.

    Args:
        most: How many there are to be, at most.
    """
    wanted = most + _OTHER_FILES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return max(1, min(wanted, soft) - min(_OTHER_FILES, soft // 3))
