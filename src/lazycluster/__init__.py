"""From a list of SSH hosts to a running Dask or Hyperopt cluster in a few lines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup, RuntimeManager
    from lazycluster.runtimes import LocalRuntime, Runtime, RuntimeTask
    from lazycluster.utils import Environment

__all__ = [
    "Environment",
    "LocalRuntime",
    "Runtime",
    "RuntimeGroup",
    "RuntimeManager",
    "RuntimeTask",
    "__version__",
]

__version__ = "0.1.0"

# Loaded when they are first used: the command line is to print its help at once.
_HOMES = {
    "Environment": "utils",
    "LocalRuntime": "runtimes",
    "Runtime": "runtimes",
    "RuntimeGroup": "runtime_mgmt",
    "RuntimeManager": "runtime_mgmt",
    "RuntimeTask": "runtimes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
