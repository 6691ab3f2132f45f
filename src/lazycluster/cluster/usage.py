"""Processor time and memory of the processes of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import LazyclusterError
from lazycluster.output.host_cells import number

if TYPE_CHECKING:
    from lazycluster.ssh.connection import Connection

    from .services import Service

__all__ = ["Meter", "ProcessUsage"]

_STALE = 10.0  # seconds after which an answer tells nothing any more


@dataclass(frozen=True)
class ProcessUsage:
    """Processor time and memory of a process, with all that it has started.

    Attributes:
        cpu: Percent of one core, since it was asked before; None at the first time.
        memory: Bytes in the host's memory; those that several of its processes share count for each of them.
    """

    cpu: float | None
    memory: int


class Meter:
    """Asks hosts what services use. For the event loop's thread."""

    def __init__(self) -> None:
        self._hosts: dict[Connection, _Host] = {}

    async def look(self, services: Sequence[Service], timeout: float) -> dict[str, ProcessUsage]:
        """Return by label what is known of services.

        A host that does not answer in time is not waited for again until it does.
        """
        here = {service.place.connection for service in services}
        self._hosts = {connection: self._hosts.get(connection) or _Host() for connection in here}
        asked = [host.ask(connection) for connection, host in self._hosts.items() if not host.is_asked]
        if asked:
            await asyncio.wait(asked, timeout=timeout)
        found = {service.label: self._hosts[service.place.connection].usage(service.pid) for service in services}
        return {label: usage for label, usage in found.items() if usage is not None}


class _Host:
    """One host: the question that is under way, and what the last answer says."""

    def __init__(self) -> None:
        self._question: asyncio.Task[None] | None = None
        self._heard = 0.0
        self._time = 0.0
        self._ticks: dict[str, float] = {}
        self._usage: dict[str, ProcessUsage] = {}

    @property
    def is_asked(self) -> bool:
        """True while a host has not answered."""
        return self._question is not None and not self._question.done()

    def ask(self, connection: Connection) -> asyncio.Task[None]:
        """Ask; the task is done when the answer is there, or none will come."""
        self._question = asyncio.ensure_future(self._ask(connection))
        return self._question

    async def _ask(self, connection: Connection) -> None:
        try:
            answer = await connection.request("usage")
        except LazyclusterError:
            return  # what has become of its services, and why, is told by their states
        self._heard = asyncio.get_running_loop().time()
        self._note(answer)

    def _note(self, answer: Mapping[str, Any]) -> None:
        found, time = answer.get("services"), number(answer.get("time"))
        if time == self._time or not isinstance(found, dict):
            return  # the host has not looked again since
        passed = (time - self._time) * number(answer.get("hertz"))  # less than nothing after a restart of the host
        usage: dict[str, ProcessUsage] = {}
        ticks: dict[str, float] = {}
        for pid, figures in found.items():
            if isinstance(figures, list) and len(figures) == 2:
                ticks[pid] = number(figures[0])
                before = self._ticks.get(pid)
                cpu = None if before is None or passed <= 0 else max(0.0, 100 * (ticks[pid] - before) / passed)
                usage[pid] = ProcessUsage(cpu, int(number(figures[1])))
        self._time, self._ticks, self._usage = time, ticks, usage

    def usage(self, pid: int | None) -> ProcessUsage | None:
        """Return what one process uses, None if that is not known, or not any more."""
        if asyncio.get_running_loop().time() - self._heard > _STALE:
            return None
        return self._usage.get(str(pid))
