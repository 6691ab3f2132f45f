"""The engines that are known: our own, and those of other packages, in the entry-point group ``lazycluster.engines``.

None is imported before it is named.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from lazycluster.cluster.engine_cluster import EngineCluster

__all__ = ["ALIASES", "DEMOS", "PACKAGES", "SUMMARY", "EngineEntry", "connect", "demo", "known", "load"]

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
        clashing: Another package that has one of the same name.
    """

    name: str
    target: str
    summary: str
    package: str = ""
    clashing: str = ""


_OURS = (
    EngineEntry("dask", "lazycluster.engines.dask.cluster:DaskCluster", "Start a Dask cluster."),
    EngineEntry("hyperopt", "lazycluster.engines.hyperopt.cluster:HyperoptCluster", "Start a Hyperopt cluster."),
)


def known() -> Mapping[str, EngineEntry]:
    """Return the engines that are installed, by name; ours cannot be replaced."""
    found = {entry.name: entry for entry in _OURS}
    for package, point in sorted(_points(), key=lambda pair: (pair[1].name, pair[0])):
        entry = EngineEntry(point.name, point.value, f"Start a cluster of {point.name} ({package}).", package)
        other = found.setdefault(point.name, entry)
        if other.package not in ("", package):
            found[point.name] = replace(other, clashing=package)
    return found


def _points() -> Iterator[tuple[str, EntryPoint]]:
    """Yield what packages have registered, with their names; those whose metadata cannot be read are passed over."""
    from importlib import metadata  # it takes as long as all else that the command line imports at first

    seen = set()
    for distribution in metadata.distributions():
        try:
            points = list(distribution.entry_points.select(group=GROUP))
            package = (distribution.name or "?") if points else ""
        except Exception:  # noqa: BLE001, S112  (they may hold anything, and are nothing to whoever names another engine)
            continue
        if points and package not in seen:  # the first on the path is the one that is imported
            seen.add(package)
            yield from ((package, point) for point in points)


def load(name: str) -> type[EngineCluster]:
    """Return the class of an engine's clusters.

    Raises:
        ClusterError: If there is no such engine, or its package is broken.
    """
    from lazycluster.cluster.engine import check_statement
    from lazycluster.cluster.engine_cluster import EngineCluster
    from lazycluster.cluster.exceptions import ClusterError
    from lazycluster.core.suggestions import suggestion
    from lazycluster.exceptions import one_line

    entries = known()
    if name not in entries:
        raise ClusterError(f"there is no engine {name!r}{suggestion(name, entries)}")
    entry = entries[name]
    if entry.clashing:
        raise ClusterError(
            f"the engine {name!r} is in two packages, {entry.package} and {entry.clashing}: uninstall one of them"
        )
    module, _, attributes = entry.target.partition("[")[0].strip().partition(":")
    try:
        found = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
        if not (isinstance(found, type) and issubclass(found, EngineCluster)):
            raise TypeError(f"{entry.target} is not a subclass of lazycluster.engine.EngineCluster")
        check_statement(found.engine_class)
    except (Exception, SystemExit) as error:  # a plug-in may do anything
        if not entry.package:
            raise
        problem = one_line(f"{type(error).__name__}: {error}")
        raise ClusterError(f"the engine {name!r} of the package {entry.package} cannot be loaded: {problem}") from error
    return found


def connect(name: str, **options: Any) -> Any:
    """Return a client of a cluster in the background.

    It sends your own modules as the cluster's own client does.

    Args:
        name: The name of the cluster, as ``lazycluster up NAME`` or ``DaskCluster(group, name=NAME)`` was given.
        **options: What ``connect`` of the cluster's class takes beside a file, e.g. ``timeout`` with Dask, ``exp_key``
            with Hyperopt.

    Returns:
        For Dask a `distributed.Client`, for Hyperopt a `MongoTrials`.

    Raises:
        BackgroundError: If there is no such cluster; says why.
        ValueError: If the name cannot be one.

    Examples:
        >>> client = lazycluster.connect("night")              # doctest: +SKIP
        >>> client.submit(pow, 2, 10).result()                 # doctest: +SKIP
        1024
    """
    from lazycluster.background.client import running

    process = running(name)
    record = process.found.record
    engine = str(record.details.get("engine")) if record is not None else ""
    return load(engine).connect_to(process, **options)


def demo(name: str) -> types.ModuleType:
    """Return the module with an engine's demonstration."""
    return importlib.import_module(f"{__name__}.{name}.demo")
