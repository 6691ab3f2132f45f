"""Tunes a model on the hosts that are named on the command line, or on this machine if there is none.

The data is sent to the hosts as a file; each trial reads it from the working directory of its host.

Usage: python examples/hyperopt_search.py [host ...]

The hosts need an SSH server, and Python with hyperopt, pymongo and scikit-learn as here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hyperopt import fmin, hp, space_eval, tpe

from lazycluster import RuntimeGroup
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
from lazycluster.runtimes import LocalRuntime

SPACE = {
    "learning_rate": hp.loguniform("learning_rate", -4, 0),
    "max_leaf_nodes": hp.uniformint("max_leaf_nodes", 4, 40),
    "l2_regularization": hp.loguniform("l2_regularization", -8, 2),
}


def objective(parameters: dict[str, Any]) -> float:
    """Return how often a model with these parameters is wrong; runs on the hosts."""
    import os

    import pandas
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import cross_val_score

    data = pandas.read_csv(os.path.join(os.environ["WORKING_DIR"], "cancer.csv"))
    parameters = {**parameters, "max_leaf_nodes": int(parameters["max_leaf_nodes"])}
    model = HistGradientBoostingClassifier(max_iter=30, **parameters)
    return float(1 - cross_val_score(model, data.drop(columns="target"), data["target"], cv=3).mean())


def main(hosts: list[str]) -> None:
    """Start a cluster, search, and end it."""
    from sklearn.datasets import load_breast_cancer

    group = RuntimeGroup(hosts=hosts) if hosts else RuntimeGroup([LocalRuntime()])
    with group, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cancer.csv")
        load_breast_cancer(as_frame=True).frame.to_csv(file, index=False)
        group.send_file(str(file), "cancer.csv", execute_async=False)
        with HyperoptCluster(group, dbpath=f"{folder}/trials") as cluster:
            cluster.start(worker_count=2 * group.runtime_count)
            best = fmin(
                objective,
                SPACE,
                algo=tpe.suggest,
                max_evals=24,
                max_queue_len=4 * group.runtime_count,  # hyperopt looks for results once per second
                trials=cluster.trials("cancer"),
                show_progressbar=False,
            )
            print(cluster.progress("cancer"))
            print(f"best: {space_eval(SPACE, best)}")


if __name__ == "__main__":
    main(sys.argv[1:])
