"""What comes from the workers of a host, cut into answers and lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from lazycluster.agent.poolwire import ANSWER

__all__ = ["Lines", "Stream"]

_logger = logging.getLogger("lazycluster")

_LONGEST = 128 * 1024  # bytes of a line that is shown as one


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


class Lines:
    """What the workers of a host print, line by line: printed here with the host's name, or logged."""

    def __init__(self, host: str, live: bool) -> None:
        self._host = host
        self._live = live
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take a piece."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._show(line)

    def _show(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        if self._live:
            sys.stdout.write(f"[{self._host}] {text}\n")
        else:
            _logger.debug("%s: %s", self._host, text)

    def close(self) -> None:
        """Show what is left."""
        if self._rest:
            self._show(self._rest)
            self._rest = b""
