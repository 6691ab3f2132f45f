"""A cross-validated model search on a Dask cluster over SSH hosts and on this machine alone, and a dataframe's shuffle.

Usage: python examples/model_search.py [SSH_CONFIG]     (all hosts of ~/.ssh/config by default)

The hosts need the packages that this machine has: dask, distributed, scikit-learn, pandas, pyarrow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lazycluster import RuntimeGroup, RuntimeManager, RuntimeTask
from lazycluster.cluster.dask_cluster import DaskCluster

MODELS = 8
KEYS = 1000


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"-- {what}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.2f} s", flush=True)


def describe(path: str) -> str:
    """Count what was sent to the host (this function runs there)."""
    import csv
    import socket

    with open(path) as file:  # noqa: PTH123
        return f"{socket.gethostname()}: {sum(1 for _ in csv.reader(file)) - 1} digits"


def prepare(group: RuntimeGroup, path: str) -> None:
    """Send a file to all hosts, and run a command and a function on each."""
    task = RuntimeTask("prepare").send_file(path, "digits.csv").run_command("wc -c digits.csv")
    group.execute_task(task.run_function(describe, path="digits.csv"), broadcast=True)
    group.join()
    for line in group.function_returns:
        print(f"   {line}")


def search() -> tuple[Any, float]:
    """Search the parameters of a support vector machine where joblib does it; returns the model and the seconds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import RandomizedSearchCV
    from sklearn.svm import SVC

    digits = load_digits()
    space = {"C": [0.1, 1, 10, 100], "gamma": [1e-4, 1e-3, 1e-2], "tol": [1e-4, 1e-3, 1e-2, 1e-1]}
    model = RandomizedSearchCV(SVC(), space, n_iter=MODELS, cv=3, random_state=0)
    start = time.perf_counter()
    model.fit(digits.data, digits.target)
    return model, time.perf_counter() - start


def compare(client: Any) -> None:
    """Search on the hosts and on this machine alone."""
    import joblib

    print(f"-- Search the best of {MODELS} models, each trained 3 times", flush=True)
    with joblib.parallel_config("dask", client=client):
        model, there = search()
    print(f"   on the hosts, through joblib's Dask backend:   {there:5.2f} s", flush=True)
    with joblib.parallel_config("threading", n_jobs=-1):  # the training needs no lock of the interpreter
        alone, here = search()
    print(f"   on this machine alone, on all of its {joblib.cpu_count()} cores: {here:5.2f} s", flush=True)
    print(f"   the best of both: {', '.join(f'{name} = {value}' for name, value in model.best_params_.items())}")
    print(f"   cross-validated accuracy: {model.best_score_:.4f}")
    assert alone.best_params_ == model.best_params_
    assert model.best_score_ > 0.95


def shuffle(client: Any) -> None:
    """Group a dataframe by a key that is spread over all workers, so that the rows must travel between them."""
    import dask.dataframe as dd

    parts, rows = 12, 100_000
    frame = dd.from_map(make_part, range(parts), rows=rows)
    sums = frame.shuffle("key").groupby("key").value.sum().compute()
    # Part i holds the numbers from i * rows on, whose keys are their remainders.
    wanted = {key: sum(range(key, parts * rows, KEYS)) for key in range(KEYS)}
    assert sums.to_dict() == wanted, "the shuffle lost rows"
    print(f"   {parts * rows:,} rows went to the workers of their {len(wanted)} keys; all sums are right")


def make_part(number: int, rows: int) -> Any:
    """Make one part of the dataframe, on a worker."""
    import numpy as np
    import pandas as pd

    value = np.arange(number * rows, (number + 1) * rows)
    return pd.DataFrame({"key": value % KEYS, "value": value})


def main(config_file: str | None = None) -> None:
    """Run the example."""
    import tempfile
    from pathlib import Path

    from sklearn.datasets import load_digits

    with step("Connect to all hosts of the ssh configuration that have 500 MB of memory"):
        group = RuntimeManager(config_file=config_file).create_group(min_memory=500)
        group.print_hosts()
    with group, tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "digits.csv"
        load_digits(as_frame=True).frame.to_csv(path, index=False)
        with step("Send a file to each host, run a command and a function there"):
            prepare(group, str(path))
        with DaskCluster(group) as cluster:
            with step("Start a Dask cluster: scheduler here, workers there, TLS, through ssh only"):
                cluster.start()
                client = cluster.get_client()
                print(f"   workers: {len(client.scheduler_info()['workers'])}")
                print(f"   dashboard: {cluster.dashboard_link}")
            with client:
                compare(client)
                with step("Shuffle a dataframe between the workers"):
                    shuffle(client)


if __name__ == "__main__":
    main(*sys.argv[1:2])
