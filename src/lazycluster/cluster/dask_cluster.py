"""The documented import path of `DaskCluster` and its launchers."""

from __future__ import annotations

from lazycluster.engines.dask.cluster import DaskCluster, LocalMasterLauncher, RoundRobinLauncher

__all__ = ["DaskCluster", "LocalMasterLauncher", "RoundRobinLauncher"]
