"""Output of programs: cut into lines as it comes, its end kept, and written to standard output."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lazycluster.exceptions import printable

__all__ = ["TAIL_LIMIT", "Lines", "Tail", "settled", "write"]

_LONGEST = 128 * 1024  # bytes of a line that is shown as one
TAIL_LIMIT = 1024 * 1024  # bytes of the end that are kept


class Lines:
    """Cuts what a host prints into lines.

    Args:
        host: The host.
        take: Called with each line, or several; by default they are printed to standard output, with the host.
    """

    def __init__(self, host: str, take: Callable[[Sequence[str]], Any] | None = None) -> None:
        self._take = take or functools.partial(_show, host)
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take a piece of the output."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            lines.append(self._rest)
            self._rest = b""
        if lines:
            self._take([line.decode("utf-8", "replace") for line in lines])

    def end(self) -> None:
        """Take what is left as a line."""
        if self._rest:
            self.feed(b"\n")


def _show(host: str, lines: Sequence[str]) -> None:
    # A closed or broken standard output is no reason for what runs to suffer.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        write("".join(f"[{host}] {line}\n" for line in lines))
        sys.stdout.flush()


class Tail:
    """The last bytes of an output that may be of any length.

    Args:
        most: How many are kept.

    Attributes:
        cut: How many bytes before them were dropped.
    """

    def __init__(self, most: int = TAIL_LIMIT) -> None:
        self._most = most
        self._data = bytearray()
        self.cut = 0

    def put(self, data: bytes) -> None:
        """Take a piece of the output."""
        self._data += data
        if len(self._data) > self._most + self._most // 4:  # not each time, since it moves what stays
            self._trim()

    def text(self, whole_lines: bool = True) -> str:
        """Return what is kept.

        Args:
            whole_lines: Where something is missing before it, begin with a line.
        """
        self._trim()
        data = self._data
        # Half an address at the beginning, say, could not be told from one without a password in it.
        start = data.find(b"\n", 0, -1) + 1 if self.cut and whole_lines else 0
        return data[start:].decode("utf-8", "replace")

    def _trim(self) -> None:
        surplus = len(self._data) - self._most
        if surplus > 0:
            self.cut += surplus
            del self._data[:surplus]


def settled(text: str) -> str:
    """Return an output as a terminal shows it in the end, where programs have written over their own lines."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip("\n").split("\n"))
    return printable("\n".join(lines))


def write(text: str) -> None:
    """Write a text to standard output; what its encoding has no bytes for is escaped."""
    stream = sys.stdout
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
