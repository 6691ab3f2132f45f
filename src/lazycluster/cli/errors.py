"""Exit statuses, and errors as they are shown to a person."""

from __future__ import annotations

import sys

import click

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "TIMED_OUT",
    "UNREACHABLE",
    "USAGE",
    "OutputGoneError",
    "complain",
    "report",
    "show_error",
]

FAILED = 1
USAGE = 2
TIMED_OUT = 124  # as timeout(1)
INTERRUPTED = 130  # as a shell says of a program that Ctrl-C ended
UNREACHABLE = 255  # as ssh

_BEFORE_COMMANDS = ("--debug", "--version")
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())  # its message is the help; since click 8.2


class OutputGoneError(Exception):
    """Nobody reads the output any more. Not a BrokenPipeError: click makes an exit status of 1 of that."""


def show_error(text: str) -> None:
    """Print an error to standard error; the first word of the cause and of the next step stand out on a terminal."""
    from lazycluster.exceptions import printable

    from .console import errors

    head, _, rest = printable(text).partition("\n")
    out = errors()
    out.print("[bold red]error:[/] ", end="")
    out.print(head, markup=False, highlight=False, soft_wrap=True)
    for line in rest.split("\n") if rest else ():
        step = line.strip().startswith("Next step:")
        out.print(line, markup=False, highlight=False, soft_wrap=True, style="cyan" if step else None)


def complain(error: click.ClickException) -> int:
    """Show what click has to say.

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
        text = f"{error.option_name} comes before the command: lazycluster {error.option_name} ..."
    if context is not None and "Next step:" not in text:
        text += f"\n  {context.get_usage()}\n  For more: {context.command_path} --help"
    show_error(text)
    return USAGE


def report(error: Exception, debug: bool) -> int:
    """Show an error that ended the command.

    Args:
        error: The error.
        debug: Whether to show where it comes from.

    Returns:
        The exit status.
    """
    from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError, NoRuntimesError

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
                "This is a bug of lazycluster: please report it with what 'lazycluster --debug ...' prints.\n"
            )
    return UNREACHABLE if isinstance(error, (InvalidRuntimeError, NoRuntimesError)) else FAILED
