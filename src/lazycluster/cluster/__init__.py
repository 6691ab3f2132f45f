"""Clusters: the contracts, and what all engines share. The engines are in `lazycluster.engines`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime_cluster import MasterLauncher, MasterWorkerCluster, RuntimeCluster, WorkerLauncher

__all__ = ["MasterLauncher", "MasterWorkerCluster", "RuntimeCluster", "WorkerLauncher"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runtime_cluster

    return getattr(runtime_cluster, name)
