"""Connections that have not logged in: how many there may be, and for how long, so that they keep nobody out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

SILENT_LIMIT = 10.0  # seconds for the first request
IDLE_LIMIT = 60.0  # seconds between two: drivers ask every ten how the server is, on connections that never log in
MOST_SILENT = 200  # connections that have asked for nothing yet
MOST = 2000  # those that have, and have not logged in

C = TypeVar("C")


class Strangers(Generic[C]):
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
