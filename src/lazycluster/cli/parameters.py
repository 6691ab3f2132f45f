"""Kinds of values that options and arguments of commands take, with errors in the words of the library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from lazycluster.core.durations import duration
from lazycluster.core.sizes import size

__all__ = ["PORT", "Duration", "File", "HostFile", "Seconds", "Size", "Whole",
           "standard_input"]  # fmt: skip

_LEAST = 0.1  # seconds
_INPUT = "lazycluster.stdin"  # of the context of a command: what came on standard input


class Whole(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.2
    """A number from 1. Unlike click's ranges, it does not show its limits in the help.

    Args:
        most: The largest.
        noun: What it is called in errors.
    """

    name = "number"

    def __init__(self, most: int = 1_000_000, noun: str = "an integer") -> None:
        self._most, self._noun = most, noun

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number.

        Raises:
            click.BadParameter: If it is none.
        """
        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= number <= self._most:
            self.fail(f"{value!r} is not {self._noun} from 1 to {self._most}", param, ctx)
        return number


PORT = Whole(65535, "a port")
"""The number of a port."""


class Seconds(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A time in seconds. It does not show its limits in the help, either."""

    name = "seconds"

    def __init__(self, most: float) -> None:
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the time.

        Raises:
            click.BadParameter: If it is none.
        """
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not _LEAST <= seconds <= self._most:
            self.fail(f"{value!r} is not a time in seconds, from {_LEAST:g} to {self._most:g}", param, ctx)
        return seconds


class Duration(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A length of time: seconds, or text such as ``30min``.

    Args:
        may_be_zero: Whether it may be none at all.
    """

    name = "time"

    def __init__(self, may_be_zero: bool = False) -> None:
        self._may_be_zero = may_be_zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds.

        Raises:
            click.BadParameter: If it is no time.
        """
        try:
            return duration(value, may_be_zero=self._may_be_zero)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes, or text such as ``20 GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes.

        Raises:
            click.BadParameter: If it is no size.
        """
        try:
            return int(size(str(value)))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class File(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """The path of a file.

    Args:
        exists: Whether it must be there, and be readable.
    """

    name = "file"

    def __init__(self, exists: bool = True) -> None:
        self._exists = exists

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path.

        Raises:
            click.BadParameter: If it cannot be used.
        """
        path = Path(value)
        if path.is_dir():
            self.fail(f"{value} is a directory, not a file", param, ctx)
        if self._exists and not path.exists():
            self.fail(f"no such file: {value}", param, ctx)
        if self._exists and not os.access(path, os.R_OK):
            self.fail(f"{value} cannot be read: permission denied", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete it as the shell completes files."""
        return [CompletionItem(incomplete, type="file")]


class HostFile(File):
    """A file with hosts; ``-`` is standard input."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> HostFile.Given:
        """Return what gives its content.

        Raises:
            click.BadParameter: If there is no such file.
        """
        if isinstance(value, HostFile.Given):
            return value
        return HostFile.Given(value if value == "-" else super().convert(value, param, ctx))

    class Given:
        """A file with hosts that was named."""

        def __init__(self, path: str) -> None:
            self.is_standard_input = path == "-"
            self._path = path

        def read(self) -> bytes:
            """Return its content."""
            return standard_input() if self.is_standard_input else Path(self._path).read_bytes()


def standard_input() -> bytes:
    """Return all of standard input; a command may ask more than once."""
    meta = click.get_current_context().meta
    if _INPUT not in meta:
        meta[_INPUT] = sys.stdin.buffer.read()
    content: bytes = meta[_INPUT]
    return content
