"""Searches that an earlier version has begun are finished by this one: see tests/fixtures/make.py."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hyperopt")
pytest.importorskip("pymongo")

from cluster_groups import local_group

from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

pytestmark = [  # by hyperopt
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning"),
]

_FIXTURES = Path(__file__).parents[1] / "fixtures"
_SEARCHES = sorted(path.parent for path in _FIXTURES.glob("*/search-*/lazycluster-mongo.sqlite"))
_LOSSES = {"search-plain": abs, "search-local": lambda x: abs(x - 2.0)}
DONE = 2


def _python(search: Path) -> str:
    return next((search.parent / "environments" / "envs").glob("py*-*/lazycluster.json")).parent.name.partition("-")[0]


@pytest.mark.parametrize("search", _SEARCHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_waiting_trials_are_evaluated(search: Path, tmp_path: Path) -> None:
    if search.name == "search-local" and _python(search) != f"py{sys.version_info[0]}{sys.version_info[1]}":
        pytest.skip("code is sent between equal versions of Python only")
    shutil.copytree(search, tmp_path / "db")
    (tmp_path / "db").chmod(0o700)
    (tmp_path / "db" / "lazycluster-mongo.sqlite").chmod(0o600)
    with local_group(1) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start()
        jobs: Any = cluster.trials("search").handle.jobs
        deadline = time.monotonic() + 60
        while jobs.count_documents({"state": DONE}) < 6:
            assert time.monotonic() < deadline, list(jobs.find())
            time.sleep(0.05)
        for trial in jobs.find():
            (value,) = trial["misc"]["vals"]["x"]
            assert (trial["state"], trial["result"]["loss"]) == (DONE, _LOSSES[search.name](value)), trial["tid"]
        assert cluster.progress("search").done == 6
