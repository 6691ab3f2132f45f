"""Commands about detached work: ``ps``, ``wait``, ``cancel``, ``rm``. ``run --detach`` starts it, ``logs`` shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lazycluster.cli.options import connection_options, host_options
from lazycluster.cli.parameters import Seconds

if TYPE_CHECKING:
    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.cli.options import Targets
    from lazycluster.output.view import Cell
    from lazycluster.ssh.connection import Connection
    from lazycluster.tasks.detached import DetachedState

__all__ = ["cancel", "complete_work", "ps", "rm", "wait"]

_COMMAND_SHOWN = 60  # characters


def complete_work(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of detached work for a shell."""
    from lazycluster.cli.work import recorded_names

    return [name for name in recorded_names() if name.startswith(incomplete)]


_names = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_work)


@click.command()
@host_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@connection_options
def ps(as_json: bool, **options: Any) -> int:
    """List detached work, with its state on each host.

    The hosts are those on which you have started work from this machine; if there is none, all of the ssh
    configuration that answer. With -w, those that you name: they show all your work, from wherever it was started.

    SINCE is the time since it began, or since it ended, by the clock of the host.

    \b
    Examples:
      lazycluster ps
      lazycluster ps -w 'node[1-4]' --json

    Exit status: 0, or 255 if a host was not reached.
    """
    from lazycluster.cli.console import output, tell
    from lazycluster.cli.fanout import exit_status
    from lazycluster.cli.work import hosts_of_all, show_damaged, show_problems, states_on
    from lazycluster.output.view import Table, View, show

    groups = hosts_of_all(options)
    everyone = any(chosen.everyone for chosen in groups)
    states, outcomes = states_on(*groups)
    if as_json:
        lost = [{"host": one.host, "state": one.kind, "problem": one.error} for one in outcomes if one.kind != "done"]
        output().print_json(json.dumps([*map(asdict, states), *lost]))
    elif states:
        rows = [_row(state) for state in states]
        show(View(tables=(Table(("NAME", "HOST", "STATE", "STATUS", "SINCE", "COMMAND"), rows),)))
    elif any(outcome.kind == "done" for outcome in outcomes):
        tell("no detached work: lazycluster run --detach -w HOSTS -- COMMAND starts some")
    if not as_json:
        show_problems(outcomes, everyone)
        show_damaged()
    return exit_status(outcomes, everyone)


def _row(state: DetachedState) -> list[Cell | str]:
    from lazycluster.cli.times import span
    from lazycluster.exceptions import one_line
    from lazycluster.output.view import Cell

    tones: dict[str, Any] = {"running": "good", "done": "", "cancelled": "dim"}
    text = "lost: the host was restarted" if state.restarted else state.state
    seconds = state.age if state.state == "running" else state.ended_ago
    command = one_line(state.command)
    return [
        one_line(state.name),
        state.host,
        Cell(text, tones.get(state.state, "bad")),
        "" if state.exit_status is None or state.state == "lost" else str(state.exit_status),
        "" if seconds is None else span(round(seconds)),
        command if len(command) <= _COMMAND_SHOWN else command[: _COMMAND_SHOWN - 3] + "...",
    ]


@click.command()
@host_options
@click.option("--timeout", type=Seconds(10**9), metavar="SECONDS", help="Wait no longer; the work goes on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@_names
@connection_options
def wait(names: tuple[str, ...], timeout: float | None, as_json: bool, **options: Any) -> int:
    """Wait until detached work has ended on all of its hosts.

    Ctrl-C ends the waiting; the work goes on.

    \b
    Examples:
      lazycluster wait train && lazycluster get -w gpu-a model.pt .
      lazycluster wait --timeout 3600 train

    Exit status: the highest of all hosts, as a shell has it: 143 where the work was cancelled, 137 where it was
    lost (killed, or the host was restarted); 124 after --timeout; 255 if a host was not reached.
    """
    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.cli.work import Work, wait_for

    states: list[DetachedState] = []

    async def act(connection: Connection, work: Work) -> HostOutcome:
        try:
            state = await wait_for(work, timeout)
        except TimeoutError:
            return HostOutcome(connection.host, 124, f"it runs on, after {timeout:g} s", "timeout")
        states.append(state)
        assert state.exit_status is not None
        return HostOutcome(connection.host, state.exit_status)

    def told(outcome: HostOutcome) -> str:
        found = next((state for state in states if state.host == outcome.host), None)
        return "" if found is None else _ended(found)

    return _on_each(names, options, act, told, as_json, waits=True)


def _ended(state: DetachedState) -> str:
    """Return how work has ended."""
    if state.restarted:
        return "lost: the host was restarted"
    if state.problem:
        return f"{state.state}: {state.problem}"
    return f"{state.state}, exit status {state.exit_status}" if state.state == "failed" else state.state


@click.command()
@host_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@_names
@connection_options
def cancel(names: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """End detached work on all of its hosts, with all processes that it has started.

    They are told to end, and after some seconds forced to. State and log stay: 'lazycluster rm' removes them.

    \b
    Examples:
      lazycluster cancel train
      lazycluster cancel -w node3 train

    Exit status: 0 if it has ended everywhere, also if it had before; 255 if a host was not reached; else 1.
    """
    from lazycluster.cli.fanout import HostOutcome
    from lazycluster.cli.work import Work

    before: dict[str, str] = {}

    async def act(connection: Connection, work: Work) -> HostOutcome:
        from lazycluster.cli.console import FAILED

        before[connection.host] = work.state.state
        try:
            await work.task._cancel()
        except TimeoutError as error:
            return HostOutcome(connection.host, FAILED, str(error), "error")
        return HostOutcome(connection.host)

    def told(outcome: HostOutcome) -> str:
        state = before.get(outcome.host, "")
        return "cancelled" if state == "running" else f"it had ended before: {state}"

    return _on_each(names, options, act, told, as_json)


@click.command()
@host_options
@click.option("--force", is_flag=True, help="Remove running work, too: it is cancelled first.")
@click.option("--forget", is_flag=True, help="Only free the name on this machine; ask no host.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@_names
@connection_options
def rm(names: tuple[str, ...], force: bool, forget: bool, as_json: bool, **options: Any) -> int:
    """Remove detached work that has ended: its state and its log, from all of its hosts.

    Work that runs is refused. Its name can be used anew once it is removed everywhere.

    \b
    Examples:
      lazycluster rm train
      lazycluster rm --force train

    Exit status: 0 if it was removed everywhere; 255 if a host was not reached; else 1.
    """
    from lazycluster.cli import work as works
    from lazycluster.cli.fanout import HostOutcome

    if forget:
        for name in names:
            works.forget(name)
        return 0
    if not force:
        _refuse_running(names, options)
    removed = set()

    async def act(connection: Connection, work: works.Work) -> HostOutcome:
        await work.task._remove_async()
        removed.add(connection.host)
        return HostOutcome(connection.host)

    def gone(name: str, chosen: Targets, outcomes: Sequence[HostOutcome]) -> None:
        removed.clear()
        _free(name, chosen, outcomes)

    def told(outcome: HostOutcome) -> str:
        return "removed" if outcome.host in removed else "it was there no more"

    return _on_each(names, options, act, told, as_json, after=gone, absent_is_good=True)


def _refuse_running(names: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse to remove anything if some of it runs."""
    from lazycluster.cli import work as works
    from lazycluster.exceptions import LazyclusterError

    for name in names:
        running = works.running_on(name, works.hosts_of(name, options))
        if running:
            raise LazyclusterError(
                f"{name!r} runs on {running}, and is not removed\n"
                f"  Next step: lazycluster cancel {name}, or wait for its end; or lazycluster rm --force {name}"
            )


def _free(name: str, chosen: Targets, outcomes: Sequence[HostOutcome]) -> None:
    """Take note of where work was removed; its name is free on this machine once that is everywhere."""
    from lazycluster.cli import work as works
    from lazycluster.cli.console import tell

    if name not in works.recorded_names():
        return
    if not works.is_asked_as_started(name, chosen):
        step = f"lazycluster rm {name}, without another account or configuration"
        tell(f"  Next step: {name!r} stays taken on this machine: {step}", err=True)
        return
    works.removed_from(name, [outcome.host for outcome in outcomes if outcome.kind == "done"])
    if any(outcome.kind == "unreachable" for outcome in outcomes):
        step = f"again when these hosts can be reached, or lazycluster rm --forget {name}"
        tell(f"  Next step: {name!r} stays taken on this machine: {step}", err=True)


def _on_each(
    names: Sequence[str],
    options: dict[str, Any],
    act: Any,
    told: Callable[[HostOutcome], str],
    as_json: bool,
    *,
    after: Callable[[str, Targets, Sequence[HostOutcome]], Any] = lambda name, chosen, outcomes: None,
    waits: bool = False,
    absent_is_good: bool = False,
) -> int:
    """Do something with work of several names, and print how that went on each host.

    Args:
        names: The names.
        options: Those about hosts.
        act: What to do on a host.
        told: Returns what is printed of a host where it went well.
        as_json: Whether to print one document, at the end.
        after: Called when all hosts of a name are done.
        waits: Whether it takes long: each host is told of at once, and Ctrl-C ends the waiting only.
        absent_is_good: Whether all is well with a host on which the work was, and is no more.

    Returns:
        The exit status.
    """
    from lazycluster.cli.console import INTERRUPTED, errors, output, tell
    from lazycluster.cli.fanout import exit_status
    from lazycluster.cli.work import hosts_of, show_problems, work_named

    statuses, document = [], []

    def say(outcome: HostOutcome) -> None:
        if outcome.kind == "done" and not as_json:
            tell(f"{label}{outcome.host}: {told(outcome)}")

    for name in names:
        label = f"{name} on " if len(names) > 1 else ""
        at_once = say if waits else lambda outcome: None
        try:
            chosen = hosts_of(name, options)
            outcomes = work_named(name, chosen, act, on_done=at_once, absent_is_good=absent_is_good)
        except KeyboardInterrupt:
            if not waits:
                raise
            errors().print(f"\rInterrupted; {name!r} goes on: lazycluster wait {name}", markup=False)
            return INTERRUPTED
        for outcome in outcomes:
            state = outcome.kind if outcome.error else told(outcome)
            document.append({"name": name, "host": outcome.host, "status": outcome.status, "state": state})
            document[-1]["error"] = outcome.error or None
            if not waits:
                say(outcome)
        if not as_json:
            show_problems(outcomes)
        after(name, chosen, outcomes)
        statuses.append(exit_status(outcomes) if outcomes else 0)
    if as_json:
        output().print_json(json.dumps(document))
    return max(statuses, default=0)
