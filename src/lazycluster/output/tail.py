"""The end of an output that may be of any length."""

from __future__ import annotations

_MOST = 1024 * 1024


class Tail:
    """Keeps the last bytes of what it is given.

    Args:
        most: How many.

    Attributes:
        is_cut: Whether there was more.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._data = bytearray()
        self.is_cut = False

    def put(self, data: bytes) -> None:
        """Take a part of the output."""
        self._data += data
        if len(self._data) > 2 * self._most:
            self._trim()

    def text(self) -> str:
        """Return what is kept; where something is missing before it, it begins with a line."""
        self._trim()
        data = self._data
        # Half an address at the beginning, say, could not be told from one without a password in it.
        start = data.find(b"\n", 0, -1) + 1 if self.is_cut else 0
        return data[start:].decode("utf-8", "replace")

    def _trim(self) -> None:
        if len(self._data) > self._most:
            self.is_cut = True
            del self._data[: -self._most]
