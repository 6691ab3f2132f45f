"""Tunes gradient boosting on SSH hosts with hyperopt. The data is a CSV file that is sent to the hosts.

Usage: python examples/hyperopt_search.py [SSH_CONFIG [PICTURE]]     (all hosts of ~/.ssh/config by default)

The hosts need the packages that this machine has: hyperopt, pymongo, scikit-learn, pandas.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lazycluster import RuntimeManager
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

EVALUATIONS = 16


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"-- {what}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.2f} s", flush=True)


def objective(parameters: dict[str, Any]) -> float:
    """Return how often a model with these parameters is wrong (this function runs on the hosts)."""
    import os

    import pandas
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import cross_val_score

    data = pandas.read_csv(os.path.join(os.environ["WORKING_DIR"], "cancer.csv"))
    parameters = {**parameters, "max_leaf_nodes": int(parameters["max_leaf_nodes"])}
    model = HistGradientBoostingClassifier(max_iter=25, random_state=0, **parameters)
    return float(1 - cross_val_score(model, data.drop(columns="target"), data["target"], cv=3).mean())


def search(cluster: HyperoptCluster) -> None:
    """Search the parameters; an objective that fails, a worker or a host that goes, costs no more than itself."""
    from hyperopt import fmin, hp, space_eval, tpe

    space = {
        "learning_rate": hp.loguniform("learning_rate", -5, 0),
        "max_leaf_nodes": hp.quniform("max_leaf_nodes", 4, 40, 1),
        "l2_regularization": hp.loguniform("l2_regularization", -8, 2),
    }
    # hyperopt looks for results once per second: there should be work for the workers until then.
    options: dict[str, Any] = {"max_evals": EVALUATIONS, "max_queue_len": 6, "show_progressbar": False}
    best = fmin(objective, space, algo=tpe.suggest, trials=cluster.trials("cancer"), **options)
    progress = cluster.progress("cancer")
    print(f"   by worker: {', '.join(f'{name}: {count}' for name, count in sorted(progress.per_worker.items()))}")
    print(f"   wrong in {progress.best_loss:.1%} of the cases with")
    for name, value in space_eval(space, best).items():
        print(f"     {name} = {value:.4g}")
    assert progress.done == EVALUATIONS
    assert progress.best_loss is not None
    assert progress.best_loss < 0.06


def main(config_file: str | None = None, picture: str | None = None) -> None:
    """Run the example."""
    from sklearn.datasets import load_breast_cancer

    with step("Connect to all hosts of the ssh configuration"):
        group = RuntimeManager(config_file=config_file).create_group()
    with group, tempfile.TemporaryDirectory() as folder:
        with step("Send a CSV file to each host"):
            path = Path(folder, "cancer.csv")
            load_breast_cancer(as_frame=True).frame.to_csv(path, index=False)
            group.send_file(str(path), "cancer.csv", execute_async=False)
        with HyperoptCluster(group, dbpath=f"{folder}/trials") as cluster:
            with step("Start a Hyperopt cluster: database here, workers there, through ssh only"):
                cluster.start()
            with step(f"Tune gradient boosting: {EVALUATIONS} evaluations, each trains it 3 times"):
                search(cluster)
            if picture:
                cluster.plot("cancer", picture)
                print(f"-- The losses of all trials: {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
