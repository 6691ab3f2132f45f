"""Detached work on hosts, for the commands about it: which hosts are asked, and what is done there.

What there is, the hosts tell. A record here only says which hosts to ask, and keeps a name from being used twice; from
another machine, which has none, all hosts of the ssh configuration are asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from lazycluster.background import state as records
from lazycluster.core import event_loop
from lazycluster.core.suggestions import suggestion
from lazycluster.exceptions import AgentError, LazyclusterError
from lazycluster.ssh.config_hosts import CONFIG_VARIABLE, configured_hosts
from lazycluster.tasks.detached import (
    DetachedCommand,
    DetachedState,
    DetachedTask,
    detached_states,
    start_command,
    start_problem,
)
from lazycluster.utils import absolute, expanded

from .console import FAILED, UNREACHABLE, errors, lines_of
from .fanout import FANOUT, HostOutcome, everywhere, exit_status
from .options import ALL, Targets, fold, targets

if TYPE_CHECKING:
    from lazycluster.background.state import Claim, Named, NamedRecord
    from lazycluster.ssh.connection import Connection

__all__ = [
    "Work",
    "cluster_named",
    "follow",
    "forget",
    "hosts_of",
    "hosts_of_all",
    "is_asked_as_started",
    "new_name",
    "recorded_names",
    "removed_from",
    "running_on",
    "show_damaged",
    "show_problems",
    "start",
    "states_on",
    "wait_for",
    "work_named",
]

_logger = logging.getLogger("lazycluster")

_TAKEN = "taken"
_FIRST_LOOK, _LONGEST_LOOK = 0.1, 1.0  # seconds between two looks at a log that is followed
_LONGEST_BASE = 32  # characters of a name that is made of that of a program
_CLOSE = 3  # names that are proposed in place of one that is not known


# --- which hosts -----------------------------------------------------------------------------------
def recorded_names() -> list[str]:
    """Return the names of the work that was started on this machine."""
    return [record.name for record in _recorded()]


def _recorded(kind: str = "work") -> list[NamedRecord]:
    try:
        found = [named.record for named in records.all_named()]
    except OSError:
        return []
    return [record for record in found if record is not None and record.kind == kind]


def _record_of(name: str) -> NamedRecord | None:
    return next((record for record in _recorded() if record.name == name), None)


@dataclass(frozen=True)
class _Login:
    """Settings that say, beside a host's name, where and as whom work was started there.

    Attributes:
        config: The ssh configuration, in place of the user's.
        user: The account, where the name says none.
    """

    config: str | None
    user: str | None

    @classmethod
    def of_targets(cls, chosen: Targets) -> _Login:
        config = chosen.settings.get("config_file") or os.environ.get(CONFIG_VARIABLE) or None
        if config is not None and config != "none":
            config = str(absolute(expanded(config)))
        return cls(config, chosen.settings.get("user") or chosen.default_user)

    @classmethod
    def of_record(cls, record: NamedRecord) -> _Login:
        config, user = (record.details.get(key) for key in ("config", "user"))
        return cls(config if isinstance(config, str) else None, user if isinstance(user, str) else None)

    def __str__(self) -> str:
        with_config = f" with the ssh configuration {self.config}" if self.config is not None else ""
        return (f" as {self.user}" if self.user is not None else "") + with_config

    def targets(self, options: dict[str, Any], hosts: Iterable[str] = ()) -> Targets:
        """Return hosts that are reached so, unless the options of a command say another way.

        Args:
            options: Those about hosts and connections.
            hosts: In place of those that the options name.
        """
        named = {"hosts": tuple(hosts)} if hosts else {}
        config = self.config if options["config"] is None else options["config"]
        return replace(targets(**{**options, **named, "config": config}, default=ALL), default_user=self.user)


def _damaged() -> dict[str, str]:
    try:
        return {named.name: named.problem for named in records.all_named() if named.problem}
    except OSError:
        return {}


def _problem_of(name: str) -> str:
    return _damaged().get(name, "")


def show_damaged() -> None:
    """Print what is damaged of the records of work and clusters to standard error."""
    for name, problem in _damaged().items():
        errors().print("\n".join(lines_of(f"{name}: {problem}")), markup=False, soft_wrap=True)


def _hosts_in(record: NamedRecord) -> list[str]:
    hosts = record.details.get("hosts")
    return [host for host in hosts if isinstance(host, str)] if isinstance(hosts, list) else []


def hosts_of(name: str, options: dict[str, Any]) -> Targets:
    """Return the hosts to ask for work.

    Args:
        name: Its name.
        options: Those of the command about hosts and connections. Hosts that they name come first, then those on which
            the work was started from here, then all of the ssh configuration. So do configuration and account.

    Raises:
        LazyclusterError: If it is a cluster that has the name, or there is no host to ask.
        click.UsageError: See `targets`.
    """
    record = _record_of(name)
    named = options["hosts"] or options["hostfile"] is not None
    if record is None:
        if not named:
            if problem := _problem_of(name):
                raise LazyclusterError(problem)
            _check_name(name, options["config"])
        return targets(**options, default=ALL)
    return _Login.of_record(record).targets(options, () if named else _hosts_in(record))


def hosts_of_all(options: dict[str, Any]) -> list[Targets]:
    """Return the hosts to ask for all work: one group for each way in which it was started.

    Args:
        options: Those of the command about hosts and connections, see `hosts_of`.

    Raises:
        click.UsageError: See `targets`.
    """
    hosts: dict[_Login, dict[str, None]] = {}
    if not options["hosts"] and options["hostfile"] is None:
        for record in _recorded():
            hosts.setdefault(_Login.of_record(record), {}).update(dict.fromkeys(_hosts_in(record)))
    groups, problem = [], None
    for login, names in hosts.items():
        try:
            groups.append(login.targets(options, names))
        except click.UsageError as error:  # e.g. all of this group are excluded
            problem = error
    if problem is not None and not groups:
        raise problem
    return groups or [targets(**options, default=ALL)]


def _check_name(name: str, config: str | None) -> None:
    """Refuse the name of a cluster, and one that is not known here while there is no host to ask."""
    if cluster_named(name) is not None:
        raise LazyclusterError(
            f"{name!r} is a cluster in the background, not detached work\n"
            f"  Next step: lazycluster info {name} shows it, lazycluster down {name} ends it"
        )
    if not any(not host.skipped for host in configured_hosts(config)):
        raise LazyclusterError(
            f"no work {name!r} was started here, and the ssh configuration has no hosts to ask{_nearest(name)}\n"
            "  Next step: name its hosts with -w"
        )


def _nearest(name: str, others: Iterable[str] = ()) -> str:
    """Return what may be meant by a name that is not known."""
    names = {record.name for kind in ("work", "cluster") for record in _recorded(kind)}
    return suggestion(name, sorted(names.union(others) - {name}), listed=False, most=_CLOSE)


def cluster_named(name: str) -> Named | None:
    """Return the cluster in the background that has a name; None if none has, e.g. since it is that of work."""
    try:
        found = records.find(name)
    except ValueError:  # it cannot be the name of one
        return None
    if found is None or (found.record is None and not found.is_held):
        return None
    return None if found.record is not None and found.record.kind == "work" else found


def forget(name: str) -> None:
    """Remove the record that this machine has of work.

    Raises:
        LazyclusterError: If it has none.
    """
    found = records.find(name) if _record_of(name) is not None or _problem_of(name) else None
    if found is None:
        raise LazyclusterError(f"this machine has no record of work {name!r}{_nearest(name)}")
    found.remove()


def is_asked_as_started(name: str, chosen: Targets) -> bool:
    """Return whether work was started from here with the configuration and the account with which hosts are asked."""
    record = _record_of(name)
    return record is not None and _Login.of_record(record) == _Login.of_targets(chosen)


def removed_from(name: str, hosts: Iterable[str]) -> None:
    """Take note that work was removed from hosts; when none is left, its name is free on this machine."""
    record, found = _record_of(name), records.find(name) if _record_of(name) is not None else None
    if record is None or found is None:
        return
    left = [host for host in record.details.get("hosts") or () if host not in set(hosts)]
    if left:
        found.write(details={**record.details, "hosts": left})
    else:
        found.remove()


# --- what is there ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """Work on a host, and a connection to it.

    Attributes:
        task: The task there.
        state: Its state.
    """

    task: DetachedTask
    state: DetachedState


def states_on(*groups: Targets) -> tuple[list[DetachedState], list[HostOutcome]]:
    """Return the work of hosts, by name and in the order of the hosts; and what became of asking each."""
    found: dict[str, dict[str, DetachedState]] = {}  # two groups may lead to one account

    async def ask(connection: Connection) -> HostOutcome:
        states = await detached_states(connection)
        found.setdefault(connection.host, {}).update((state.id, state) for _, state in states)
        return HostOutcome(connection.host)

    async def ask_all() -> list[list[HostOutcome]]:
        return await event_loop.together([asyncio.ensure_future(everywhere(chosen, ask)) for chosen in groups])

    answers = [outcome for outcomes in event_loop.run(ask_all()) for outcome in outcomes]
    outcomes = list({(outcome.host, outcome.error): outcome for outcome in answers}.values())
    hosts = dict.fromkeys(host for chosen in groups for host in chosen.names)
    states = [state for host in hosts for state in found.get(host, {}).values()]
    order = {name: number for number, name in enumerate(dict.fromkeys(state.name for state in states))}
    return sorted(states, key=lambda state: order[state.name]), outcomes


Act = Callable[["Connection", Work], Awaitable[HostOutcome]]


class Finder:
    """Finds work by its name on hosts, and does something with it.

    Args:
        name: Its name, or its id on a host.
        chosen: The hosts.
        act: What to do with it on each host that has it.
        absent_is_good: Whether all is well with a host on which it was, and is no more.

    Attributes:
        others: Names of other work that was seen.
        found: The hosts that have it.
    """

    def __init__(self, name: str, chosen: Targets, act: Act, absent_is_good: bool = False) -> None:
        self._name, self._chosen, self._act, self._absent_is_good = name, chosen, act, absent_is_good
        self._record = _record_of(name)
        self._known_on = _hosts_in(self._record) if is_asked_as_started(name, chosen) and self._record else []
        self.others: set[str] = set()
        self.found: list[str] = []

    async def on_host(self, connection: Connection) -> HostOutcome:
        """Do it on one host."""
        there = [Work(task, state) for task, state in await detached_states(connection)]
        mine = [one for one in there if self._name in (one.state.name, one.state.id)]
        self.others |= {one.state.name for one in there}
        if not mine:
            return HostOutcome(connection.host, kind="absent")
        self.found.append(connection.host)
        if len(mine) > 1:
            ids = ", ".join(f"{one.state.id} ({one.state.state})" for one in mine)
            text = f"there are {len(mine)} of that name\n  Next step: name one by its id: {ids}"
            return HostOutcome(connection.host, FAILED, text, "error")
        return await self._act(connection, mine[0])

    def settle(self, outcomes: Sequence[HostOutcome]) -> list[HostOutcome]:
        """Return the outcomes that count: of hosts that have it, were to have it, or could not be asked.

        Raises:
            LazyclusterError: If no host has it.
        """
        lost = [outcome for outcome in outcomes if outcome.kind == "unreachable" and not self._chosen.everyone]
        failed = [outcome for outcome in outcomes if outcome.kind == "error"]
        gone = [outcome for outcome in outcomes if outcome.kind == "absent" and outcome.host in self._known_on]
        if not (self.found or lost or failed or (self._absent_is_good and gone)):
            raise LazyclusterError(self._unknown(outcomes))
        counted = [self._of_absent(outcome) for outcome in outcomes if outcome.kind != "absent" or outcome in gone]
        return [one for one in counted if not (one.kind == "unreachable" and self._chosen.everyone)]

    def _of_absent(self, outcome: HostOutcome) -> HostOutcome:
        if outcome.kind != "absent":
            return outcome
        if self._absent_is_good:
            return HostOutcome(outcome.host)
        text = f"there is no work {self._name!r} any more: it was removed, or its directory was"
        return HostOutcome(outcome.host, FAILED, text, "error")

    def _unknown(self, outcomes: Sequence[HostOutcome]) -> str:
        hint = _nearest(self._name, self.others)
        asked = fold(outcome.host for outcome in outcomes if outcome.kind != "unreachable") or "no host"
        missed = fold(outcome.host for outcome in outcomes if outcome.kind == "unreachable")
        silent = f"; not reached: {missed}" if missed else ""
        step = "lazycluster ps -w HOSTS shows what there is"
        if self._record is not None:
            step = f"lazycluster rm --forget {self._name} frees the name"
            if not {outcome.host for outcome in outcomes} & set(self._known_on):
                where = f"on {fold(_hosts_in(self._record))}{_Login.of_record(self._record)}"
                step = f"leave out what names others, since it was started {where}; or {step}"
        return f"there is no work {self._name!r} on {asked}{hint}{silent}\n  Next step: {step}"


def work_named(
    name: str,
    chosen: Targets,
    act: Act,
    *,
    during: Callable[[Any], list[HostOutcome]] = event_loop.run,
    on_done: Callable[[HostOutcome], Any] = lambda outcome: None,
    absent_is_good: bool = False,
) -> list[HostOutcome]:
    """Do something with work on all hosts that have it.

    Args:
        name: Its name, or its id on a host.
        chosen: The hosts.
        act: What to do on one.
        during: Runs the coroutine.
        on_done: Called with the outcome of a host as soon as it is there.
        absent_is_good: Whether all is well with a host on which it was, and is no more.

    Returns:
        The outcomes of the hosts that count, in their order.

    Raises:
        LazyclusterError: If none has it.
    """
    finder = Finder(name, chosen, act, absent_is_good)
    return finder.settle(during(everywhere(chosen, finder.on_host, on_done=on_done)))


def running_on(name: str, chosen: Targets) -> str:
    """Return the hosts on which work runs, as a set; "" if there are none."""
    states, _ = states_on(chosen)
    return fold(state.host for state in states if name in (state.name, state.id) and state.state == "running")


def show_problems(outcomes: Iterable[HostOutcome], everyone: bool = False) -> None:
    """Print what has gone wrong on hosts to standard error."""
    for outcome in outcomes:
        if outcome.error and not (everyone and outcome.kind == "unreachable"):
            text = "\n".join(lines_of(f"{outcome.host}: {outcome.error}"))
            errors().print(text, markup=False, soft_wrap=True)


# --- its start -------------------------------------------------------------------------------------
def start(chosen: Targets, command: DetachedCommand, fanout: int = FANOUT) -> tuple[list[HostOutcome], int]:
    """Start a command on hosts, where it goes on by itself.

    Args:
        chosen: The hosts.
        command: The command; the name of work that is not removed yet is refused.
        fanout: On how many hosts at once.

    Returns:
        The outcomes, and the exit status. Where one host has work of that name already, it runs nowhere.

    Raises:
        LazyclusterError: If the name is taken on this machine.
        ValueError: If it cannot be a name.
    """
    held = _claimed(chosen, command.name)

    async def begin(connection: Connection) -> HostOutcome:
        try:
            await start_command(connection, command)
        except AgentError as error:
            if error.evidence.get("errno") == errno.EEXIST:
                text = f"there is work {command.name!r} already\n  Next step: {_instead(command.name, connection.host)}"
                return HostOutcome(connection.host, FAILED, text, _TAKEN)
            return HostOutcome(connection.host, FAILED, start_problem(error), "error")
        return HostOutcome(connection.host)

    outcomes = event_loop.run(everywhere(chosen, begin, fanout))
    begun = [outcome.host for outcome in outcomes if outcome.kind == "done"]
    if begun and any(outcome.kind == _TAKEN for outcome in outcomes):
        outcomes = _undone(chosen, command.name, begun, outcomes)
        begun = []
    if held is not None:
        if begun:
            with contextlib.suppress(OSError):  # the disk is full by now: all hosts are recorded then, which does
                held.write(state="running", details={**held.record.details, "hosts": begun})
            held.close()
        else:
            held.remove()
    return outcomes, exit_status(outcomes, chosen.everyone) if begun else _worst(outcomes)


def _worst(outcomes: Sequence[HostOutcome]) -> int:
    return UNREACHABLE if any(outcome.kind == "unreachable" for outcome in outcomes) else FAILED


def _claimed(chosen: Targets, name: str) -> Claim | None:
    """Take a name on this machine; None if that cannot be written down, which is told."""
    details = {"hosts": list(chosen.names), **asdict(_Login.of_targets(chosen))}
    try:
        return records.claim(records.NamedRecord.new("work", name, **details))
    except OSError as error:
        why = error.strerror or str(error).partition("\n")[0]
        _logger.warning("where %r runs is not recorded on this machine: %s. Name its hosts with -w later", name, why)
        return None


def _undone(chosen: Targets, name: str, begun: list[str], outcomes: list[HostOutcome]) -> list[HostOutcome]:
    """End and remove what has begun, since a host has other work of that name."""

    async def undo(connection: Connection, work: Work) -> HostOutcome:
        await work.task._remove_async()
        return HostOutcome(connection.host, FAILED, "not started: another host has work of that name", "error")

    undone = {one.host: one for one in work_named(name, replace(chosen, names=begun), undo)}
    return [undone.get(outcome.host, outcome) for outcome in outcomes]


def _instead(name: str, host: str) -> str:
    return f"another name, or lazycluster rm -w {host} {name}"


def new_name(command: str) -> str:
    """Return a name for a command that the user gave none."""
    program = command.split()[0].rpartition("/")[2] if command.split() else ""
    base = re.sub(r"[^A-Za-z0-9_-]", "", program)[:_LONGEST_BASE].lstrip("0123456789_-")
    return f"{base or 'work'}-{secrets.token_hex(2)}"


async def wait_for(work: Work, timeout: float | None) -> DetachedState:
    """Wait for the end of work.

    Raises:
        TimeoutError: If it takes longer.
    """
    about = await work.task._ended(timeout)
    return DetachedState.of(work.state.host, about)


async def follow(
    work: Work, take: Callable[[bytes], Any], go_on: bool, when_read: Callable[[], Any] = lambda: None
) -> None:
    """Have the log of work read, also what is added until it ends if that is wanted.

    Args:
        work: The work.
        take: Takes its output.
        go_on: Whether to go on until it ends.
        when_read: Called whenever all that there is has been read.
    """
    offset, delay = 0, _FIRST_LOOK
    while True:
        running = go_on and (await work.task._about_heard())["state"] == "running"
        before, offset = offset, await work.task._log_from(offset, take)
        when_read()
        if not running:
            return
        delay = _FIRST_LOOK if offset > before else min(2 * delay, _LONGEST_LOOK)
        await asyncio.sleep(delay)
