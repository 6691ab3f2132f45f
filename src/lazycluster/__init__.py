"""From a list of SSH hosts to a running Dask or Hyperopt cluster in a few lines."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from .pool import joblib_registration

if TYPE_CHECKING:
    from .cluster_file.load import load_cluster_file
    from .cluster_file.spec import ClusterSpec
    from .engines import connect
    from .environments.spec import EnvironmentSpec
    from .runtime_mgmt import RuntimeGroup, RuntimeManager
    from .runtimes import LocalRuntime, Runtime, RuntimeTask
    from .tasks.detached import DetachedTask
    from .utils import Environment

__all__ = [
    "ClusterSpec",
    "DetachedTask",
    "Environment",
    "EnvironmentSpec",
    "LocalRuntime",
    "Runtime",
    "RuntimeGroup",
    "RuntimeManager",
    "RuntimeTask",
    "__version__",
    "connect",
    "load_cluster_file",
]

__version__ = "1.0.0rc1"

_HOMES = {
    "ClusterSpec": "cluster_file.spec",
    "DetachedTask": "tasks.detached",
    "Environment": "utils",
    "EnvironmentSpec": "environments.spec",
    "LocalRuntime": "runtimes",
    "Runtime": "runtimes",
    "RuntimeGroup": "runtime_mgmt",
    "RuntimeManager": "runtime_mgmt",
    "RuntimeTask": "runtimes",
    "connect": "engines",
    "load_cluster_file": "cluster_file.load",
}
_SELDOM = {"ClusterSpec", "connect", "load_cluster_file"}  # loaded when they are asked for: they need all of `cluster`


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The command line is to print its help at once, so it loads them when it needs them. Everywhere else those that nearly
# every program uses are there from the start, also for tools that look at a namespace without asking for its names.
if not (sys.argv and os.path.basename(sys.argv[0]) == "lazycluster"):
    for _name in [name for name in _HOMES if name not in _SELDOM]:
        __getattr__(_name)


joblib_registration.announce()
