"""Output of the command line: plain where it is no terminal; how errors are shown, and the exit statuses.

Every command imports this, and the help is to be printed at once: so what takes time is imported where it is needed.
"""

from __future__ import annotations

import functools
import sys
import zlib
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "FAILED", "INTERRUPTED", "TIMED_OUT", "UNREACHABLE", "USAGE", "OutputGoneError", "complain", "errors", "host_style",
    "is_terminal", "lines_of", "output", "person_is_there", "report", "show_error", "tell",
]  # fmt: skip

FAILED = 1
USAGE = 2
TIMED_OUT = 124  # as timeout(1)
INTERRUPTED = 130  # as a shell says of a program that Ctrl-C ended
UNREACHABLE = 255  # as ssh

_BEFORE_COMMANDS = ("--debug", "--version")
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())  # its message is the help; since click 8.2

# Readable on dark and on light, and none that says good or bad.
_STYLES = ("cyan", "magenta", "blue", "bright_cyan", "bright_magenta", "bright_blue")


class OutputGoneError(Exception):
    """Standard output was closed by its reader. No BrokenPipeError: click ends with an exit status of 1 for that."""


@functools.cache
def output() -> Console:
    """Return standard output. Printing raises `OutputGoneError` when its reader has closed it."""
    return _console(stderr=False)


@functools.cache
def errors() -> Console:
    """Return standard error."""
    return _console(stderr=True)


def _console(**options: Any) -> Console:
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise OutputGoneError  # rich would end the process, on whichever thread this is

    return Ours(highlight=False, **options)


def tell(text: str, err: bool = False) -> None:
    """Print a line. Whatever hosts have put into it, it stays one line, and cannot steer the terminal."""
    from lazycluster.exceptions import one_line

    click.echo(one_line(text), err=err)


def lines_of(text: str) -> list[str]:
    """Return a text about one host in lines; all but the first are indented, so that none looks like another host's."""
    from lazycluster.exceptions import printable

    first, *rest = printable(text).split("\n")
    return [first, *(f"  {line.strip()}" if line.strip() and not line.startswith("  ") else line for line in rest)]


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return output().is_terminal


def host_style(host: str) -> str:
    """Return the colour of a host, always the same."""
    return _STYLES[zlib.crc32(host.encode()) % len(_STYLES)]


def person_is_there() -> bool:
    """Return whether a person can be asked something."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def show_error(text: str) -> None:
    """Print an error to standard error; on a terminal, the word "error" and the next step are coloured."""
    from lazycluster.exceptions import printable

    head, _, rest = printable(text).partition("\n")
    out = errors()
    out.print("[bold red]error:[/] ", end="")
    out.print(head, markup=False, highlight=False, soft_wrap=True)
    for line in rest.split("\n") if rest else ():
        step = line.strip().startswith("Next step:")
        out.print(line, markup=False, highlight=False, soft_wrap=True, style="cyan" if step else None)


def complain(error: click.ClickException) -> int:
    """Show an error that click has raised.

    Args:
        error: The error.

    Returns:
        The exit status.
    """
    if not isinstance(error, click.UsageError):
        show_error(error.format_message())
        return FAILED
    if isinstance(error, _NO_ARGUMENTS):
        error.show()
        return USAGE
    context, text = error.ctx, error.format_message()
    if isinstance(error, click.NoSuchOption) and error.option_name in _BEFORE_COMMANDS:
        text = f"{error.option_name} must come before the command: lazycluster {error.option_name} ..."
    if context is not None and "Next step:" not in text:
        text += f"\n  {context.get_usage()}\n  For more: {context.command_path} --help"
    show_error(text)
    return USAGE


def report(error: Exception, debug: bool) -> int:
    """Show an error that ended the command.

    Args:
        error: The error.
        debug: Whether to show its traceback.

    Returns:
        The exit status.
    """
    from lazycluster.exceptions import (
        BackgroundError,
        InvalidRuntimeError,
        InvalidRuntimesError,
        LazyclusterError,
        NoRuntimesError,
    )

    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, (LazyclusterError, OSError, ValueError, TypeError)):
        from .option_names import spelled_next_steps

        show_error(spelled_next_steps(str(error)) or type(error).__name__)
    else:
        show_error(f"{type(error).__name__}: {error}")
        if not debug:
            sys.stderr.write(
                "This is a bug in lazycluster: please report it, with the output of 'lazycluster --debug ...'.\n"
            )
    unreachable = InvalidRuntimeError, InvalidRuntimesError, NoRuntimesError
    kind = error.type if isinstance(error, BackgroundError) else type(error).__name__
    return UNREACHABLE if kind in {one.__name__ for one in unreachable} else FAILED
