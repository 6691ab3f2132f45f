"""Work on many hosts at once, each independent of the others: one that is down, silent or slow delays no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lazycluster.core import event_loop
from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError, LazyclusterError
from lazycluster.ssh.connection import Connection
from lazycluster.ssh.ssh_connection import client_version

from .console import FAILED, TIMED_OUT, UNREACHABLE, is_terminal
from .option_names import spelled_next_steps
from .options import Targets

__all__ = ["FANOUT", "HostOutcome", "InOrder", "everywhere", "exit_status", "open_all"]

T = TypeVar("T")

FANOUT = 64
_PATIENCE = 1.0  # seconds


@dataclass
class HostOutcome:
    """The outcome of the work on a host.

    Attributes:
        host: The host.
        status: The exit status, as a shell has it: 128 and more for a signal.
        error: Why there is none, with the next step; empty if the work ended by itself.
        kind: ``done``, ``unreachable``, ``timeout`` or ``error``.
        seconds: How long it took, connecting included.
    """

    host: str
    status: int = 0
    error: str = ""
    kind: str = "done"
    seconds: float = 0.0


Work = Callable[[Connection], Awaitable[HostOutcome]]


async def everywhere(
    targets: Targets,
    work: Work,
    fanout: int = FANOUT,
    on_done: Callable[[HostOutcome], Any] = lambda outcome: None,
    at_end: Callable[[list[Connection]], Awaitable[object]] | None = None,
) -> list[HostOutcome]:
    """Connect hosts and do something on each.

    If it is cancelled, the work ends on all hosts before this does.

    Args:
        targets: The hosts.
        work: What to do on one that is connected; it is disconnected afterwards.
        fanout: On how many at once.
        on_done: Called with the outcome of a host as soon as it is there.
        at_end: Work on all hosts together, after that on each: those where it ended by itself stay connected for this.

    Returns:
        The outcomes, in the order of the hosts.

    Raises:
        InvalidRuntimeError: If this machine has no ssh client.
    """
    await client_version()
    slots = asyncio.Semaphore(fanout)
    kept: list[Connection] | None = None if at_end is None else []

    async def one(name: str) -> HostOutcome:
        slot = _FanoutSlot(slots)
        await slot.take()
        try:
            started = time.monotonic()
            outcome = await _on_host(targets, name, work, slot, kept)
            outcome.seconds = time.monotonic() - started
        finally:
            slot.give_up()
        on_done(outcome)
        return outcome

    try:
        outcomes = await event_loop.together([asyncio.ensure_future(one(name)) for name in targets.names])
        if at_end is not None and kept:
            await at_end(kept)
    finally:
        await asyncio.gather(*(connection.close() for connection in kept or ()))
    return outcomes


class _FanoutSlot:
    """A place among the hosts that are worked on at once."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._is_held = False

    async def take(self) -> None:
        """Wait for it."""
        await self._slots.acquire()
        self._is_held = True

    def give_up(self) -> None:
        """Let another host have it. Doing it again does nothing."""
        if self._is_held:
            self._is_held = False
            self._slots.release()


async def _open(connection: Connection, slot: _FanoutSlot) -> None:
    """Connect a host; its slot is given up as soon as it is silent, and taken again when it is connected after all."""
    opening, silent = asyncio.ensure_future(connection.open()), asyncio.ensure_future(connection.silent.wait())
    try:
        await asyncio.wait({opening, silent}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            slot.give_up()
            await opening
            await slot.take()
        await opening
    finally:
        silent.cancel()
        opening.cancel()
        await asyncio.wait({opening})


class InOrder(Generic[T]):
    """Shows what hosts have answered in their order. On a terminal, a host that is late holds back no other for long.

    Used on the loop's thread.

    Args:
        names: The hosts.
        show: Called with each answer.
    """

    def __init__(self, names: Iterable[str], show: Callable[[T], Any]) -> None:
        self._awaited = dict.fromkeys(names, True)
        self._show = show
        self._here: dict[str, T] = {}
        self._timer: asyncio.TimerHandle | None = None

    def put(self, name: str, answer: T) -> None:
        """Take the answer of a host."""
        self._here[name] = answer
        self._show_some()
        if self._here and self._timer is None and is_terminal():
            self._timer = asyncio.get_running_loop().call_later(_PATIENCE, self._wait_no_longer)

    def _wait_no_longer(self) -> None:
        self._timer = None
        self._awaited = dict.fromkeys(self._awaited, False)
        self._show_some()

    def _show_some(self) -> None:
        for name, awaited in list(self._awaited.items()):
            if name in self._here:
                del self._awaited[name]
                self._show(self._here.pop(name))
            elif awaited:
                return


async def _on_host(
    targets: Targets, name: str, work: Work, slot: _FanoutSlot, kept: list[Connection] | None
) -> HostOutcome:
    connection = None
    try:
        connection = targets.connection(name)
        await _open(connection, slot)
        outcome = await work(connection)
        if kept is not None:
            kept.append(connection)
            connection = None
        return outcome
    except InvalidRuntimeError as error:
        return HostOutcome(name, UNREACHABLE, _told(error, name), "unreachable")
    except ConnectionLostError as error:
        return HostOutcome(name, UNREACHABLE, _told(error, name), "unreachable")
    except (LazyclusterError, OSError, ValueError, TypeError) as error:
        return HostOutcome(name, FAILED, _told(error, name), "error")
    finally:
        if connection is not None:
            await connection.close()


def _told(error: Exception, host: str) -> str:
    return spelled_next_steps(str(error).removeprefix(f"{host}: ")) or type(error).__name__


def exit_status(outcomes: Sequence[HostOutcome], everyone: bool = False) -> int:
    """Return the exit status of a command from those of its hosts.

    Args:
        outcomes: How it ended on each host.
        everyone: Whether hosts that cannot be reached were not asked for by name, so do not count.

    Returns:
        255 if a host was not reached, else 124 if one took too long, else the highest of all.
    """
    counted = [o for o in outcomes if not (everyone and o.kind == "unreachable")]
    if not counted or any(o.kind == "unreachable" for o in counted):
        return UNREACHABLE
    if any(o.kind == "timeout" for o in counted):
        return TIMED_OUT
    return max(o.status for o in counted)


async def open_all(targets: Targets) -> list[Connection]:
    """Connect all hosts at once; with ``@all`` those that can be reached.

    Raises:
        InvalidRuntimeError: If one that was named cannot be reached, or none.
    """
    await client_version()
    connections = [targets.connection(name) for name in targets.names]
    try:
        errors = await asyncio.gather(*(c.open() for c in connections), return_exceptions=True)
        failed = [error for error in errors if isinstance(error, BaseException)]
        if failed and (not targets.everyone or len(failed) == len(connections)):
            raise failed[0]
    except BaseException:
        await asyncio.gather(*(c.close() for c in connections), return_exceptions=True)
        raise
    return [c for c, error in zip(connections, errors, strict=True) if error is None]
