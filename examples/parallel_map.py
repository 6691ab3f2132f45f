"""Estimate pi on all cores of some hosts, then search for the best parameters of a model with scikit-learn.

Usage: python examples/parallel_map.py HOST [HOST ...]     (without a host: on this machine)
"""

from __future__ import annotations

import random
import sys

from lazycluster import LocalRuntime, RuntimeGroup

DRAWS = 200_000


def hits(_: int) -> int:
    """Return how many of some random points lie in the quarter of a circle."""
    return sum(random.random() ** 2 + random.random() ** 2 <= 1 for _ in range(DRAWS))


def search(group: RuntimeGroup) -> None:
    """Search on the hosts, which need scikit-learn for that."""
    import joblib
    from sklearn.datasets import load_digits
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    features, labels = load_digits(return_X_y=True)
    grid = {"C": [0.1, 1, 10], "gamma": [0.0001, 0.001, 0.01]}
    with joblib.parallel_config("lazycluster", group=group):
        found = GridSearchCV(SVC(), grid).fit(features, labels)
    print(f"best parameters: {found.best_params_}, accuracy {found.best_score_:.3f}")


def main(hosts: list[str]) -> None:
    """Run both."""
    group = RuntimeGroup(hosts=hosts) if hosts else RuntimeGroup([LocalRuntime()])
    with group:
        total = 0
        for count, found in enumerate(group.map(hits, range(100), ordered=False), 1):
            total += found
            if count % 20 == 0:
                print(f"after {count} calls: pi is about {4 * total / (count * DRAWS):.4f}")
        try:
            search(group)
        except ModuleNotFoundError as error:
            print(f"no search: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
