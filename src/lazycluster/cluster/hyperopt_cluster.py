"""The documented import path of `HyperoptCluster`, its launchers and what a search has found."""

from __future__ import annotations

from lazycluster.engines.hyperopt.cluster import (
    EmbeddedMongoLauncher,
    HyperoptCluster,
    LocalMongoLauncher,
    RoundRobinLauncher,
    SearchProgress,
)

__all__ = ["EmbeddedMongoLauncher", "HyperoptCluster", "LocalMongoLauncher", "RoundRobinLauncher", "SearchProgress"]
