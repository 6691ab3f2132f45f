"""Whether the software on the hosts matches the manager's, found out before anything is started."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from collections.abc import Sequence
from typing import Any

from .dask_programs import common
from .exceptions import ClusterError, ServiceError, VersionMismatchError, WorkerStartError
from .workers import Worker

logger = logging.getLogger("lazycluster")

# What Dask itself wants to be the same everywhere, since it sends pickles and its own messages.
_COMPARED = ("python", "dask", "distributed", "cloudpickle")
_NEEDED = ("dask", "distributed")

_Software = dict[str, tuple[dict[str, str], str]]  # host -> its versions, its interpreter


def check_manager(secure: bool) -> None:
    """Make sure that the manager has what it takes.

    Raises:
        ClusterError: If it has not.
    """
    wanted = [*_NEEDED, "cryptography"] if secure else list(_NEEDED)
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ClusterError(
            f"{', '.join(missing)} cannot be imported here, on the manager ({sys.executable}).\n"
            f"  Next step: {sys.executable} -m pip install 'lazycluster[dask]'"
        )


async def check_workers(workers: Sequence[Worker], policy: str, limit: float) -> None:
    """Compare what the programs of workers say of their hosts' software with the manager's.

    Raises:
        WorkerStartError: If one did not say anything.
        VersionMismatchError: If a host does not match.
    """
    try:
        said = await asyncio.wait_for(asyncio.gather(*(w.service.wait_for("versions") for w in workers)), limit)
    except ServiceError as error:
        raise WorkerStartError(
            error.name,
            error.host,
            error.problem,
            exit_status=error.exit_status,
            output=error.output,
            log_file=error.log_file,
        ) from None
    except asyncio.TimeoutError:
        raise ClusterError(f"the hosts did not tell their versions within {limit:g} s") from None
    manager = _versions({"python": list(sys.version_info[:3]), "packages": common.versions()})
    hosts: _Software = {}
    for worker, fields in zip(workers, said, strict=True):
        hosts[worker.place.host] = (_versions(fields), str(fields["executable"]))
    differing = {host: entry for host, entry in hosts.items() if entry[0] != manager}
    unusable = [host for host, (versions, _) in hosts.items() if any(versions[name] == "-" for name in _NEEDED)]
    if not differing or (policy == "ignore" and not unusable):
        return
    message = _message(manager, hosts, differing, acceptable=not unusable)
    if policy == "error" or unusable:
        raise VersionMismatchError(message, list(differing))
    logger.warning("%s", message)


def _versions(fields: dict[str, Any]) -> dict[str, str]:
    packages = fields["packages"]
    versions = {name: packages.get(name) or "-" for name in _COMPARED if name != "python"}
    return {"python": ".".join(map(str, fields["python"][:2])), **versions}


def _message(manager: dict[str, str], hosts: _Software, differing: _Software, *, acceptable: bool) -> str:
    rows = [["", *_COMPARED], ["manager", *(manager[name] for name in _COMPARED)]]
    for host, (versions, _) in hosts.items():
        cells = [versions[name] + (" <" if versions[name] != manager[name] else "") for name in _COMPARED]
        rows.append([host, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    table = ["  " + "  ".join(row).rstrip() for row in padded]
    steps = []
    for host, (versions, executable) in differing.items():
        if versions["python"] != manager["python"]:
            choose = f'choose a Python {manager["python"]} with python="auto", or with setup="..."'
            steps.append(f"  {host}: uses {executable}; {choose}")
            continue  # what this one lacks does not matter
        wanted = [f"{name}=={manager[name]}" for name in _COMPARED[1:] if versions[name] != manager[name]]
        if wanted:
            steps.append(f"  {host}: {executable} -m pip install {' '.join(wanted)}")
    if acceptable:
        steps.append('  DaskCluster(..., check_versions="warn"), if you know better')
    return "\n".join(
        [
            f"the software of {', '.join(differing)} does not match the manager's (- is missing, < differs):",
            *table,
            "Next step, one of:",
            '  have the manager\'s packages on all hosts: RuntimeGroup(..., environment="manager")',
            *steps,
        ]
    )
