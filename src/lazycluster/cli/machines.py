"""What is shown of a host in a table: cells from what its agent tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["cells", "gpus", "megabytes", "os_name", "share"]

_UNITS = ("B", "K", "M", "G", "T", "P")


def megabytes(count: float) -> str:
    """Return a number of bytes as people read it: ``1.5G``."""
    value, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f}{unit}" if value >= 9.95 or unit == "B" else f"{value:.1f}{unit}"


def share(used: float, total: float) -> str:
    """Return how much of something is used: ``1.5G/16G``."""
    return f"{megabytes(max(0, used))}/{megabytes(total)}"


def os_name(name: str) -> str:
    """Return the short name of an operating system: ``Debian 12``."""
    short = re.sub(r"\s*\(.*?\)|GNU/Linux|\bLinux\b", "", name)
    return " ".join(short.split())[:12] or name[:12]


def gpus(found: list[Mapping[str, Any]]) -> str:
    """Return the GPUs, those of one kind together: ``4x NVIDIA A100``."""
    counts: dict[str, int] = {}
    for gpu in found:
        name = str(gpu.get("name", "?")).removeprefix("NVIDIA ")
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count}x {name}" if count > 1 else name for name, count in counts.items()) or "-"


def cells(info: Mapping[str, Any]) -> dict[str, str]:
    """Return what is shown of a machine, by column."""
    load = info.get("load") or [0.0]
    return {
        "os": os_name(str(info.get("os", ""))),
        "cores": f"{info.get('cpu_cores', 0):g}",
        "load": f"{float(load[0]):.2f}",
        "memory": share(info.get("memory", 0) - info.get("memory_free", 0), info.get("memory", 0)),
        "disk": share(info.get("disk_total", 0) - info.get("disk_free", 0), info.get("disk_total", 0)),
        "python": str(info.get("python_version", "")),
        "gpus": gpus(info.get("gpus") or []),
    }
