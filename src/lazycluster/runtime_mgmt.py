"""Groups of runtimes, and the manager that makes them of the hosts in the user's ssh configuration."""

from __future__ import annotations

from .group.group import RuntimeGroup
from .group.manager import RuntimeManager

__all__ = ["RuntimeGroup", "RuntimeManager"]
