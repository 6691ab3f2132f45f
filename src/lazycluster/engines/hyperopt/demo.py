"""The demonstration of Hyperopt clusters in ``lazycluster demo``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.versions import check_manager
from lazycluster.core.words import counted

from .engine import HyperoptEngine

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup

TITLE = "a Hyperopt cluster"
PYTHON = """\
    from lazycluster import RuntimeGroup
    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    with RuntimeGroup(hosts=[...]) as group, HyperoptCluster(group) as cluster:
        cluster.start()
        best = fmin(objective, space, algo=tpe.suggest, max_evals=20, trials=cluster.trials("first"))"""


def check() -> None:
    """Raise an error, with the next step, if packages that are needed are not installed here."""
    check_manager(HyperoptEngine())


def show(group: RuntimeGroup, say: Callable[..., Any], *_: Any) -> None:
    """Start a cluster, and have it search for something.

    Args:
        group: The hosts.
        say: Prints a line.
    """
    from .cluster import HyperoptCluster

    say("\nA hyperparameter search on these hosts", style="bold")
    with tempfile.TemporaryDirectory() as folder, HyperoptCluster(group, dbpath=folder) as cluster:
        from hyperopt import fmin, hp, tpe

        began = time.perf_counter()
        cluster.start()
        workers = counted(group.runtime_count, "worker")
        say(f"  started in {time.perf_counter() - began:.1f} s: a database here, {workers} there")

        def objective(x: float) -> float:
            return (x - 3) ** 2

        space = hp.uniform("x", -10, 10)
        trials = cluster.trials("demo")
        best = fmin(objective, space, tpe.suggest, 30, trials=trials, show_progressbar=False, verbose=False)
        say(f"  the minimum of (x - 3)^2 is near x = {best['x']:.2f}, after 30 evaluations")
