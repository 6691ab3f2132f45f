"""Comparison of versions by the scheduler: no more than what the manager compares before a start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distributed import versions

from . import common

_compare = versions.error_message


def compare_what_counts() -> None:
    """Have the scheduler of this process warn of nothing that the cluster accepts."""
    versions.error_message = _error_message


def _error_message(scheduler: Any, workers: Any, source: Any, source_name: str = "Client") -> dict[str, str]:
    if source_name != "Client":  # a worker: its host was compared before it was started, and the user told
        return {"warning": "", "error": ""}
    told: dict[str, str] = _compare(_relevant(scheduler), {}, _relevant(source), source_name)
    return told


def _relevant(told: Mapping[str, Any] | None) -> dict[str, Any]:
    packages = (told or {}).get("packages") or {}
    found = {name: version for name, version in packages.items() if name in common.SAME_PACKAGES}
    python = ".".join(str(packages.get("python")).split(".")[:2])
    return {"packages": {**found, "python": python}}
