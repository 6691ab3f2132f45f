"""The name by which pickles rebuild tasks; those that are stored somewhere have it, so it stays here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .limits import Limits
    from .steps import Step
    from .task import RuntimeTask

T = TypeVar("T", bound="RuntimeTask")


def _rebuilt(cls: type[T], name: str, steps: Sequence[Step], env: Mapping[str, str], limits: Limits) -> T:
    task = cls(name)
    task._steps, task._env, task._limits = list(steps), dict(env), limits
    return task
