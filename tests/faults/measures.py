"""What the manager and the hosts hold at one moment, and whether that grows."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
from pathlib import Path
from typing import Any

from sshhosts import LIVE, procfs

_MB = 1_000_000


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _descriptors(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _threads(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def _entries(folder: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def measure(hosts: Any, temporary: Path) -> dict[str, float]:
    """Count and weigh all that the library holds, on this machine and on hosts, which must all be on.

    Args:
        hosts: The hosts.
        temporary: The manager's directory for temporary files.
    """
    own = os.getpid()
    supervisors = {pool.supervisor_pid for pool in LIVE}
    children = [found for found in procfs.descendants(own) if _is_ours(found, supervisors)]
    there = [found for host in hosts for found in host.processes()]
    sessions = [found for host in hosts for found in host.sessions()]
    return {
        "manager: processes": len(children),
        "manager: threads": threading.active_count(),
        "manager: descriptors": _descriptors(own),
        "manager: descriptors of its processes": sum(_descriptors(found.pid) for found in children),
        "manager: memory, MB": _resident(own) / _MB,
        "manager: memory of its processes, MB": sum(_resident(found.pid) for found in children) / _MB,
        "manager: temporary files": _entries(temporary),
        "hosts: processes": len(there),
        "hosts: ssh sessions": len(sessions),
        "hosts: threads": sum(_threads(found.pid) for found in there),
        "hosts: descriptors": sum(_descriptors(found.pid) for found in there),
        "hosts: memory, MB": sum(_resident(found.pid) for found in there) / _MB,
        "hosts: listening ports": sum(len(host.listening_ports()) for host in hosts),
        "hosts: temporary files": sum(
            1 + _entries(Path(f"/proc/{host.pid}/root{entry}")) for host in hosts for entry in host.tmp_entries()
        ),
        "hosts: files in homes": sum(_entries(host.path("~")) for host in hosts),
    }


def _is_ours(found: procfs.Process, supervisors: set[int]) -> bool:
    if found.pid in supervisors or found.parent in supervisors:
        return False
    return procfs.namespace(found.pid) == procfs.namespace("self")


#: What a measure may grow by, as a factor and in its unit: allocators and caches of the engines fill slowly.
_SLACK = {"memory": (1.25, 60.0), "": (1.10, 8.0)}


def growth(samples: list[dict[str, float]]) -> list[str]:
    """Tell what has grown: its median in the last third of samples against that in the first third.

    The very first sample is left out: whatever is needed once is not there yet.
    """
    rest = samples[1:]
    if len(rest) < 3:
        return []
    third = max(1, len(rest) // 3)
    grown = []
    for name in samples[0]:
        before = statistics.median(sample[name] for sample in rest[:third])
        after = statistics.median(sample[name] for sample in rest[-third:])
        factor, more = _SLACK["memory" if "memory" in name else ""]
        if after > before * factor + more:
            grown.append(f"{name}: from {before:.0f} to {after:.0f}")
    return grown
