"""What comes from the workers of a host, cut into answers and lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lazycluster import _live
from lazycluster.agent.poolwire import ANSWER

__all__ = ["Lines", "Stream"]

_logger = logging.getLogger("lazycluster")


class Stream:
    """Cuts what one worker says into answers."""

    __slots__ = ("_answer", "_head", "_left", "_parts", "_rest")

    def __init__(self, answer: Callable[[int, int, float, list[bytes], int], None]) -> None:
        self._answer = answer
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
            part = data[position : position + self._left]
            position += len(part)
            self._left -= len(part)
            self._parts.append(part)
            if self._left:
                return
            kind, number, elapsed, size = self._head
            parts, self._parts, self._head = self._parts, [], None
            self._answer(kind, number, elapsed, parts, size)


class Lines(_live.Lines):
    """What the workers of a host print, line by line: printed here with the host's name, or logged."""

    def __init__(self, host: str, shown: bool) -> None:
        super().__init__(host, None if shown else lambda lines: _log(host, lines))


def _log(host: str, lines: Sequence[str]) -> None:
    for line in lines:
        _logger.debug("%s: %s", host, line)
