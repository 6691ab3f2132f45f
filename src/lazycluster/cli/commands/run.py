"""``lazycluster run``: a command on many hosts at once."""

from __future__ import annotations

import secrets
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.console import tell
from lazycluster.cli.options import connection_options, fanout_option, host_options, targets
from lazycluster.cli.parameters import File, Seconds

if TYPE_CHECKING:
    import asyncio

    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.cli.options import Targets
    from lazycluster.cli.streams import Printer, SharedInput
    from lazycluster.ssh.channel import Channel
    from lazycluster.ssh.connection import Connection
    from lazycluster.tasks.detached import DetachedCommand

__all__ = ["run"]

# What to do when a shell says that it cannot run a line, by its exit status.
_STEPS = {
    126: "check that the file is a program for this system, and that it may be executed there (chmod +x)",
    127: "check the name; install the program there, or give its full path",
}
_END_LIMIT = 20.0  # seconds for a command to end that took too long


@click.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
@host_options
@click.option("--cwd", metavar="DIR", help="The directory on the hosts (the home directory).")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="An environment variable for the command.")
@click.option("--timeout", type=Seconds(10**9), metavar="SECONDS", help="End the command on a host after this time.")
@fanout_option
@click.option("--stdin", "use_stdin", is_flag=True, help="Pass standard input to the command on every host.")
@click.option(
    "--python",
    "script",
    type=File(),
    metavar="SCRIPT",
    help="Run this local script; its arguments come after --.",
)
@click.option("--interpreter", default="python3", metavar="PYTHON", help="The Python for --python (python3).")
@click.option(
    "--startup-files",
    type=click.Choice(["once", "always"]),
    default="once",
    metavar="WHEN",
    help="Read .bashrc etc. once or always (once).",
)
@click.option("--gather", is_flag=True, help="Print output at the end, identical output once.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@click.option("-d", "--detach", is_flag=True, help="Let it go on by itself: see 'lazycluster ps'.")
@click.option("--name", metavar="NAME", help="The name of what is detached, unique on its hosts.")
@click.option("-N", "--no-label", is_flag=True, help="Print lines without the host's name.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@connection_options
def run(
    hosts: tuple[str, ...], exclude_hosts: tuple[str, ...], hostfile: Any, config: str | None,
    connect_timeout: float | None, accept_new_host_key: bool, cwd: str | None, env: tuple[str, ...],
    timeout: float | None, fanout: int, use_stdin: bool, script: str | None, interpreter: str, startup_files: str,
    gather: bool, as_json: bool, detach: bool, name: str | None, no_label: bool, command: tuple[str, ...],
) -> int:  # fmt: skip
    """Run a command on many hosts at once.

    COMMAND is one quoted line for the hosts' shell, as in -- 'ls | wc -l', or a program and its arguments, which are
    passed on unchanged. Lines appear as they are printed, each after the name of its host.

    \b
    Examples:
      lazycluster run -w 'node[1-4]' -- uptime
      lazycluster run -w @all --gather -- 'cat /etc/os-release | head -1'
      lazycluster run -w gpu-a --env EPOCHS=3 --python train.py -- --fast
      tar c data | lazycluster run -w 'node[1-4]' --stdin -- tar x -C /tmp
      lazycluster run -w gpu-a --detach --name train -- ./train.sh

    With --detach it goes on when this machine is off, or you log out; its name is printed. See 'lazycluster ps',
    'logs', 'wait', 'cancel', 'rm'. Its log keeps the first and the last 16 MiB of what it prints.

    Exit status: the highest of all hosts; 255 if one was not reached, 124 after --timeout, 130 after Ctrl-C.
    """
    from lazycluster.cli.fanout import everywhere, exit_status
    from lazycluster.cli.streams import SharedInput, printer

    if not command and script is None:
        raise click.UsageError("no command given: lazycluster run -w HOSTS -- COMMAND")
    if use_stdin and ("-" in (*hosts, *exclude_hosts) or (hostfile is not None and hostfile.is_standard_input)):
        raise click.UsageError("standard input cannot hold both the hosts and the command's input")
    _check_detached(detach, name, use_stdin or gather or no_label)
    chosen = targets(hosts, exclude_hosts, hostfile, config, connect_timeout, accept_new_host_key)
    if detach:
        from lazycluster.tasks.detached import DetachedCommand

        how = DetachedCommand(name or "", cwd=cwd, env=_variables(env), startup_files=startup_files, time_limit=timeout)
        return _detach(chosen, _with_program(how, script, interpreter, command), fanout, as_json)
    # By "task", the live view counts it.
    request: dict[str, Any] = {
        "task": secrets.token_hex(8),
        "env": _variables(env),
        "cwd": cwd,
        "startup_files": startup_files,
        "input": use_stdin,
        "merge": gather and not as_json,
        "tell_left": True,
    }
    if script is None:
        request.update({"command": command[0]} if len(command) == 1 else {"argv": list(command)})
    out = printer("json" if as_json else "gather" if gather else "lines", chosen.names, not no_label)

    job = _Job(request, out, timeout, script, interpreter, command)

    async def work() -> list[HostOutcome]:
        source = job.source = SharedInput() if use_stdin else None
        try:
            return await everywhere(chosen, job.on_host, fanout, out.done)
        finally:
            if source is not None:
                source.close()

    outcomes = out.during(work())
    out.finish(outcomes)
    job.tell_next_steps(outcomes)
    if chosen.everyone and all(outcome.kind == "unreachable" for outcome in outcomes):
        tell("No host was reached.", err=True)
    return exit_status(outcomes, chosen.everyone)


def _check_detached(detach: bool, name: str | None, has_streams: bool) -> None:
    """Refuse options that make no sense with --detach, or without."""
    from lazycluster.background.state import checked_name

    if name is not None and not detach:
        raise click.UsageError("--name is for what is detached: give --detach, too")
    if detach and has_streams:
        raise click.UsageError("--stdin, --gather and --no-label cannot be used with --detach")
    if name is not None:
        try:
            checked_name(name)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--name") from None


def _with_program(
    command: DetachedCommand, script: str | None, interpreter: str, words: tuple[str, ...]
) -> DetachedCommand:
    """Return a command with what it runs, and with a name."""
    from lazycluster.cli.work import new_name

    program: dict[str, Any]
    if script is not None:
        label = shlex.join([interpreter, script, *words])
        program = {"argv": (interpreter, *words), "script": Path(script).read_bytes(), "label": label}
        words = (Path(script).stem,)
    elif len(words) == 1:
        program = {"line": words[0], "label": words[0]}
    else:
        program = {"argv": words, "label": shlex.join(words)}
    return replace(command, name=command.name or new_name(words[0]), **program)


def _detach(chosen: Targets, command: DetachedCommand, fanout: int, as_json: bool) -> int:
    """Start a command that goes on by itself; print its name, which is all that a script needs."""
    import json

    from lazycluster.cli.console import INTERRUPTED, errors, output
    from lazycluster.cli.options import fold
    from lazycluster.cli.work import show_problems, start

    try:
        outcomes, status = start(chosen, command, fanout)
    except KeyboardInterrupt:
        text = f"\rInterrupted; {command.name!r} may have started on some hosts: lazycluster ps, lazycluster cancel"
        errors().print(text, markup=False)
        return INTERRUPTED
    begun = [outcome.host for outcome in outcomes if outcome.kind == "done"]
    if as_json:
        hosts = [{"host": one.host, "state": one.kind, "error": one.error or None} for one in outcomes]
        output().print_json(json.dumps({"name": command.name, "hosts": hosts}))
        return status
    show_problems(outcomes, chosen.everyone and bool(begun))
    if begun:
        tell(command.name)
        tell(f"started on {fold(begun)}; its output: lazycluster logs -f {command.name}", err=True)
    return status


def _variables(pairs: tuple[str, ...]) -> dict[str, str]:
    variables = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--env")
        variables[name] = value
    return variables


class _Job:
    """The command, on one host after another or at once."""

    def __init__(
        self, request: dict[str, Any], out: Printer, timeout: float | None, script: str | None, interpreter: str,
        arguments: tuple[str, ...],
    ) -> None:  # fmt: skip
        self._request, self._out, self._timeout = request, out, timeout
        self._script, self._interpreter, self._arguments = script, interpreter, arguments
        self.source: SharedInput | None = None
        self._left: dict[str, list[str]] = {}

    async def on_host(self, connection: Connection) -> HostOutcome:
        import asyncio

        from lazycluster.cli.fanout import HostOutcome
        from lazycluster.exceptions import AgentError

        host = connection.host
        request = dict(self._request)
        if self._script is not None:
            request["argv"] = [self._interpreter, await self._send_script(connection), *self._arguments]
        channel = connection.channel(
            "run",
            request,
            stdout=lambda data: self._out.output(host, data),
            stderr=lambda data: self._out.errors(host, data),
        )
        feeding: asyncio.Future[None] | None = None
        if self.source is not None:
            feeding = asyncio.ensure_future(self.source.feed(channel))
            feeding.add_done_callback(lambda fed: self._fed(fed, channel))
        late = False
        try:
            result = asyncio.ensure_future(channel.result())
            with self._out.reading(connection):
                done, _ = await asyncio.wait([result], timeout=self._timeout)
                if not done:
                    late = True
                    channel.control(signal="END")
                    if not await connection.wait_while_heard(result, _END_LIMIT):
                        text = f"told to end after {self._timeout:g} s, and silent since then"
                        return HostOutcome(host, 124, text, "timeout")
                ended = await result
        except AgentError as error:
            return HostOutcome(host, 127 if error.kind == "os" else 1, self._told(error.message), "error")
        finally:
            if feeding is not None:
                feeding.cancel()
            channel.close()
        if late:
            return HostOutcome(host, 124, f"ended after {self._timeout:g} s", "timeout")
        return self._ended(host, ended)

    def _ended(self, host: str, ended: dict[str, Any]) -> HostOutcome:
        from lazycluster.cli.fanout import HostOutcome

        if self.source is not None and self.source.error is not None:
            return HostOutcome(host, 1, f"cannot pass on standard input: {self.source.error}", "error")
        if ended.get("left"):
            self._left[host] = ended["left"]
        return HostOutcome(host, 128 + ended["signal"] if ended.get("signal") else int(ended.get("exit") or 0))

    def tell_next_steps(self, outcomes: list[HostOutcome]) -> None:
        """Say once, for all hosts, what else there is to know about how the command has ended."""
        from lazycluster.cli.options import fold

        alike: dict[str, list[str]] = {}
        for outcome in outcomes:
            if left := self._left.get(outcome.host):
                alike.setdefault("; ".join(left), []).append(outcome.host)
        for what, hosts in alike.items():
            tell(f"{fold(hosts)}: what the command had left running was ended: {what}", err=True)
        if alike:
            tell("  Next step: start what is to go on after the command with 'lazycluster run --detach'", err=True)
        is_line = self._script is None and len(self._arguments) == 1
        for status, step in _STEPS.items() if is_line else ():
            if any(outcome.kind == "done" and outcome.status == status for outcome in outcomes):
                tell(f"  Next step after exit status {status}: {step}", err=True)

    def _told(self, message: str) -> str:
        if self._script is None and "not found on the PATH" in message and len(self._arguments) > 1:
            line = shlex.quote(" ".join(self._arguments))
            return f"{message}\n  Next step: check the name; if the shell has it, give the line as one word: -- {line}"
        return message

    def _fed(self, fed: asyncio.Future[None], channel: Channel) -> None:
        if fed.cancelled() or fed.exception() is None:
            return
        if self.source is not None and self.source.error is not None:  # else it is the command that takes no more
            channel.control(signal="END")

    async def _send_script(self, connection: Connection) -> str:
        from lazycluster.ssh import transfer

        folder = str((await connection.request("mkdtemp"))["path"])
        assert self._script is not None
        sent = await transfer.send(connection, self._script, folder + "/", cwd=folder, env={})
        return sent.path
