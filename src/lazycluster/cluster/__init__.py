"""Clusters: the contracts, and what all engines share. The engines are in `lazycluster.engines`."""

from __future__ import annotations

from .runtime_cluster import MasterLauncher, MasterWorkerCluster, RuntimeCluster, WorkerLauncher

__all__ = ["MasterLauncher", "MasterWorkerCluster", "RuntimeCluster", "WorkerLauncher"]
