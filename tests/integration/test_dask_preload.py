"""Modules that the workers of a Dask cluster have before they are ready."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from cluster_groups import local_group

from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.exceptions import ClusterStartError, WorkerStartError

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_modules_are_there_before_work_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of packages, also after a restart, and the user's own, whose `dask_setup` is called."""
    (tmp_path / "my_setup.py").write_text("def dask_setup(worker):\n    worker.told = 'by my_setup'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("my_setup")
    with local_group(1) as group, DaskCluster(group, nthreads=1, preload="wave, my_setup") as cluster:
        cluster.start()
        with cluster.get_client(timeout=10) as client:
            for _ in range(2):
                assert list(client.run(lambda: {"wave", "my_setup"} <= set(sys.modules)).values()) == [True]
                assert list(client.run(lambda dask_worker: dask_worker.told).values()) == ["by my_setup"]
                client.restart(timeout=60)
            # The worker process is a copy of this one, so it need not import anything.
            assert list(client.run(lambda: "wave" in sys.modules, nanny=True).values()) == [True]
            assert client.run_on_scheduler(lambda: "wave" in sys.modules)  # it unpickles the work
            assert "LAZYCLUSTER_EARLY_IMPORTS" not in str(client.run(lambda: dict(__import__("os").environ)))


def test_without_it_they_are_not() -> None:
    with local_group(1) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        with cluster.get_client(timeout=10) as client:
            assert list(client.run(lambda: "wave" in sys.modules).values()) == [False]


def test_a_module_that_is_not_there_is_an_error() -> None:
    missing = pytest.raises((WorkerStartError, ClusterStartError), match="No module named 'no_such_module'")
    with local_group(1) as group, DaskCluster(group, nthreads=1, preload=["no_such_module"]) as cluster, missing:
        cluster.start()


@pytest.mark.parametrize("preload", [[1], [b"wave"]], ids=str)
def test_what_is_no_name_is_refused(preload: Any) -> None:
    with local_group(1) as group, pytest.raises(ValueError, match="names of modules"):
        DaskCluster(group, preload=preload)
