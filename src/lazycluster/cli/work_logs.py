"""Logs of detached work, from one host or many."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .console import INTERRUPTED, errors
from .fanout import HostOutcome, exit_status
from .streams import Printer, printer
from .work import Work, follow, hosts_of, show_problems, work_named

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

__all__ = ["show_logs"]

_LONGEST = 1024 * 1024  # bytes of which the last lines are looked for


def show_logs(name: str, go_on: bool, last: int | None, label: bool, options: dict[str, Any]) -> int:
    """Print the logs of work, those of several hosts one after another, or as they come if they are followed.

    Args:
        name: The name of the work.
        go_on: Whether to go on until it ends.
        last: How many lines of what there is already; None: all.
        label: Whether lines have the names of their hosts, if there are several.
        options: Those of the command about hosts and connections.

    Returns:
        The exit status.
    """
    chosen = hosts_of(name, options)
    several = len(chosen.names) > 1
    out = printer("lines", chosen.names, label) if several else _Unchanged()
    turns = _Turns(chosen.names) if several and not go_on else None

    async def act(connection: Connection, work: Work) -> HostOutcome:
        if turns is not None:
            await turns.wait_for(connection.host)
        put = lambda data: out.output(connection.host, data)  # noqa: E731
        lines = _LastLines(last, put) if last is not None else None
        with out.reading(connection):
            await follow(work, lines.take if lines else put, go_on, lines.release if lines else lambda: None)
        outcome = HostOutcome(connection.host)
        out.done(outcome)
        return outcome

    def done(outcome: HostOutcome) -> None:
        if turns is not None:
            turns.is_over(outcome.host)

    try:
        outcomes = work_named(name, chosen, act, during=out.during, on_done=done)
    except KeyboardInterrupt:
        errors().print(f"\rInterrupted; {name!r} goes on: lazycluster logs -f {name}", markup=False)
        return INTERRUPTED
    show_problems(outcomes)
    return exit_status(outcomes)


class _Unchanged(Printer):
    """The log of the only host, byte by byte."""

    def output(self, host: str, data: bytes) -> None:
        self.put(sys.stdout, data)

    def errors(self, host: str, data: bytes) -> None:
        self.put(sys.stderr, data)

    def done(self, outcome: HostOutcome) -> None:
        """All is printed already."""


class _Turns:
    """An order of hosts in which each waits for those before it."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._over: dict[str, asyncio.Event] = {}

    def _event(self, name: str) -> asyncio.Event:
        return self._over.setdefault(name, asyncio.Event())

    async def wait_for(self, name: str) -> None:
        """Wait for the hosts before this one."""
        for other in self._names[: self._names.index(name)]:
            await self._event(other).wait()

    def is_over(self, name: str) -> None:
        """Let the next one begin."""
        with suppress(KeyError):
            self._event(name).set()


class _LastLines:
    """Passes on the last lines of what has come so far, and then all."""

    def __init__(self, count: int, put: Callable[[bytes], Any]) -> None:
        self._count, self._put = count, put
        self._kept = bytearray()
        self._released = False

    def take(self, data: bytes) -> None:
        """Take output."""
        if self._released:
            self._put(data)
            return
        self._kept += data
        if len(self._kept) > 2 * _LONGEST:
            del self._kept[:-_LONGEST]

    def release(self) -> None:
        """Pass on the last lines."""
        if self._released:
            return
        self._released = True
        start = len(self._kept)
        for _ in range(self._count + (self._kept[-1:] == b"\n")):
            start = self._kept.rfind(b"\n", 0, start)
            if start < 0:
                break
        self._put(bytes(self._kept[start + 1 :]))
