"""Whether the software on the hosts matches the manager's, found out before anything is started."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lazycluster.core.extras import install_command
from lazycluster.exceptions import LazyclusterError

from .exceptions import ClusterError, ServiceError, VersionMismatchError, WorkerStartError
from .worker_launcher import Worker

logger = logging.getLogger("lazycluster")

_LIMIT = 60.0  # seconds
_PYTHON = "python"

CheckVersions = Literal["error", "warn", "ignore"]


def checked_policy(policy: CheckVersions) -> CheckVersions:
    """Return what is to happen if versions do not match.

    Raises:
        ValueError: If it makes no sense.
    """
    if policy not in get_args(CheckVersions):
        raise ValueError(f"check_versions must be 'error', 'warn' or 'ignore', not {policy!r}")
    return policy


@dataclass(frozen=True)
class Software:
    """What an engine needs.

    Attributes:
        engine: The name of the cluster's class, for messages.
        extra: The extra of this package that installs it.
        needed: Packages without which nothing works.
        same: Packages whose versions must be the same everywhere.
    """

    engine: str
    extra: str
    needed: tuple[str, ...]
    same: tuple[str, ...]

    def check_manager(self, *more: str) -> None:
        """Make sure that the manager has what it takes.

        Args:
            more: Packages that are needed here alone.

        Raises:
            ClusterError: If it has not.
        """
        missing = [name for name in (*self.needed, *more) if importlib.util.find_spec(name) is None]
        if missing:
            raise ClusterError(
                f"{', '.join(missing)} cannot be imported here, on the manager ({sys.executable}).\n"
                f"  Next step: {install_command(self.extra)}"
            )

    async def check_workers(
        self, workers: Sequence[Worker], policy: CheckVersions, here: dict[str, str | None]
    ) -> dict[str, LazyclusterError]:
        """Compare what the programs of workers say of their hosts' software with the manager's.

        Args:
            workers: The workers, whose programs say ``versions`` first.
            policy: What happens on a difference: ``error``, ``warn`` or ``ignore``. What is missing is an error always.
            here: The manager's versions.

        Returns:
            By name the workers that did not say anything, with the error.

        Raises:
            WorkerStartError: If one has ended instead.
            VersionMismatchError: If a host does not match.
        """
        manager = self._row({_PYTHON: list(sys.version_info[:3]), "packages": here})
        hosts: dict[str, dict[str, str]] = {}
        executables: dict[str, str] = {}
        answers = await _handshakes(workers)
        silent = {worker.name: _silent(worker) for worker in workers if worker.name not in answers}
        for worker in workers:
            if worker.name in silent:
                continue
            fields = answers[worker.name]
            hosts[worker.place.host] = self._row(fields)
            executables[worker.place.host] = str(fields["executable"])
        unusable = {host for host, row in hosts.items() if any(row[name] == "-" for name in self.needed)}
        differing = [host for host, row in hosts.items() if host in unusable or self._differs(row, manager)]
        if not differing or (policy == "ignore" and not unusable):
            return silent
        marked = [(host, {name: self._marked(name, row, manager) for name in row}) for host, row in hosts.items()]
        what = f"the software of {', '.join(differing)} does not match the manager's (- is missing, < differs):"
        same = '  have the manager\'s packages on all hosts: RuntimeGroup(..., environment="manager")'
        steps = [self._step(host, hosts[host], manager, executables[host]) for host in differing]
        if not unusable:
            steps.append(f'  {self.engine}(..., check_versions="warn"), if you know better')
        message = "\n".join([what, *_table([("manager", manager), *marked]), "Next step, one of:", same, *steps])
        if policy == "error" or unusable:
            raise VersionMismatchError(message, differing)
        logger.warning("%s", message)
        return silent

    def _row(self, fields: dict[str, Any]) -> dict[str, str]:
        names = dict.fromkeys((*self.needed, *self.same))
        packages = {name: fields["packages"].get(name) or "-" for name in names}
        return {_PYTHON: ".".join(map(str, fields[_PYTHON][:2])), **packages}

    def _differs(self, row: dict[str, str], manager: dict[str, str]) -> bool:
        return any(row[name] != manager[name] for name in (_PYTHON, *self.same))

    def _marked(self, name: str, row: dict[str, str], manager: dict[str, str]) -> str:
        version = row[name]
        compared = name in (_PYTHON, *self.same)
        return f"{version} <" if compared and version not in ("-", manager[name]) else version

    def _step(self, host: str, row: dict[str, str], manager: dict[str, str], executable: str) -> str:
        if row[_PYTHON] != manager[_PYTHON]:
            choose = f'choose a Python {manager[_PYTHON]} with python="auto", or with setup="..."'
            return f"  {host}: uses {executable}; {choose}"
        wanted = [
            f"{name}=={manager[name]}"
            for name in row
            if name != _PYTHON and (row[name] == "-" or (name in self.same and row[name] != manager[name]))
        ]
        return f"  {host}: {executable} -m pip install {' '.join(wanted)}"


def _silent(worker: Worker) -> LazyclusterError:
    return WorkerStartError(
        worker.service.label, worker.place.host, f"the host has started nothing that told its versions in {_LIMIT:g} s"
    )


async def _handshakes(workers: Sequence[Worker]) -> dict[str, dict[str, Any]]:
    """Return by name what workers say first, of those that do so in time."""
    waits = {asyncio.ensure_future(worker.service.wait_for("versions")): worker.name for worker in workers}
    try:
        done, _ = await asyncio.wait(waits, timeout=_LIMIT, return_when=asyncio.FIRST_EXCEPTION)
        return {waits[task]: task.result() for task in done}
    except ServiceError as error:
        raise WorkerStartError(
            error.name,
            error.host,
            error.problem,
            exit_status=error.exit_status,
            output=error.output,
            log_file=error.log_file,
        ) from None
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _table(entries: list[tuple[str, dict[str, str]]]) -> list[str]:
    names = list(entries[0][1])
    rows = [["", *names], *([host, *(row[name] for name in names)] for host, row in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
