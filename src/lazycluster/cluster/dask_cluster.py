"""The documented import path of `DaskCluster`, of its launchers, and of `ssh_cluster`."""

from __future__ import annotations

from lazycluster.engines.dask.cluster import DaskCluster, LocalMasterLauncher, RoundRobinLauncher
from lazycluster.engines.dask.ssh_cluster import ssh_cluster

__all__ = ["DaskCluster", "LocalMasterLauncher", "RoundRobinLauncher", "ssh_cluster"]
