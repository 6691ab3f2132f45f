"""Cells of tables about hosts, made of what their agents report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["cells", "gpus", "megabytes", "number", "os_name", "share"]

_UNITS = ("B", "K", "M", "G", "T", "P")


def number(value: Any) -> float:
    """Return a number that a host reports; 0 if it is not a finite number."""
    try:
        found = float(value) if isinstance(value, (int, float)) else 0.0
    except OverflowError:  # of an integer
        return 0.0
    return found if math.isfinite(found) else 0.0


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


def gpus(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the GPUs, those of one kind together: ``4x NVIDIA A100``."""
    counts: dict[str, int] = {}
    for gpu in found:
        name = str(gpu.get("name", "?") if isinstance(gpu, Mapping) else gpu).removeprefix("NVIDIA ")
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count}x {name}" if count > 1 else name for name, count in counts.items()) or "-"


def cells(info: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells for a machine, by column; none if nothing is known."""
    if not info:
        return {}
    load, found = info.get("load"), info.get("gpus")
    return {
        "os": os_name(str(info.get("os", ""))),
        "cores": f"{number(info.get('cpu_cores')):g}",
        "load": f"{number(load[0] if isinstance(load, list) and load else load):.2f}",
        "memory": _used(info, "memory", "memory_free"),
        "disk": _used(info, "disk_total", "disk_free"),
        "python": str(info.get("python_version", "")),
        "gpus": gpus(found if isinstance(found, list) else []),
    }


def _used(info: Mapping[str, Any], total: str, free: str) -> str:
    return share(number(info.get(total)) - number(info.get(free)), number(info.get(total)))
