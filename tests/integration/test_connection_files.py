"""Another process connects to a cluster with its connection file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazycluster import LocalRuntime, RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster


def _python(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dask(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    with RuntimeGroup([LocalRuntime()]) as group, DaskCluster(group) as cluster:
        with pytest.raises(ClusterError, match="was not started"):
            cluster.write_connection_file(path)
        cluster.start()
        cluster.write_connection_file(path)
        assert json.loads(path.read_text())["manager"] == os.getpid()
        with pytest.raises(ClusterError, match="is of a DaskCluster"):
            HyperoptCluster.connect(path)
        program = (
            "import sys; from lazycluster.cluster.dask_cluster import DaskCluster\n"
            "with DaskCluster.connect(sys.argv[1]) as client: print(client.submit(pow, 2, 10).result())"
        )
        assert _python(program, str(path)) == "1024\n"
        mine = tmp_path / "thesis.ipynb"
        mine.write_text("years")
        with pytest.raises(ClusterError, match="it is not replaced"):
            cluster.write_connection_file(mine)
        other = cluster.write_connection_file(tmp_path / "other.json")
        mine.replace(other)
        cluster.cleanup()
        with pytest.raises(ClusterError):  # it would lead nowhere
            cluster.write_connection_file(tmp_path / "late.json")
    assert not path.exists()
    assert other.read_text() == "years"
    with pytest.raises(ClusterError, match="no such connection file"):
        DaskCluster.connect(path)


def test_hyperopt(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    with (
        RuntimeGroup([LocalRuntime()]) as group,
        HyperoptCluster(group, dbpath=str(tmp_path / "trials")) as cluster,
    ):
        cluster.start()
        cluster.write_connection_file(path)
        program = (
            "import sys; from hyperopt import fmin, hp, rand\n"
            "from lazycluster.cluster.hyperopt_cluster import HyperoptCluster\n"
            "trials = HyperoptCluster.connect(sys.argv[1], exp_key='e')\n"
            "fmin(abs, hp.uniform('x', -1, 1), rand.suggest, 3, trials=trials, show_progressbar=False, verbose=False)\n"
            "print(len(trials))"
        )
        assert _python(program, str(path)) == "3\n"
    assert not path.exists()
