"""What the workers of a Hyperopt cluster give to objectives: GPUs, modules of the user's own, an empty directory."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("hyperopt")
pytest.importorskip("pymongo")

from cluster_groups import connect

import fakegpus
from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
from patience import until
from wheelhouse import make_project

pytestmark = [  # by hyperopt
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning"),
]

_OBJECTIVE = """
import os
from pathlib import Path

import scales
from scales import shifted

def objective(x):
    found = sorted(os.listdir())
    Path("written").write_text("x")
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MONGO_CONNECTION_URL")
    told = {"x": x, "found": found, "cwd": os.getcwd(), **{name: os.environ.get(name) for name in names}}
    return {"loss": shifted(x) * scales.FACTOR, "status": "ok", **told}

def broken(x):
    Path("written").write_text("x")
    raise scales.OwnError(x)
"""
_SCALES = """
FACTOR = 1.0

class OwnError(Exception):
    pass

def shifted(x):
    return x + 1000
"""


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module that no host has, which needs another one."""
    (tmp_path / "search.py").write_text(_OBJECTIVE)
    (tmp_path / "scales.py").write_text(_SCALES)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("search")
    for name in ("search", "scales"):
        sys.modules.pop(name, None)


def _run(cluster: HyperoptCluster, objective: Any, key: str) -> Any:
    from hyperopt import fmin, hp, rand

    options: dict[str, Any] = {"show_progressbar": False, "return_argmin": False}
    trials = cluster.trials(key)
    fmin(objective, hp.uniform("x", 0, 1), rand.suggest, 8, max_queue_len=8, trials=trials, **options)
    return trials


def test_what_an_objective_finds(tmp_path: Path, search: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["scales"], "FACTOR", 2.0)  # as somebody does who tries things in a notebook
    smi = fakegpus.stand_in(tmp_path / "smi", 2)
    runtime = LocalRuntime(host="here", env={"PATH": f"{smi}:{os.environ['PATH']}"})
    with (
        RuntimeGroup([runtime]) as group,
        HyperoptCluster(group, dbpath=str(tmp_path / "db"), gpus_per_worker=1) as cluster,
    ):
        cluster.start()
        trials = _run(cluster, search.objective, "found")
        results = trials.results
        assert [result["loss"] for result in results] == [2 * (result["x"] + 1000) for result in results]
        gpus = {trial["owner"][0]: trial["result"]["CUDA_VISIBLE_DEVICES"] for trial in trials.trials}
        assert len(set(gpus.values())) == len(gpus)  # each worker has its own; one may have done it all
        assert set(gpus.values()) <= {"0", "1"}
        assert {result["OMP_NUM_THREADS"] for result in results} == {"1"}
        assert {result["MONGO_CONNECTION_URL"] for result in results} == {cluster.mongo_url}
        assert {tuple(result["found"]) for result in results} == {()}
        failed = list(_run(cluster, search.broken, "broken").handle.jobs.find({"exp_key": "broken"}))
        assert {document["error"][0] for document in failed} == {"OwnError"}
        assert "search.py" in failed[0]["traceback"]
        # Nothing of it is left, neither of the trials that succeeded nor of those that failed.
        scratch = {Path(result["cwd"]).parent for result in results}
        assert [path for folder in scratch for path in folder.iterdir()] == []
        assert len(scratch) == len(gpus)
        with pytest.raises(ClusterError, match="0 more workers"):
            cluster.start_workers(1)


def test_changed_modules_reach_the_workers(hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain module, and a package whose checkout is installed: its sources are on the path here, and nowhere else.

    A module with a lock goes as source, others by value.
    """
    checkout = make_project(tmp_path, "edited", "OFFSET = 1\n")
    monkeypatch.syspath_prepend(checkout / "src")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "plainly.py"
    path.write_text("import edited\n\n\ndef objective(x):\n    return edited.OFFSET + 10\n")
    guarded = tmp_path / "guarded.py"
    with_lock = "import threading\nimport edited\n\nLOCK = threading.Lock()\n\n\ndef objective(x):\n    with LOCK:\n"
    guarded.write_text(with_lock + "        return edited.OFFSET + 30\n")
    plainly, locked = map(importlib.import_module, ("plainly", "guarded"))
    try:
        with (
            connect(hosts.config_file, ["host1"], environment=sys.prefix) as group,
            HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster,
        ):
            cluster.start()
            assert set(_run(cluster, plainly.objective, "before").losses()) == {11}
            assert set(_run(cluster, locked.objective, "before, with a lock").losses()) == {31}
            (checkout / "src/edited/__init__.py").write_text("OFFSET = 2\n# another length\n")
            path.write_text("import edited\n\n\ndef objective(x):\n    return edited.OFFSET + 2000\n")
            importlib.reload(sys.modules["edited"])
            assert set(_run(cluster, importlib.reload(plainly).objective, "after").losses()) == {2002}
            guarded.write_text(with_lock + "        return edited.OFFSET + 4000\n")
            assert set(_run(cluster, importlib.reload(locked).objective, "after, with a lock").losses()) == {4002}
    finally:
        for name in ("plainly", "guarded", "edited"):
            sys.modules.pop(name, None)


def test_workers_come_and_go_and_no_trial_is_lost(tmp_path: Path) -> None:
    from hyperopt import fmin, hp, rand

    def slow(x: float) -> float:
        import time

        time.sleep(0.3)
        return x * x

    def search() -> None:
        how: Any = {"trials": cluster.trials("scaled"), "max_queue_len": 6, "show_progressbar": False, "verbose": False}
        fmin(slow, hp.uniform("x", -1, 1), rand.suggest, 24, **how)

    runtimes = [LocalRuntime(host=f"local{number}") for number in range(2)]
    with RuntimeGroup(runtimes) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start(4)
        searching = threading.Thread(target=search)
        searching.start()
        until(lambda: cluster.progress("scaled").running >= 3, "trials are being evaluated")
        cluster.scale(1)
        assert [worker.state for worker in cluster.workers] == ["ready"]
        cluster.scale(3)
        searching.join(60)
        assert not searching.is_alive()
        found = cluster.progress("scaled")
        assert (found.done, found.failed, found.problem) == (24, 0, None)
        with pytest.raises(ValueError, match="the number of workers must be an integer of at least 0"):
            cluster.scale(-1)
    with pytest.raises(ClusterError, match="call start"):
        cluster.scale(1)
