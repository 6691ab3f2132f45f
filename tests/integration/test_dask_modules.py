"""The user's own modules on the workers of a Dask cluster."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_groups import local_group, ssh_group

pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")

from lazycluster.cluster.dask_cluster import DaskCluster  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with modules that are on the path of the manager."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def _write(folder: Path, value: int) -> None:
    """Write a module, and a package that it uses, in a version that is as long as any other."""
    (folder / "own_package").mkdir(exist_ok=True)
    (folder / "own_package" / "__init__.py").write_text("")
    (folder / "own_package" / "inner.py").write_text(f"VALUE = {value}\n")
    (folder / "own_module.py").write_text(
        f"from own_package import inner\n\n\ndef both(_):\n    return {value}, inner.VALUE\n"
    )


def _answers(client: Any) -> set[Any]:
    module = importlib.import_module("own_module")
    return set(client.gather(client.map(module.both, range(4), pure=False)))


def test_the_present_version_is_on_the_workers(hosts: Any, folder: Path) -> None:
    _write(folder, 1)
    with ssh_group(hosts) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            for value in (1, 2, 3):
                _write(folder, value)
                assert _answers(client) == {(value, value)}
            client.restart(timeout=30)
            assert _answers(client) == {(3, 3)}


def test_modules_that_come_later_are_there_too(folder: Path) -> None:
    with local_group(1) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            assert client.submit(lambda: 1).result(timeout=20) == 1
            _write(folder, 7)
            assert _answers(client) == {(7, 7)}
