"""Members of a group: connecting hosts at once, asking all, and the runtimes by host."""

from __future__ import annotations

import asyncio
import logging
import textwrap
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias, TypeVar

from lazycluster.core import event_loop
from lazycluster.core.suggestions import suggestion
from lazycluster.core.words import counted
from lazycluster.exceptions import (
    EnvironmentBuildError,
    EnvironmentsBuildError,
    InvalidRuntimeError,
    InvalidRuntimesError,
    LazyclusterError,
    NoRuntimesError,
)
from lazycluster.output import progress
from lazycluster.runtime.session import HostSession, HostSpec
from lazycluster.runtimes import Runtime
from lazycluster.ssh.ssh_connection import client_version

from .settings import GroupSettings, listed

__all__ = [
    "Connected",
    "Members",
    "ask_all",
    "clean_up_all",
    "close_all",
    "connect",
    "connect_all",
    "connect_specs",
    "prepare_all",
    "warn_of_aliases",
]

_logger = logging.getLogger("lazycluster")

T = TypeVar("T")

Connected: TypeAlias = HostSession | InvalidRuntimeError


async def connect_all(specs: Sequence[HostSpec]) -> list[Connected]:
    """Connect hosts, all at once.

    If it is cancelled, all connections are closed.

    Args:
        specs: The hosts.

    Returns:
        For each host the session, or why there is none.

    Raises:
        InvalidRuntimeError: If this machine has no ssh client.
    """
    if not all(spec.local for spec in specs):
        await client_version()
    tasks = [asyncio.ensure_future(HostSession.open(spec)) for spec in specs]
    waiting = {task: spec.host for task, spec in zip(tasks, specs, strict=True)}
    try:
        left = lambda: [host for task, host in waiting.items() if not task.done()]  # noqa: E731
        with progress.Progress("Connecting", len(specs), "hosts", left) as shown:
            for task in tasks:
                task.add_done_callback(lambda _: shown.advance())
            await asyncio.wait(tasks) if tasks else None
    except BaseException:
        for task in tasks:
            task.cancel()
        settled = await asyncio.gather(*tasks, return_exceptions=True)
        await close_all([item for item in settled if isinstance(item, HostSession)])
        raise
    return [_outcome(task, spec.host) for task, spec in zip(tasks, specs, strict=True)]


def _outcome(task: asyncio.Task[HostSession], host: str) -> Connected:
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, InvalidRuntimeError):
        return error
    if isinstance(error, LazyclusterError):
        return InvalidRuntimeError(host, "lost", str(error))
    if isinstance(error, OSError):
        return InvalidRuntimeError(host, "ssh", str(error))
    raise error


async def close_all(sessions: Sequence[HostSession]) -> None:
    """Close sessions, all at once."""
    await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)


def connect(hosts: Sequence[str], settings: GroupSettings, on_unreachable: str) -> tuple[list[Runtime], dict[str, str]]:
    """Connect hosts, all at once.

    Args:
        hosts: The hosts.
        settings: Their settings.
        on_unreachable: ``raise``, or ``skip`` to go on with the others.

    Returns:
        The runtimes in the order of the hosts, and why others were skipped.

    Raises:
        InvalidRuntimeError: If a host cannot be used and is not to be skipped.
        NoRuntimesError: If all were skipped.
    """
    with progress.shown(settings.progress):
        return connect_specs(settings.specs(hosts), on_unreachable)


def connect_specs(specs: Sequence[HostSpec], on_unreachable: str) -> tuple[list[Runtime], dict[str, str]]:
    """Connect hosts, all at once; see `connect`."""
    connected = event_loop.run(connect_all(specs))
    failed = {spec.host: item for spec, item in zip(specs, connected, strict=True) if not isinstance(item, HostSession)}
    if failed and on_unreachable == "raise":
        _close(connected)
        errors = list(failed.values())
        raise errors[0] if len(errors) == 1 else InvalidRuntimesError(errors)
    sessions = [item for item in connected if isinstance(item, HostSession)]
    if not sessions:
        reasons = textwrap.indent("\n".join(map(str, failed.values())), "  ")
        raise NoRuntimesError(f"of {counted(len(specs), 'host')}, none can be used:\n{reasons}")
    for error in failed.values():
        _logger.warning("skipped: %s", error)
    return [Runtime._from_session(session) for session in sessions], {h: str(e) for h, e in failed.items()}


def checked_hosts(hosts: Iterable[str]) -> list[str]:
    """Return hosts as a list.

    Raises:
        TypeError, ValueError: If there is none, or one twice.
    """
    if isinstance(hosts, str):
        raise TypeError(f"hosts must be a list, e.g. [{hosts!r}]")
    names = list(hosts)
    if not names:
        raise ValueError("a group needs at least one host")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the host {name!r} is given twice")
    return names


def _close(connected: Iterable[Connected]) -> None:
    event_loop.run(close_all([item for item in connected if not isinstance(item, InvalidRuntimeError)]))


async def prepare_all(runtimes: Sequence[Runtime], refresh: bool = False) -> None:
    """Make the Python environments of some runtimes, all at once.

    Raises:
        EnvironmentBuildError: If one cannot be made; if there are several, it holds all of their errors.
    """
    made = await asyncio.gather(*(runtime._prepare_async(refresh) for runtime in runtimes), return_exceptions=True)
    errors = [error for error in made if isinstance(error, BaseException)]
    builds = [error for error in errors if isinstance(error, EnvironmentBuildError)]
    if len(builds) == len(errors) > 1:
        raise EnvironmentsBuildError(builds)
    if errors:
        raise errors[0]


async def clean_up_all(runtimes: Iterable[Runtime]) -> None:
    """Clean up some runtimes, all at once.

    Raises:
        Exception: What the first that failed has raised, after all have ended.
    """
    results = await asyncio.gather(*(runtime._cleanup_async() for runtime in runtimes), return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise errors[0]


async def ask_all(runtimes: Iterable[Runtime], ask: Callable[[Runtime], Awaitable[T]], problem: str) -> dict[str, T]:
    """Ask hosts something at once, and return the answers by host.

    One that does not answer, or whose answer makes no sense, is left out, with a warning in the log.

    Args:
        runtimes: The hosts.
        ask: Asks one.
        problem: What the warning says.

    Raises:
        Exception: If there is no answer at all: why there is none of the first host.
    """
    asked = {runtime.host: ask(runtime) for runtime in runtimes}
    answers = dict(zip(asked, await asyncio.gather(*asked.values(), return_exceptions=True), strict=True))
    errors = {host: answer for host, answer in answers.items() if isinstance(answer, BaseException)}
    for error in errors.values():
        if not isinstance(error, Exception) or len(errors) == len(answers):
            raise error
    for host, error in errors.items():
        _logger.warning("%s: %s: %s", host, problem, error)
    return {host: answer for host, answer in answers.items() if not isinstance(answer, BaseException)}


def warn_of_aliases(runtimes: Iterable[Runtime]) -> None:
    """Log a warning for each runtime that is the same account on the same machine as one before."""
    first: dict[object, str] = {}
    for runtime in runtimes:
        other = first.setdefault(runtime._session.identity, runtime.host)
        if other != runtime.host:
            _logger.warning(
                "%s is the same account on the same machine as %s: its CPUs and memory count twice", runtime.host, other
            )


class Members:
    """The runtimes of a group by host, in the order in which they were added."""

    def __init__(self, runtimes: Iterable[Runtime]) -> None:
        self._runtimes: dict[str, Runtime] = {}
        for runtime in runtimes:
            self.add(runtime)

    def add(self, runtime: Runtime) -> None:
        """Add a runtime.

        Raises:
            TypeError: If it is none.
            ValueError: If its host is contained already.
        """
        if not isinstance(runtime, Runtime):
            raise TypeError(f"a group is made of Runtime objects, not of {type(runtime).__name__}")
        self.refuse_duplicate(runtime.host)
        self._runtimes[runtime.host] = runtime

    def refuse_duplicate(self, host: str) -> None:
        """Raise a ValueError if the host is contained already."""
        if host in self._runtimes:
            raise ValueError(f"{host} is contained in the group already")

    def remove(self, host: str) -> Runtime:
        """Remove a runtime and return it.

        Raises:
            ValueError: If it is not contained.
        """
        runtime = self.get(host)
        del self._runtimes[host]
        return runtime

    def get(self, host: str) -> Runtime:
        """Return a runtime.

        Raises:
            ValueError: If it is not contained.
        """
        try:
            return self._runtimes[host]
        except (KeyError, TypeError):
            raise ValueError(f"{host!r} is not in the group{suggestion(host, self.hosts)}") from None

    def __contains__(self, host: object) -> bool:
        return host in self._runtimes

    @property
    def all(self) -> list[Runtime]:
        """The runtimes."""
        return list(self._runtimes.values())

    @property
    def hosts(self) -> list[str]:
        """Their hosts."""
        return list(self._runtimes)

    def some(
        self, include_hosts: str | Iterable[str] | None = None, exclude_hosts: str | Iterable[str] | None = None
    ) -> dict[str, Runtime]:
        """Return some of the runtimes by host.

        Args:
            include_hosts: Only these.
            exclude_hosts: All but these.

        Raises:
            ValueError: If both are given, or a host is not contained.
        """
        included, excluded = listed(include_hosts), listed(exclude_hosts)
        if included and excluded:
            raise ValueError("either include_hosts or exclude_hosts can be given, not both")
        for host in (*included, *excluded):
            self.get(host)
        if included:
            return {host: self.get(host) for host in included}
        return {host: runtime for host, runtime in self._runtimes.items() if host not in excluded}

    def least_busy(self) -> Runtime:
        """Return the runtime that executes the fewest tasks; of several, the one that was given the fewest so far.

        A host that was lost executes none, and would be given all.

        Raises:
            NoRuntimesError: If there is none.
        """
        if not self._runtimes:
            raise NoRuntimesError("the group is empty: add a runtime with add_runtime()")
        usable = [runtime for runtime in self.all if runtime._connection.state == "open"]
        candidates = usable or self.all
        return min(candidates, key=lambda runtime: (runtime.alive_task_process_count, runtime.started_task_count))
