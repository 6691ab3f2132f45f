"""The manager's environment, with the packages that people really use, on hosts that have none of them and no network.

Usage: python scripts/environments.py [way ...]        (ways: direct, bastion, no-forwarding; all by default)

The hosts' own Python is 3.8; the manager's version lies where no PATH leads to. On three of them, each time in fresh
homes: a function that needs scikit-learn and pandas, a Dask cluster and a Hyperopt search, which must give what they
give here. It needs root (for the throw-away hosts), the packages named here in the environment that runs it, and the
package index that this machine is configured for.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
from sshhosts import Hosts

NEEDED = ("sklearn", "pandas", "distributed", "hyperopt", "uv")
COUNT = 3
WAYS: dict[str, dict[str, Any]] = {
    "direct": {},
    "bastion": {"bastion": True},
    "no-forwarding": {"forwarding": False},
}


def learned(seed: int = 0) -> tuple[float, float]:
    """Return what scikit-learn and pandas make of some numbers."""
    import numpy
    import pandas
    from sklearn.linear_model import LinearRegression

    rows = numpy.random.default_rng(seed).normal(size=(200, 3))
    table = pandas.DataFrame(rows, columns=["a", "b", "c"])
    model = LinearRegression().fit(table[["a", "b"]], table["c"])
    return float(round(model.coef_[0], 9)), float(round(table.groupby(table["a"] > 0)["c"].mean().iloc[1], 9))


def versions() -> dict[str, str]:
    """Return the version of Python and of some packages."""
    import sys
    from importlib import metadata

    names = ("scikit-learn", "pandas", "numpy", "dask", "distributed", "hyperopt")
    return {"python": "{}.{}".format(*sys.version_info), **{name: metadata.version(name) for name in names}}


def objective(x: float) -> float:
    """Return the loss of a parabola, by way of scikit-learn."""
    from sklearn.metrics import mean_squared_error

    return float(mean_squared_error([3.0], [x]))


# --- what has to be right -------------------------------------------------------------------------
def functions(group: RuntimeGroup) -> None:
    """A function with real packages."""
    here = learned()
    assert list(group.call(learned).values()) == [here] * COUNT
    assert list(group.call(versions).values()) == [versions()] * COUNT
    assert list(group.map(learned, range(4))) == [learned(seed) for seed in range(4)]


def dask(group: RuntimeGroup) -> None:
    """A Dask cluster."""
    import dask.array

    with DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=60) as client:
            client.wait_for_workers(COUNT, timeout=60)
            futures = client.map(learned, range(12), pure=False)
            assert client.gather(futures) == [learned(seed) for seed in range(12)]
            numbers = dask.array.arange(1_000_000, chunks=100_000)
            assert int((numbers * 2).sum().compute(scheduler=client)) == 999_999_000_000


def hyperopt(group: RuntimeGroup) -> None:
    """A Hyperopt search."""
    from hyperopt import fmin, hp, tpe

    with HyperoptCluster(group) as cluster:
        cluster.start()
        trials = cluster.trials("environments")
        space = hp.uniform("x", -10, 10)
        best = fmin(objective, space, tpe.suggest, 30, trials=trials, max_queue_len=6, show_progressbar=False)
        assert len(trials.losses()) == 30
        assert abs(best["x"] - 3) < 3, best
        assert min(trials.losses()) == objective(best["x"])


# --- the ways to get there ------------------------------------------------------------------------
@contextmanager
def _group(way: str) -> Iterator[RuntimeGroup]:
    with Hosts(COUNT, python="3.8", path=(sys.base_prefix,), **WAYS[way]) as hosts:
        version = "{}.{}".format(*sys.version_info)
        for host in hosts:
            host.run(f"mkdir -p ~/deep/below && ln -s {sys.base_prefix} ~/deep/below/{version}", user=host.user)
            assert host.run("ip route get 1.1.1.1", check=False).returncode != 0, "the host has a way out"
        # Where ports cannot be forwarded, the agent carries them.
        settings = {"config_file": str(hosts.config_file)} | ({"relay": "agent"} if way == "no-forwarding" else {})
        setup = "export PATH=/root/nowhere:/usr/bin:/bin"
        with RuntimeGroup(
            hosts=list(hosts.names), connection_kwargs=settings, environment="manager", setup=setup
        ) as group:
            yield group
        for host in hosts:
            assert host.leftovers() == [], host.leftovers()


def _timed(way: str, what: str, work: Callable[[], object]) -> None:
    start = time.monotonic()
    work()
    print(f"{way:<14} {what:<34} right, {time.monotonic() - start:6.1f} s", flush=True)


def main(ways: list[str]) -> int:
    """Do it all; returns the exit status."""
    unknown = [way for way in ways if way not in WAYS]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if unknown or missing:
        print(f"unknown: {unknown}; there are: {list(WAYS)}" if unknown else f"install here first: {missing}")
        return 2
    for way in ways or list(WAYS):
        with _group(way) as group:
            python = {runtime.host: runtime.connection.hello.python[:2] for runtime in group.runtimes}
            assert set(python.values()) == {(3, 8)}, python
            _timed(way, "environment, nothing on the host", group.prepare)
            for work in (functions, dask, hyperopt):
                _timed(way, str(work.__doc__).rstrip("."), lambda work=work: work(group))  # type: ignore[misc]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
