"""The manager's environment, with the packages that people really use, on hosts that have none of them and no network.

Usage: python scripts/environments.py [way ...]        (ways: direct, bastion, no-forwarding; all by default)

The hosts' own Python is 3.8; the manager's version lies where no PATH leads to. On three of them, each time in fresh
homes: a function that needs scikit-learn and pandas, a Dask cluster and a Hyperopt search, which must give what they
give here; and all three with a module and an editable package that change in between. It needs root (for the throw-away
hosts), the packages named here in the environment that runs it, and the package index that this machine is configured
for.
"""

from __future__ import annotations

import importlib
import importlib.util
import site
import subprocess
import sys
import tempfile
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
from wheelhouse import make_project

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


class Edited:
    """A plain module, and a package in editable mode that it uses: what somebody works on.

    Args:
        folder: Where they are to be.
    """

    def __init__(self, folder: Path) -> None:
        self._plain = folder / "plainly.py"
        project = make_project(folder, "edited", "VALUE = 0\n")
        self._package = project / "src/edited/__init__.py"
        options = ["-q", "--no-deps", "--target", str(folder / "site"), "-e", str(project)]
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", *options], check=True)
        site.addsitedir(str(folder / "site"))
        sys.path.insert(0, str(folder))

    def changed(self, number: int) -> Any:
        """Change both, and return the plain module as it is now; what it returns has the number in it twice."""
        self._package.write_text(f"VALUE = {number}\n")
        both = f"def both(_):\n    return edited.VALUE, {number}\n"
        self._plain.write_text(f"import edited\n\n\n{both}\n\ndef loss(x):\n    return sum(both(x))\n")
        importlib.invalidate_caches()
        for name in ("edited", "plainly"):
            importlib.reload(importlib.import_module(name))
        return sys.modules["plainly"]


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


def changed_code(group: RuntimeGroup, edited: Edited) -> None:
    """Changed code: functions, Dask, Hyperopt."""
    from hyperopt import fmin, hp, rand

    with DaskCluster(group) as dask_cluster, HyperoptCluster(group) as hyperopt_cluster:
        dask_cluster.start()
        hyperopt_cluster.start()
        with dask_cluster.get_client(timeout=60) as client:
            client.wait_for_workers(COUNT, timeout=60)
            for number in (1, 22, 333):
                module, pair = edited.changed(number), (number, number)
                assert list(group.call(module.both, 0).values()) == [pair] * COUNT
                assert set(group.map(module.both, range(6))) == {pair}
                assert set(client.gather(client.map(module.both, range(6), pure=False))) == {pair}
                trials = hyperopt_cluster.trials(f"changed {number}")
                space = hp.uniform("x", 0, 1)
                fmin(module.loss, space, rand.suggest, 6, trials=trials, max_queue_len=6, show_progressbar=False)
                assert trials.losses() == [2 * number] * 6


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
    with tempfile.TemporaryDirectory() as folder:
        edited = Edited(Path(folder))
        return _all(ways or list(WAYS), edited)


def _all(ways: list[str], edited: Edited) -> int:
    for way in ways:
        with _group(way) as group:
            python = {runtime.host: runtime._connection.agent_info.python[:2] for runtime in group.runtimes}
            assert set(python.values()) == {(3, 8)}, python
            _timed(way, "environment, nothing on the host", group.prepare)
            for work in (functions, dask, hyperopt):
                _timed(way, str(work.__doc__).rstrip("."), lambda work=work: work(group))  # type: ignore[misc]
            _timed(way, str(changed_code.__doc__).rstrip("."), lambda: changed_code(group, edited))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
