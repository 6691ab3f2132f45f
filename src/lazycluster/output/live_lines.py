"""What hosts print, shown as it comes: whole lines, each with its host."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Lines", "write"]

_LONGEST = 128 * 1024  # bytes of a line that is shown as one


class Lines:
    """Cuts what a host prints into lines.

    Args:
        host: The host.
        take: Is called with each line, or several; by default they are printed to standard output, with the host.
    """

    def __init__(self, host: str, take: Callable[[Sequence[str]], Any] | None = None) -> None:
        self._take = take or functools.partial(_show, host)
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take a piece."""
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


def write(text: str) -> None:
    """Write a text to standard output; what its encoding has no bytes for is escaped."""
    stream = sys.stdout
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
