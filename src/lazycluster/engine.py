"""The parts of an engine of your own; see "An engine of your own" in the documentation."""

from __future__ import annotations

from .cluster.engine import Endpoint, Engine, Option
from .cluster.engine_cluster import EngineCluster
from .cluster.network import Port, Reach
from .cluster.service_spec import ServiceSpec

__all__ = ["Endpoint", "Engine", "EngineCluster", "Option", "Port", "Reach", "ServiceSpec"]
