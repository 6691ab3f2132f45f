"""A terminal with a program in it, for tests of what a person sees, is asked and types."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from types import TracebackType

_PATIENCE = 60.0
_MOVES = re.compile(r"\x1b\[(\d*)([AKm])|\x1b\[(?:\d+;)+\d+m|([\r\n])|([^\x00-\x1f\x7f-\x9f]+)")
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[()=>].?)")


class Terminal:
    """A program in a terminal of its own, which is its controlling terminal.

    Args:
        argv: The program.
        env: Variables beside those of this process.
        columns: The width of the terminal.
        lines: Its height.

    Attributes:
        seen: All that was printed, without colours.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, columns: int = 80, lines: int = 24
    ) -> None:
        self._own, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", **(env or {})}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *argv], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        self.seen = ""
        self.raw = ""

    def until(self, pattern: str) -> re.Match[str]:
        """Wait until something was printed."""
        deadline = time.monotonic() + _PATIENCE
        while not (found := re.search(pattern, self.seen)):
            assert self._read(deadline), f"{pattern!r} was not printed, but:\n{self.seen}"
        return found

    def type(self, text: str) -> None:
        """Type something; ``\\x03`` is Ctrl-C."""
        os.write(self._own, text.encode())

    def interrupt(self) -> int:
        """Press Ctrl-C at a prompt, as often as it takes; returns the exit status of the program.

        Python sees one that comes just before it begins to wait for a line only with the next key (readline's select
        does not return for it): on a loaded machine that window is as long as the time in which a test is woken.
        """
        while self.process.poll() is None:
            self.type("\x03")
            again = time.monotonic() + 1.0
            while self._read(again):
                pass
        return self.process.wait()

    def end(self) -> int:
        """Wait for the end of the program; returns its exit status."""
        deadline = time.monotonic() + _PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(_PATIENCE)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._own], [], [], max(0.0, deadline - time.monotonic()))
        data = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            data = os.read(self._own, 65536) if ready else b""
        self.raw += data.decode(errors="replace")
        self.seen = _ESCAPES.sub("", self.raw).replace("\r\n", "\n")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.end()
        os.close(self._own)


def screens(written: str) -> list[list[str]]:
    """Return the lines that a terminal shows, each time before a line is removed, and at the end.

    Whatever else than colours, line ends and the removal of lines would steer it is an error.
    """
    shown, lines, row, column, position = [], [""], 0, 0, 0
    while position < len(written):
        found = _MOVES.match(written, position)
        assert found is not None, f"this steers the terminal: {written[position : position + 20]!r}"
        position = found.end()
        number, kind, control, text = found.groups()
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif control == "\r":
            column = 0
        elif control == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif kind == "A":
            row -= int(number or 1)
            assert row >= 0, "above the first line"
        elif kind == "K":
            shown.append([line.rstrip() for line in lines])
            lines[row] = "" if number == "2" else lines[row][:column]
    return [*shown, [line.rstrip() for line in lines]]
