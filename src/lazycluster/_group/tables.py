"""Tables for people, on standard output."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["info_row", "print_list", "print_table"]

_GIGABYTE = 1024**3

INFO_HEAD = ("host", "os", "cores", "load", "memory", "free", "python", "gpus")


def info_row(host: str, info: Mapping[str, Any]) -> list[str]:
    """Return the row of a host under `INFO_HEAD`."""
    load = info.get("load")
    first: Any = load[0] if isinstance(load, (list, tuple)) and load else load
    return [
        host,
        str(info.get("os", "")),
        _number(info.get("cpu_cores")),
        "" if first is None else f"{float(first):.2f}",
        _size(info.get("memory")),
        _size(info.get("memory_free")),
        str(info.get("python_version", "")),
        ", ".join(str(gpu.get("name", "?")) for gpu in info.get("gpus") or []) or "-",
    ]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:g}"


def _size(value: Any) -> str:
    return "" if value is None else f"{int(value) / _GIGABYTE:.1f} GB"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, in columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in lines)
    sys.stdout.write(text + "\n")


def print_list(title: str, entries: Mapping[str, str]) -> None:
    """Print names, each with what is said of it, which may have several lines."""
    lines = [f"{title}:" if entries else f"{title}: none"]
    for name, text in entries.items():
        first, *rest = (text or "").split("\n")
        lines.append(f"  {name}" + (f": {first}" if first else ""))
        lines += [f"    {line.strip()}" for line in rest]
    sys.stdout.write("\n".join(lines) + "\n")
