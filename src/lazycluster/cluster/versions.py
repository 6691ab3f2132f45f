"""A check before anything is started: the software on the hosts against the manager's."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazycluster.core.extras import install_command, pip_command
from lazycluster.exceptions import LazyclusterError

from .exceptions import ClusterError, ServiceError, VersionMismatchError, WorkerStartError
from .sent import messages
from .service_spec import ServiceSpec, Source
from .services import Service, as_kind, stop_all

if TYPE_CHECKING:
    from .engine import Engine
    from .worker_hosts import WorkerHost
    from .worker_launcher import Worker

logger = logging.getLogger("lazycluster")

_LIMIT = 60.0  # seconds
_PYTHON = "python"


def check_manager(engine: Engine) -> None:
    """Make sure that the manager has the packages that an engine needs.

    Raises:
        ClusterError: If it has not.
    """
    missing = [name for name in engine.needed_here() if not _is_here(name)]
    if missing:
        step = install_command(engine.extra) if engine.extra else f"{sys.executable} -m pip install {' '.join(missing)}"
        raise ClusterError(
            f"{', '.join(missing)} cannot be imported here, on the manager ({sys.executable}).\n  Next step: {step}"
        )


def _is_here(name: str) -> bool:
    """Return whether a package is installed; its distribution may have another name than what is imported of it."""
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # what it would be in is not there
        found = False
    return found or messages.versions([name])[name] is not None


def versions_here(engine: Engine) -> dict[str, str | None]:
    """Return the manager's versions of the packages of an engine."""
    return messages.versions(_told(engine))


def _told(engine: Engine) -> list[str]:
    return list(dict.fromkeys((*engine.packages, *engine.same_versions, *engine.told_versions)))


async def check_workers(engine: Engine, workers: Sequence[Worker]) -> dict[str, LazyclusterError]:
    """Compare what our own programs say of their hosts' software with the manager's.

    Args:
        engine: The statement of the engine. Its `check_versions` says what happens on a difference; what is missing
            is an error always.
        workers: The workers, whose programs say ``versions`` first.

    Returns:
        By name the workers that did not say anything, with the error.

    Raises:
        WorkerStartError: If one has ended instead.
        VersionMismatchError: If a host does not match.
    """
    answers = await _answers({worker.name: worker.service for worker in workers})
    silent = {worker.name: _silent(worker.service) for worker in workers if worker.name not in answers}
    _compare(engine, {worker.place.host: answers[worker.name] for worker in workers if worker.name in answers})
    return silent


async def check_worker_hosts(engine: Engine, workers: Sequence[Worker]) -> dict[str, LazyclusterError]:
    """Find out which software the hosts of workers have, and compare it with the manager's.

    Returns:
        By name the workers whose hosts did not say anything, with the error.

    Raises:
        WorkerStartError: If a program is missing on a host.
        VersionMismatchError: If the packages of a host do not match.
    """
    places = {worker.place.host: worker.place for worker in workers}
    silent = await _check_hosts(engine, places, engine.worker_needs, f"{engine.name} worker")
    return {worker.name: silent[worker.place.host] for worker in workers if worker.place.host in silent}


async def check_master(engine: Engine, service: Service) -> None:
    """Compare what our own program, which is to be the master on a host, says of its software with the manager's.

    Raises:
        WorkerStartError: If it has ended instead, or says nothing.
        VersionMismatchError: If it does not match.
    """
    answers = await _answers({service.place.host: service})
    if not answers:
        raise _silent(service)
    _compare(engine, answers)


async def check_master_host(engine: Engine, place: WorkerHost) -> None:
    """Do so for the host of a master.

    Raises:
        ServiceError: If a program is missing there, or nothing can be found out.
        VersionMismatchError: If its packages do not match.
    """
    for error in (
        await _check_hosts(engine, {place.host: place}, engine.master_needs, f"{engine.name} master")
    ).values():
        raise error


async def _check_hosts(
    engine: Engine, places: Mapping[str, WorkerHost], needs: Sequence[str], label: str
) -> dict[str, LazyclusterError]:
    if not needs and not engine.packages and not engine.same_versions:
        return {}
    source = Source.of("lazycluster.cluster.sent.check", "lazycluster_check")
    spec = ServiceSpec("software check", source=source, marker=messages.MARKER)
    services = {host: Service(spec, place, f"{label}, {spec.name}") for host, place in places.items()}
    try:
        for service in services.values():
            service.start()
            await service.send({"packages": _told(engine), "programs": list(needs)})
        answers = await _answers(services)
    finally:
        await stop_all(list(services.values()))
    for host, fields in answers.items():
        missing = [name for name, path in fields.get("programs", {}).items() if path is None]
        if missing:
            names = " and ".join(missing)
            hint = "install it there, or have it on the PATH: RuntimeGroup(..., environment=...)"
            raise WorkerStartError(label, host, f"{names} is not on the PATH", hint=hint)
    _compare(engine, answers)
    return {host: _silent(service) for host, service in services.items() if host not in answers}


def _compare(engine: Engine, answers: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the software of hosts with the manager's.

    Raises:
        VersionMismatchError: If a host does not match.
    """
    manager = _row(engine, {_PYTHON: list(sys.version_info[:3]), "packages": versions_here(engine)})
    hosts = {host: _row(engine, fields) for host, fields in answers.items()}
    unusable = {host for host, row in hosts.items() if any(row[name] == "-" for name in engine.packages)}
    differing = [host for host, row in hosts.items() if host in unusable or _differs(engine, row, manager)]
    if not differing or (engine.check_versions == "ignore" and not unusable):
        return
    marked = [(host, {name: _marked(engine, name, row, manager) for name in row}) for host, row in hosts.items()]
    what = f"the software of {', '.join(differing)} does not match the manager's (- is missing, < differs):"
    same = '  have the manager\'s packages on all hosts: RuntimeGroup(..., environment="manager")'
    steps = [_step(engine, host, hosts[host], manager, answers[host]) for host in differing]
    if not unusable:
        steps.append(f'  {engine.cluster}(..., check_versions="warn"), if you know better')
    message = "\n".join([what, *_table([("manager", manager), *marked]), "Next step, one of:", same, *steps])
    if engine.check_versions == "error" or unusable:
        raise VersionMismatchError(message, differing)
    logger.warning("%s", message)


def _row(engine: Engine, fields: Mapping[str, Any]) -> dict[str, str]:
    names = dict.fromkeys((*engine.packages, *engine.same_versions))
    packages = {name: fields["packages"].get(name) or "-" for name in names}
    return {_PYTHON: ".".join(map(str, fields[_PYTHON][:2])), **packages}


def _compared(engine: Engine) -> tuple[str, ...]:
    # Where no package has to be the same, nothing is pickled from one Python to another.
    return (_PYTHON, *engine.same_versions) if engine.same_versions else ()


def _differs(engine: Engine, row: Mapping[str, str], manager: Mapping[str, str]) -> bool:
    return any(row[name] != manager[name] for name in _compared(engine))


def _marked(engine: Engine, name: str, row: Mapping[str, str], manager: Mapping[str, str]) -> str:
    version = row[name]
    return f"{version} <" if name in _compared(engine) and version not in ("-", manager[name]) else version


def _step(
    engine: Engine, host: str, row: Mapping[str, str], manager: Mapping[str, str], fields: Mapping[str, Any]
) -> str:
    executable = fields["executable"]
    if _PYTHON in _compared(engine) and row[_PYTHON] != manager[_PYTHON]:
        choose = f'choose a Python {manager[_PYTHON]} with python="auto", or with setup="..."'
        return f"  {host}: uses {executable}; {choose}"
    wanted = [
        f"{name}=={manager[name]}"
        for name in row
        if name != _PYTHON and (row[name] == "-" or (name in engine.same_versions and row[name] != manager[name]))
    ]
    return f"  {host}: {pip_command(str(executable), fields.get('managed') is True, wanted)}"


def _silent(service: Service) -> LazyclusterError:
    problem = f"the host has started nothing that told its versions in {_LIMIT:g} s"
    return WorkerStartError(service.label, service.place.host, problem)


async def _answers(services: Mapping[str, Service]) -> dict[str, dict[str, Any]]:
    """Return what programs say first, by the names of their services, of those that do so in time."""
    waits = {asyncio.ensure_future(service.wait_for("versions")): name for name, service in services.items()}
    try:
        done, _ = await asyncio.wait(waits, timeout=_LIMIT, return_when=asyncio.FIRST_EXCEPTION)
        return {waits[task]: task.result() for task in done}
    except ServiceError as error:
        raise as_kind(WorkerStartError, error) from None
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
