"""The engines that are known: our own, and those of other packages, in the entry-point group ``lazycluster.engines``.

None is imported before it is named.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazycluster.cluster.engine_cluster import EngineCluster

__all__ = ["ALIASES", "DEMOS", "PACKAGES", "SUMMARY", "EngineEntry", "demo", "known", "load"]

GROUP = "lazycluster.engines"
DEMOS = ("dask", "hyperopt")
"""Engines with a demonstration, the one that is shown by default first."""
ALIASES = {"start-dask": "dask"}
"""Commands with names of their own that start an engine."""
PACKAGES = ("dask", "distributed", "hyperopt", "pymongo")
"""Packages whose versions on a host and on the manager are worth comparing."""
SUMMARY = "Start a Dask or Hyperopt cluster, until Ctrl-C."
"""A line on the command that starts engines."""


@dataclass(frozen=True)
class EngineEntry:
    """An engine that can be loaded.

    Attributes:
        name: The name by which ``lazycluster start`` knows it.
        target: Module and class of its cluster.
        summary: A line on it.
        package: The package that it comes with, "" for our own.
    """

    name: str
    target: str
    summary: str
    package: str = ""


_OURS = (
    EngineEntry("dask", "lazycluster.engines.dask.cluster:DaskCluster", "Start a Dask cluster."),
    EngineEntry("hyperopt", "lazycluster.engines.hyperopt.cluster:HyperoptCluster", "Start a Hyperopt cluster."),
)


def known() -> Mapping[str, EngineEntry]:
    """Return the engines that are installed, by name; ours cannot be replaced."""
    from importlib import metadata  # it takes as long as all else that the command line imports at first

    found = {entry.name: entry for entry in _OURS}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        package = point.dist.name if point.dist is not None else "?"
        summary = f"Start a cluster of {point.name} ({package})."
        found.setdefault(point.name, EngineEntry(point.name, point.value, summary, package))
    return found


def load(name: str) -> type[EngineCluster]:
    """Return the class of an engine's clusters.

    Raises:
        ClusterError: If there is no such engine, or its package is broken.
    """
    from lazycluster.cluster.engine_cluster import EngineCluster
    from lazycluster.cluster.exceptions import ClusterError

    entries = known()
    if name not in entries:
        raise ClusterError(f"there is no engine {name!r}; there are: {', '.join(entries)}")
    entry = entries[name]
    module, _, attribute = entry.target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not (isinstance(found, type) and issubclass(found, EngineCluster)):
            raise TypeError(f"{entry.target} is no subclass of lazycluster.engine.EngineCluster")
        found.engine_class  # noqa: B018  (a class without it states nothing)
    except Exception as error:  # a plug-in may do anything
        if not entry.package:
            raise
        problem = f"{type(error).__name__}: {error}"
        raise ClusterError(f"the engine {name!r} of the package {entry.package} cannot be loaded: {problem}") from error
    return found


def demo(name: str) -> types.ModuleType:
    """Return the module with an engine's demonstration."""
    return importlib.import_module(f"{__name__}.{name}.demo")
