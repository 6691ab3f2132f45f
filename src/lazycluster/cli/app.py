"""The command line's entry point: its commands, and the handling of their errors."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import select
import signal
import sys
from typing import Any

import click

from lazycluster import __version__, engines

from .console import FAILED, INTERRUPTED, OutputGoneError, complain, report

__all__ = ["cli", "main"]

# Name -> module and a line of help. Nothing is imported to show the list.
_COMMANDS = {
    "demo": ("demo:demo", "Show what lazycluster does, on this machine or on hosts."),
    "list-runtimes": ("runtimes:list_runtimes", "List hosts, with their state and hardware."),
    "doctor": ("doctor:doctor", "Check hosts step by step, and say how to fix what is wrong."),
    "run": ("run:run", "Run a command or a Python script on many hosts at once."),
    "ps": ("work:ps", "List detached work, with its state on each host."),
    "logs": ("logs:logs", "Show what detached work has printed, or a cluster's log."),
    "wait": ("work:wait", "Wait until detached work has ended."),
    "cancel": ("work:cancel", "End detached work, with all its processes."),
    "rm": ("work:rm", "Remove detached work that has ended, with its log."),
    "put": ("copy:put", "Copy files and directories to hosts."),
    "get": ("copy:get", "Copy files and directories from hosts."),
    "start": ("start:start", engines.SUMMARY),
    **{alias: ("start:", f"The same as 'start {engine}'.") for alias, engine in engines.ALIASES.items()},
    "up": ("up:up", "Start a cluster that goes on when you log out."),
    "ls": ("background:ls", "List clusters in the background."),
    "info": ("background:info", "Show a cluster in the background."),
    "scale": ("background:scale", "Change the number of its workers."),
    "dashboard": ("background:dashboard", "Print the address of its dashboard."),
    "login": ("background:login", "Let it use your present login."),
    "down": ("background:down", "End clusters in the background."),
    "forward": ("ports:forward", "Make ports of a host reachable on this machine."),
    "expose": ("ports:expose", "Make ports of this machine reachable on hosts."),
    "env": ("env:env", "Show, make and remove Python environments on hosts."),
    "add-runtime": ("configuration:add_runtime", "Add a host to the ssh configuration."),
    "delete-runtime": ("configuration:delete_runtime", "Remove a host from the ssh configuration."),
    "cleanup": ("cleanup:cleanup", "Remove what a crash left behind."),
    "schema": ("schema:schema", "Print the JSON schema of cluster.toml, for editors."),
    "completion": ("completion:completion", "Print a completion script for a shell."),
}


class _Commands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        found = importlib.import_module(f"lazycluster.cli.commands.{module}")
        command: click.Command = getattr(found, attribute) if attribute else found.start_alias(cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" See '{ctx.command_path} --help'."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="lazycluster", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Log what is done, and show the traceback of an error.")
def cli(debug: bool) -> None:
    """From a list of SSH hosts to commands, files, ports and clusters on them.

    The hosts are those of your ssh configuration (~/.ssh/config); anything that 'ssh HOST' accepts works, too. They
    need an SSH server and python3, nothing else, and nothing is left on them.

    \b
    Examples:
      lazycluster list-runtimes -l
      lazycluster doctor node1
      lazycluster run -w 'node[1-3]' -- uptime
      lazycluster put -w @all data.csv /tmp/

    Exit status: 0 on success, 1 on failure, 2 on wrong usage, 130 when interrupted. See also 'lazycluster run --help'.
    """
    if debug:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Run the command line, and exit with its status."""
    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)
    try:
        status = _flushed(_run())
    except (OutputGoneError, BrokenPipeError):
        status = 128 + signal.SIGPIPE  # as a program that it ended: whoever reads our output has had enough of it
        _discard(1, 2)
    sys.exit(status)


def _run() -> int:
    status = _carried_out()
    if status:
        _look_at_directory()
    return status


def _look_at_directory() -> None:
    """Tell whoever is in a directory that was removed so: an error about a relative path may have that reason."""
    from lazycluster.utils import NO_CURRENT_DIRECTORY

    try:
        os.getcwd()
    except FileNotFoundError:
        sys.stderr.write(f"Note: {NO_CURRENT_DIRECTORY}.\n")
    except OSError:
        pass


def _carried_out() -> int:
    # Behind the command it is the option of a program that is run on hosts.
    debug = "--debug" in itertools.takewhile(lambda word: word.startswith("-"), sys.argv[1:])
    try:
        status = _status(cli.main(standalone_mode=False, prog_name="lazycluster"))
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return _status(end.exit_code)
    except click.ClickException as error:
        return complain(error)
    except (click.Abort, KeyboardInterrupt) as error:
        ended = isinstance(error.__cause__, (KeyboardInterrupt, EOFError))  # click has ended the line of the ^C
        sys.stderr.write("Interrupted.\n" if ended else "\nInterrupted.\n")
        return INTERRUPTED
    except OutputGoneError:
        raise
    except Exception as error:  # noqa: BLE001 - an error's place is on the screen, its traceback in --debug
        return report(error, debug)
    return status


def _flushed(status: int) -> int:
    """Flush the standard streams; return the exit status, which is not 0 if that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if status == 0:
            report(error, debug=False)
        status = status or FAILED
        _discard(1)
    sys.stderr.flush()
    return status


def _discard(*descriptors: int) -> None:
    """Discard what is not yet written: the interpreter would report an error about it when it exits."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


def _open_standard_streams() -> None:
    """Make the standard streams usable, whatever they are.

    Where one was closed, Python has None, and other files would get its number: it is an empty one. What the encoding
    of one has no bytes for is escaped: the output would be lost otherwise, after the work has been done.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
    sys.stdout = _opened(_OutputStream(1, "w", closefd=False), sys.stdout)
    sys.stderr = _opened(_ErrorStream(2, "w", closefd=False), sys.stderr)


def _opened(stream: _Stream, before: Any) -> io.TextIOWrapper:
    before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding=before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )


class _Stream(io.FileIO):
    """A standard stream, which another program that shares it may have made non-blocking."""

    def write(self, data: Any) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _OutputStream(_Stream):
    """Standard output. When nobody reads it any more, the command ends."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise OutputGoneError from None


class _ErrorStream(_Stream):
    """Standard error. If it cannot be written, as on a full disk, what goes to standard output is not lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            return len(data)


def _terminate(number: int, frame: Any) -> None:
    """End as after Ctrl-C: what runs on the hosts first."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _status(value: Any) -> int:
    return value if isinstance(value, int) else 0
