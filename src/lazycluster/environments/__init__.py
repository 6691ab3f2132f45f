"""Python environments on the hosts: what one is, and how it is made, used and kept."""

from __future__ import annotations

from .spec import EnvironmentSpec

__all__ = ["EnvironmentSpec"]
