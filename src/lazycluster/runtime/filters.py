"""Conditions by which hosts are chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazycluster.tasks.context import Context

from .session import HostSession

__all__ = ["HostFilter", "unmet"]

_FIND_EXECUTABLES = 'for name in "$@"; do command -v "$name" >/dev/null 2>&1 || printf "%s\\n" "$name"; done'


@dataclass(frozen=True)
class HostFilter:
    """The conditions, checked when they are made.

    Attributes:
        gpu_required: There must be a GPU.
        min_memory: Megabytes.
        min_cpu_cores: Cores.
        installed_executables: Programs that must be found.
        filter_commands: Commands that must print ``true``.
    """

    gpu_required: bool = False
    min_memory: int | None = None
    min_cpu_cores: int | None = None
    installed_executables: str | Sequence[str] | None = None
    filter_commands: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("min_memory", "min_cpu_cores"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, not {type(value).__name__}")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        for name in ("installed_executables", "filter_commands"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))

    @property
    def needs_info(self) -> bool:
        """True if the host has to be asked what kind of machine it is."""
        return bool(self.gpu_required or self.min_memory is not None or self.min_cpu_cores is not None)


def _texts(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be strings, not {type(text).__name__}")
        if not text.strip() or "\0" in text:
            raise ValueError(f"{name} contains an empty or unusable text: {text!r}")
    return texts


async def unmet(session: HostSession, context: Context, wanted: HostFilter) -> str | None:
    """Return the first condition that a host does not meet, and why; None if it meets all.

    Args:
        session: The host.
        context: Where commands are run.
        wanted: The conditions.
    """
    reason = None
    if wanted.needs_info:
        info = await session.ask("info", gpus=wanted.gpu_required, env=dict(context.env))
        reason = _machine(info, wanted)
    if reason is None and wanted.installed_executables:
        reason = await _missing_executables(session, context, list(wanted.installed_executables))
    if reason is None and wanted.filter_commands:
        reasons = await asyncio.gather(*(_refused(session, context, line) for line in wanted.filter_commands))
        reason = next((why for why in reasons if why is not None), None)
    return reason


def _machine(info: Mapping[str, Any], wanted: HostFilter) -> str | None:
    if wanted.gpu_required and not info.get("gpus"):
        problem = info.get("gpu_problem")
        return f"gpu_required: it has no GPU ({problem})" if problem else "gpu_required: it has no GPU"
    if wanted.min_memory is not None:
        memory = int(info.get("memory") or 0) // (1024 * 1024)
        if memory < wanted.min_memory:
            return f"min_memory={wanted.min_memory}: it has {memory} MB"
    if wanted.min_cpu_cores is not None and (info.get("cpu_cores") or 0) < wanted.min_cpu_cores:
        return f"min_cpu_cores={wanted.min_cpu_cores}: it has {info.get('cpu_cores')}"
    return None


async def _missing_executables(session: HostSession, context: Context, names: list[str]) -> str | None:
    # The user's own shell may be one that has no `command -v`.
    _, output = await session.capture(context, argv=["/bin/sh", "-c", _FIND_EXECUTABLES, "sh", *names])
    missing = output.split("\n")[:-1]
    return f"installed_executables: not found: {', '.join(missing)}" if missing else None


async def _refused(session: HostSession, context: Context, command: str) -> str | None:
    _, output = await session.capture(context, command=command)
    lines = output.strip().splitlines() or [""]
    if lines[-1].strip().lower() == "true":
        return None
    return f"filter_commands: {command!r} printed {lines[-1][:80]!r}, not 'true'"
