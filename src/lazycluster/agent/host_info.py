"""Facts about the host's machine and its load: read from /proc, /sys and control groups, in milliseconds."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from typing import Any, Dict, List, Optional

from .commands import environment
from .gpus import HostGpus
from .processes import read_text
from .session import RequestChannel

_UNLIMITED = 1 << 60  # control groups of version 1 say a number near 2**63 for "no limit"


def info(channel: RequestChannel) -> None:
    """Handle the request `info`."""
    facts = gather()
    if not channel.params.get("gpus", True):
        channel.result(**dict(facts, gpus=[], gpu_problem=""))
        return
    channel.agent.shared(HostGpus).survey(
        environment(channel),
        False,
        lambda gpus, problem: channel.result(**dict(facts, gpus=gpus, gpu_problem=problem)),
    )


def gather() -> Dict[str, Any]:
    """Return what can be read without another process."""
    memory = _meminfo()
    total, available = memory.get("MemTotal", 0), memory.get("MemAvailable", memory.get("MemFree", 0))
    limit, used = memory_limit()
    if limit is not None and limit < total:
        total, available = limit, max(0, min(available, limit - (used or 0)))
    disk = shutil.disk_usage(os.path.expanduser("~") if os.path.isdir(os.path.expanduser("~")) else "/")
    return {
        "os": _os_name(),
        "cpu_cores": cpu_cores(),
        "memory": total,
        "memory_free": available,
        "load": list(os.getloadavg()),
        "disk_total": disk.total,
        "disk_free": disk.free,
        "python_version": platform.python_version(),
        "python": sys.executable,
        "hostname": socket.gethostname(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "uptime": _uptime(),
    }


def cpu_cores() -> int:
    """Return the processors that may be used: the affinity of the process, and a control group's quota rounded up."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(cores, -int(-quota // 1))) if quota else cores


def cpu_quota(root: str = "/") -> Optional[float]:
    """Return the processors that the control groups grant, None if there is no limit."""
    limits = []
    for directory in _groups(root, ""):
        fields = _words(os.path.join(directory, "cpu.max"))
        if len(fields) == 2 and fields[0] != "max":
            limits.append(int(fields[0]) / int(fields[1]))
    for directory in _groups(root, "cpu"):
        quota = _number(os.path.join(directory, "cpu.cfs_quota_us"))
        period = _number(os.path.join(directory, "cpu.cfs_period_us"))
        if quota and period and quota > 0:
            limits.append(quota / period)
    return min(limits) if limits else None


def memory_limit(root: str = "/") -> "tuple[Optional[int], Optional[int]]":
    """Return (limit, used) in bytes of the tightest control group, (None, None) if there is no limit."""
    found = []
    for controller, limit_name, used_name in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for directory in _groups(root, controller):
            limit = _number(os.path.join(directory, limit_name))
            if limit is not None and limit < _UNLIMITED:
                found.append((limit, _number(os.path.join(directory, used_name))))
    return min(found, key=lambda pair: pair[0]) if found else (None, None)


def _groups(root: str, controller: str) -> List[str]:
    """Return this process's group of a controller ("" for version 2) and those above it."""
    mount = os.path.join(root, "sys/fs/cgroup", controller)
    path = None
    for line in read_text(os.path.join(root, "proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        if (controller and controller in names.split(",")) or (not controller and number == "0"):
            path = group
    if path is None or not os.path.isdir(mount):
        return []
    # In a container the path is often the host's, which cannot be seen: the mount itself is the group then.
    parts = [part for part in path.split("/") if part and part != ".."]
    return [os.path.join(mount, *parts[:count]) for count in range(len(parts), -1, -1)]


def _os_name() -> str:
    for line in read_text("/etc/os-release").splitlines():
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return value.strip().strip('"')
    return "{} {}".format(platform.system(), platform.release())


def _uptime() -> Optional[float]:
    fields = _words("/proc/uptime")
    return float(fields[0]) if fields else None


def _meminfo() -> Dict[str, int]:
    found = {}
    for line in read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdigit():
            found[name] = int(fields[0]) * 1024
    if not found:
        try:
            found["MemTotal"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            pass
    return found


def _words(path: str) -> List[str]:
    return read_text(path).split()


def _number(path: str) -> Optional[int]:
    words = _words(path)
    try:
        return int(words[0]) if words else None
    except ValueError:
        return None
