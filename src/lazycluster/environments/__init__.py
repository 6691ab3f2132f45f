"""Python environments on the hosts: specification, resolution, building, use and removal."""

from __future__ import annotations

from .spec import EnvironmentSpec

__all__ = ["EnvironmentSpec"]
