"""Versions that a cluster accepts: distributed's own scheduler does not warn of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

import distributed.client
from cluster_groups import local_group
from distributed.versions import VersionMismatchWarning, error_message, get_versions

from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.engines.dask.programs import versions

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _other(**packages: str) -> dict[str, Any]:
    told = get_versions()
    return {**told, "packages": {**told["packages"], **packages}}


def _python(*, minor: int = 0, micro: int = 0) -> str:
    first, second, third, *rest = get_versions()["packages"]["python"].split(".")
    return ".".join([first, str(int(second) + minor), str(int(third) + micro), *rest])


_ACCEPTED = {"python": _python(micro=1), "msgpack": "0.1", "tornado": "0.1", "numpy": "0.1", "lz4": "0.1"}
_NOT_ACCEPTED = [{"dask": "1.0"}, {"distributed": "1.0"}, {"cloudpickle": "1.0"}, {"python": _python(minor=1)}]


def test_what_a_client_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(**packages: str) -> None:
        monkeypatch.setattr(distributed.client.version_module, "get_versions", lambda *_: _other(**packages))
        with cluster.get_client(timeout=10) as client:
            assert client.submit(lambda: 55).result(timeout=30) == 55
        monkeypatch.undo()

    assert "tornado" in error_message(get_versions(), {}, _other(**_ACCEPTED))["warning"]  # it would do so
    with local_group(1) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            connect(**_ACCEPTED)
        for packages in _NOT_ACCEPTED:
            with pytest.warns(VersionMismatchWarning, match=next(iter(packages))):
                connect(**packages)


def test_workers_are_warned_of_nothing() -> None:
    """Their hosts were compared before the start, and the user has decided."""
    told = versions._error_message(get_versions(), {}, _other(dask="1.0"), source_name="tls://127.0.0.1:25000")
    assert told == {"warning": "", "error": ""}
