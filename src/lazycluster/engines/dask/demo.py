"""The demonstration of Dask clusters in ``lazycluster demo``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.versions import check_manager
from lazycluster.core.words import counted

from .engine import DaskEngine

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup

TITLE = "a Dask cluster"
PYTHON = """\
    from lazycluster import RuntimeGroup
    from lazycluster.cluster.dask_cluster import DaskCluster

    with RuntimeGroup(hosts=[...]) as group, DaskCluster(group) as cluster:
        cluster.start()
        client = cluster.get_client()"""

MISSING = """\
The extra "dask" adds Dask clusters (lazycluster start dask).
  In a checkout, pip install '.[dask]' installs it, too."""


def check() -> None:
    """Raise an error, with the next step, if packages that are needed are not installed here."""
    check_manager(DaskEngine())


def show(
    group: RuntimeGroup, say: Callable[..., Any], work: Callable[[int], int], calls: int, result: Callable[..., Any]
) -> None:
    """Start a cluster, and have it do something.

    Args:
        group: The hosts.
        say: Prints a line.
        work: What it is to do, with a number.
        calls: How often.
        result: Prints the sum of what came back, what it was made of, and since when.
    """
    from .cluster import DaskCluster

    say("\nA Dask cluster on these hosts", style="bold")
    with DaskCluster(group) as cluster:
        began = time.perf_counter()
        cluster.start()
        workers = counted(group.runtime_count, "worker")
        say(f"  started in {time.perf_counter() - began:.1f} s: a scheduler here, {workers} there")
        with cluster.get_client(timeout=10) as client:
            began = time.perf_counter()
            result(sum(client.gather(client.map(work, range(calls)))), "tasks", began)
