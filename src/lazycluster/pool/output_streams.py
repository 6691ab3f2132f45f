"""What comes from the workers of a host, cut into answers and lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lazycluster.agent.pool_protocol import ANSWER
from lazycluster.core import memory
from lazycluster.output.lines import Lines

__all__ = ["WorkerLines", "WorkerStream"]

_logger = logging.getLogger("lazycluster")


class WorkerStream:
    """Cuts what one worker says into answers.

    Args:
        answer: Is called with each: its kind, the number of its chunk, the seconds that it took, its parts, their size.
        given_up: Is called instead, with the number of the chunk and the error, if there was no memory for it.

    Attributes:
        held: How many bytes of the present answer are kept.
    """

    def __init__(
        self,
        answer: Callable[[int, int, float, list[bytes], int], None],
        given_up: Callable[[int, MemoryError], None],
    ) -> None:
        self._answer, self._given_up = answer, given_up
        self._error: MemoryError | None = None  # why the present answer is not kept
        self.held = 0
        memory.hold(self)
        self._rest = b""
        self._head: tuple[int, int, float, int] | None = None
        self._parts: list[bytes] = []
        self._left = 0

    def feed(self, data: bytes, position: int) -> None:
        """Take a piece."""
        if self._rest:
            data, position, self._rest = self._rest + data[position:], 0, b""
        end = len(data)
        while True:
            if self._head is None:
                if end - position < ANSWER.size:
                    self._rest = data[position:]
                    return
                self._head = ANSWER.unpack_from(data, position)
                self._left = self._head[3]
                position += ANSWER.size
            count = min(self._left, end - position)
            self._take(data, position, count)
            position += count
            self._left -= count
            if self._left:
                return
            kind, number, elapsed, size = self._head
            parts, error = self._parts, self._error
            self._parts, self._head, self._error, self.held = [], None, None, 0
            if error is not None:
                self._given_up(number, error)
            else:
                self._answer(kind, number, elapsed, parts, size)

    def _take(self, data: bytes, position: int, count: int) -> None:
        if self._error is not None:
            return
        try:
            self._parts.append(data[position : position + count])
            self.held += count
        except MemoryError:
            self.give_up(memory.no_room(self.held))

    def give_up(self, error: MemoryError) -> None:
        """Let go of the present answer; what else comes of it is not kept."""
        self._parts.clear()
        self.held = 0
        self._error = error


class WorkerLines(Lines):
    """What the workers of a host print, line by line: printed here with the host's name, or logged."""

    def __init__(self, host: str, shown: bool) -> None:
        super().__init__(host, None if shown else lambda lines: _log(host, lines))


def _log(host: str, lines: Sequence[str]) -> None:
    for line in lines:
        _logger.debug("%s: %s", host, line)
