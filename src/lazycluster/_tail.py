"""The end of an output that may be of any length."""

from __future__ import annotations

_MOST = 1024 * 1024


class Tail:
    """Keeps the last bytes of what it is given.

    Args:
        most: How many.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._data = bytearray()

    def put(self, data: bytes) -> None:
        """Take a part of the output."""
        self._data += data
        if len(self._data) > 2 * self._most:
            del self._data[: -self._most]

    def text(self) -> str:
        """Return what is kept."""
        return self._data[-self._most :].decode("utf-8", "replace")
