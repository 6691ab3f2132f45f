"""What a search on a cluster says when it has no result, and spaces with functions of the user's own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hyperopt")
pytest.importorskip("pymongo")

import numpy
from cluster_groups import ssh_group
from hyperopt import fmin, hp, rand
from hyperopt.exceptions import AllTrialsFailed
from hyperopt.pyll import scope

from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

pytestmark = [  # by hyperopt
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def cluster(module_hosts: Any, tmp_path_factory: Any) -> Iterator[HyperoptCluster]:
    with (
        ssh_group(module_hosts) as group,
        HyperoptCluster(group, dbpath=str(tmp_path_factory.mktemp("search") / "db")) as cluster,
    ):
        cluster.start(2)
        cluster.trials()  # the connection is kept, and with it PyMongo's threads
        yield cluster


def _search(cluster: HyperoptCluster, key: str, objective: Callable[[Any], Any], space: Any = None, **more: Any) -> Any:
    options = {"algo": rand.suggest, "show_progressbar": False, "max_evals": 2, "max_queue_len": 2, **more}
    space = hp.uniform("x", 0, 1) if space is None else space
    trials = cluster.trials(key)
    return fmin(objective, space, trials=trials, rstate=numpy.random.default_rng(0), **options)


def test_a_search_whose_trials_all_raise_says_how_many_and_why(cluster: HyperoptCluster) -> None:
    def boom(x: float) -> float:
        raise ValueError("the file train.csv has no column y")

    with pytest.raises(ClusterError) as caught:
        _search(cluster, "boom", boom)
    text = str(caught.value)
    assert "2 of 2 trials failed; the first, trial 0: ValueError: the file train.csv has no column y\n" in text
    # The next step that it names works.
    code = text.partition("its traceback is ")[2]
    assert "train.csv" in eval(code, {"trials": cluster.trials("boom")})


def _set(x: float) -> Any:
    return {"status": "ok", "loss": x, "members": {1, 2}}


def _large_number(x: float) -> Any:
    return {"status": "ok", "loss": x, "count": 2**70}


def _large_text(x: float) -> Any:
    return {"status": "ok", "loss": x, "text": "x" * 20_000_000}


@pytest.mark.parametrize(
    ("objective", "why"),
    [(_set, r"\{1, 2\} is a set"), (_large_number, "8-byte ints"), (_large_text, "too large")],
)
def test_results_that_cannot_be_stored_say_so(cluster: HyperoptCluster, objective: Any, why: str) -> None:
    with pytest.raises(
        ClusterError, match=f"2 of 2 trials failed.* cannot be stored in the database: .*{why}"
    ) as caught:
        _search(cluster, objective.__name__, objective)
    assert str(caught.value).count("Next step: ") == 1
    assert "'attachments'" in str(caught.value)


def test_trials_without_a_loss_say_so(cluster: HyperoptCluster) -> None:
    with pytest.raises(AllTrialsFailed, match="no result: 2 returned no loss with the status 'ok'"):
        _search(cluster, "status", lambda x: {"status": "fail"})
    with pytest.raises(AllTrialsFailed, match="no result: 2 returned no loss"):
        _search(cluster, "nan", lambda x: float("nan"))


def test_functions_that_the_user_has_defined_for_spaces_reach_the_workers(
    cluster: HyperoptCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @scope.define
    def lc_third(x: float) -> float:
        return x / 3

    monkeypatch.syspath_prepend(str(tmp_path))
    text = "from hyperopt.pyll import scope\n\n\n@scope.define\ndef lc_half(x):\n    return shrunk(x)\n"
    (tmp_path / "lc_spaces.py").write_text(f"{text}\n\ndef shrunk(x):\n    return x / 2\n")
    importlib.import_module("lc_spaces")
    x = hp.uniform("x", 3, 6)
    try:
        for key, space, most in (("third", scope.lc_third(x), 2), ("half", scope.lc_half(x), 3)):
            assert _search(cluster, key, lambda value: value, space).keys() == {"x"}
            assert max(cluster.trials(key).losses()) <= most
        _search(cluster, "both", lambda value: value["a"] + value["b"], {"a": scope.lc_third(x), "b": scope.lc_half(1)})
    finally:
        for name in ("lc_third", "lc_half"):
            scope.undefine(name)


def test_trials_are_counted_by_their_state(cluster: HyperoptCluster) -> None:
    """In the words that one tries first."""
    _search(cluster, "grouped", lambda x: x, max_evals=4)
    _search(cluster, "grouped", lambda x: 1 / 0, max_evals=6)
    trials = cluster.trials("grouped")
    pipeline = [
        {"$match": {"exp_key": "grouped"}},
        {
            "$group": {
                "_id": "$state",
                "count": {"$sum": 1},
                "best": {"$min": "$result.loss"},
                "mean": {"$avg": "$result.loss"},
            }
        },
    ]
    by_state = {found["_id"]: found for found in trials.handle.jobs.aggregate(pipeline)}
    losses = trials.losses()
    assert by_state[2]["count"] == len(losses) == 4
    assert by_state[2]["best"] == min(losses)
    assert abs(by_state[2]["mean"] - sum(losses) / 4) < 1e-9
    assert by_state[3]["count"] == 2
    assert by_state[3]["best"] is None


def test_the_end_of_a_cluster_ends_its_searches_with_an_error(module_hosts: Any, tmp_path: Path) -> None:
    def endless(x: float) -> float:
        threading.Event().wait()
        return x

    errors: list[Exception] = []

    def search() -> None:
        try:
            _search(cluster, "endless", endless)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    with ssh_group(module_hosts) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start(1)
        searching = threading.Thread(target=search)
        searching.start()
        while not cluster.progress("endless").running:
            assert searching.is_alive()
        cluster.cleanup()
        searching.join(60)
        assert not searching.is_alive()
    (error,) = errors
    assert isinstance(error, ClusterError)
    assert "the cluster has ended while the search ran" in str(error)
    assert "same exp_key" in str(error)


_WITH_FEW_FILES = """
import sys

import numpy
from hyperopt import fmin, hp, rand

from lazycluster import RuntimeGroup
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

with RuntimeGroup(hosts=["host1"], python=sys.executable) as group:
    with HyperoptCluster(group, dbpath=sys.argv[1]) as cluster:
        cluster.start(2)
        options = {"trials": cluster.trials("few"), "max_evals": 6, "max_queue_len": 6, "show_progressbar": False}
        fmin(lambda x: x * x, hp.uniform("x", 0, 1), algo=rand.suggest, **options)
        print(cluster.progress("few").done, "done")
    with HyperoptCluster(group, dbpath=sys.argv[1]) as cluster:
        try:
            cluster.start(50)
        except ClusterError as error:
            print(error)
"""


@pytest.mark.parametrize("files", [48, 64])
def test_a_manager_that_may_open_few_files(files: int, hosts: Any, tmp_path: Path) -> None:
    """A search of a size that fits works; a larger one is refused with the reason, before connections are closed."""
    limited = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash"]
    command = [*limited, sys.executable, "-c", _WITH_FEW_FILES, str(tmp_path / "db")]
    environment = {**os.environ, "LAZYCLUSTER_SSH_CONFIG": str(hosts.config_file)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert "6 done" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "50 workers have up to 308 connections to the database, and a process" in done.stdout
    assert f"may have only {files} open files" in done.stdout
    assert "Next step: start fewer, or allow more before you start Python: ulimit -n 1024" in done.stdout
