"""Groups of runtimes, and the manager that makes them of the hosts in the user's ssh configuration."""

from __future__ import annotations

from lazycluster._group.group import RuntimeGroup
from lazycluster._group.manager import RuntimeManager

__all__ = ["RuntimeGroup", "RuntimeManager"]
