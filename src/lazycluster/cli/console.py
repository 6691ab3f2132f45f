"""Where things are printed: plain when it is not a terminal, or `NO_COLOR` is set."""

from __future__ import annotations

import functools
import sys
import zlib
from typing import TYPE_CHECKING, Any

import click

from lazycluster.exceptions import one_line, printable

from .errors import OutputGoneError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["errors", "host_style", "is_terminal", "lines_of", "output", "person_is_there", "tell"]

# Readable on dark and on light, and none that says good or bad.
_STYLES = ("cyan", "magenta", "blue", "bright_cyan", "bright_magenta", "bright_blue")


@functools.cache
def output() -> Console:
    """Return standard output. Printing raises `OutputGoneError` once nobody reads it any more."""
    return _console(stderr=False)


@functools.cache
def errors() -> Console:
    """Return standard error."""
    return _console(stderr=True)


def _console(**options: Any) -> Console:
    from rich.console import Console  # the help needs none of it

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise OutputGoneError  # rich would end the process, on whichever thread this is

    return Ours(highlight=False, **options)


def tell(text: str, err: bool = False) -> None:
    """Print a line. Whatever hosts have said in it, it stays one, and does not steer the terminal."""
    click.echo(one_line(text), err=err)


def lines_of(text: str) -> list[str]:
    """Return what is said of one host, in lines of which only the first could be taken for another host's."""
    first, *rest = printable(text).split("\n")
    return [first, *(f"  {line.strip()}" if line.strip() and not line.startswith("  ") else line for line in rest)]


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return output().is_terminal


def host_style(host: str) -> str:
    """Return the colour of a host, always the same."""
    return _STYLES[zlib.crc32(host.encode()) % len(_STYLES)]


def person_is_there() -> bool:
    """Whether a person can be asked something."""
    return sys.stdin.isatty() and sys.stderr.isatty()
