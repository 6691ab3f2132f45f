"""Local packages of the manager that hosts have installed: the code is the manager's, all else the installed copy's."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cluster_groups import connect as connect_group
from cluster_groups import local_group
from environment_hosts import connect

from installedparts import COMPILED, DATA, checkout, install_on
from lazycluster import RuntimeGroup
from lazycluster.exceptions import TaskExecutionError

_EXPECTED = {
    "value": ("newer", "newer"),
    **dict.fromkeys(DATA, "data"),
    "by_resources_of_a_folder": "more data",
    **dict.fromkeys(COMPILED, "edpk._c"),
}


@pytest.fixture
def edpk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The package, as it is imported from a checkout; a lock in it has it travel as source, not by value."""
    extra = "import threading\nLOCK = threading.Lock()\n" if getattr(request, "param", "") == "as source" else ""
    monkeypatch.syspath_prepend(str(checkout(tmp_path, extra)))
    yield importlib.import_module("edpk")
    for name in [name for name in sys.modules if name.partition(".")[0] == "edpk"]:
        del sys.modules[name]


@pytest.mark.parametrize("edpk", ["by value", "as source"], indirect=True)
def test_calls_find_data_and_compiled_parts_where_they_are_installed(
    make_hosts: Any, edpk: ModuleType, tmp_path: Path
) -> None:
    hosts = make_hosts(1)
    environment = install_on(hosts[0], tmp_path)
    with connect(hosts[0], environment) as runtime:
        for _ in range(2):  # what the first calls have imported is there for the others
            assert {name: runtime.call(getattr(edpk, name)) for name in _EXPECTED} == _EXPECTED
        assert "newer" in runtime.call(edpk.shown)
    with RuntimeGroup(
        hosts=["host1"], connection_kwargs={"config_file": hosts.config_file}, environment=environment
    ) as group:
        functions = [getattr(edpk, name) for name in _EXPECTED]
        assert list(group.map(lambda function: function(), functions)) == list(_EXPECTED.values())
        for function in functions[:4]:
            assert list(group.map(lambda _, function=function: function(), [1])) == [_EXPECTED[function.__name__]]


def test_dask_finds_them_too(make_hosts: Any, edpk: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    hosts = make_hosts(1)
    environment = install_on(hosts[0], tmp_path)
    with connect_group(hosts.config_file, ["host1"], environment=environment) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            found = {name: client.submit(getattr(edpk, name), pure=False).result(timeout=20) for name in _EXPECTED}
            assert found == _EXPECTED
            assert "newer" in client.submit(edpk.shown, pure=False).result(timeout=20)


def test_dask_gets_the_data_of_packages_that_are_not_installed(
    edpk: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    folder = Path(str(edpk.__file__)).parent
    for name in ("d.txt", "more/e.txt", ".env", ".git/config", "private.key", "__pycache__/d.txt"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("data")
    (folder / "binary").write_bytes(bytes(range(256)))

    def sent() -> list[str]:
        root = Path(edpk.__file__).parent
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    with local_group(1) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:

            def ask(function: Any) -> Any:
                return client.submit(function, pure=False).result(timeout=20)

            assert [ask(getattr(edpk, name)) for name in DATA] == ["data"] * len(DATA)
            assert ask(sent) == ["__init__.py", "binary", "d.txt", "inner.py", "more/e.txt"]
            (folder / "d.txt").write_text("other data")
            assert ask(edpk.by_file) == "other data"
            (folder / "large").write_bytes(bytes(16 * 1024 * 1024))
            (folder / "d.txt").write_text("newest data")
            with pytest.raises(FileNotFoundError):
                ask(edpk.by_file)
    assert "the data files of the package edpk are not sent" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_objectives_of_hyperopt_find_them_too(make_hosts: Any, edpk: ModuleType, tmp_path: Path) -> None:
    hyperopt = pytest.importorskip("hyperopt")
    pytest.importorskip("pymongo")
    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    hosts = make_hosts(1)
    environment = install_on(hosts[0], tmp_path)
    functions = [getattr(edpk, name) for name in _EXPECTED]

    def failing(x: float) -> Any:
        return (Path(str(edpk.__file__)).parent / "gone.txt").read_text()

    def objective(x: float) -> dict[str, Any]:
        return {"loss": x, "status": "ok", "found": [function() for function in functions]}

    with (
        connect_group(hosts.config_file, ["host1"], environment=environment) as group,
        HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster,
    ):
        cluster.start()
        trials = cluster.trials("found")
        space = hyperopt.hp.uniform("x", 0, 1)
        options: dict[str, Any] = {"show_progressbar": False, "return_argmin": False}
        hyperopt.fmin(objective, space, hyperopt.rand.suggest, 1, trials=trials, **options)
        (result,) = trials.results
        failed = cluster.trials("failed")
        options["catch_eval_exceptions"] = True
        with contextlib.suppress(hyperopt.exceptions.AllTrialsFailed):
            hyperopt.fmin(failing, space, hyperopt.rand.suggest, 1, trials=failed, **options)
        (document,) = failed.handle.jobs.find({"exp_key": "failed"})
        assert f"{_ADVICE}, not its data" in document["traceback"]
        assert [tuple(one) if isinstance(one, list) else one for one in result["found"]] == list(_EXPECTED.values())


@pytest.mark.parametrize("edpk", ["as source"], indirect=True)
def test_the_code_is_the_managers_though_others_have_imported_the_copy(
    make_hosts: Any, edpk: ModuleType, tmp_path: Path
) -> None:
    """A call that imports the installed package itself has the host keep it imported for later ones."""
    hosts = make_hosts(1)
    with connect(hosts[0], install_on(hosts[0], tmp_path)) as runtime:
        away = dict.fromkeys([name for name in sys.modules if name.partition(".")[0] == "edpk"])
        kept = {name: sys.modules.pop(name) for name in away}
        folder, sys.path[:] = sys.path[0], sys.path[1:]  # as if the manager did not have it

        def installed() -> Any:
            import edpk

            return edpk.value()

        try:
            for _ in range(3):
                assert runtime.call(installed) == ("older", "older")
        finally:
            sys.path.insert(0, folder)
            sys.modules.update(kept)
        assert runtime.call(edpk.value) == ("newer", "newer")
        assert runtime.call(edpk.compiled) == "edpk._c"


def test_what_did_not_travel_is_named_with_the_next_step(hosts: Any, edpk: ModuleType, tmp_path: Path) -> None:
    functions = {name: getattr(edpk, name) for name in (*DATA, *COMPILED)}
    with RuntimeGroup(
        hosts=["host1"], connection_kwargs={"config_file": hosts.config_file}, python=sys.executable
    ) as group:
        for name, function in functions.items():
            with pytest.raises(TaskExecutionError, match=_ADVICE) as caught:
                group.call(function)
            assert ("_c" if name in COMPILED else ".txt" if "folder" not in name else "more") in str(caught.value)
            with pytest.raises((OSError, ImportError)) as raised:
                list(group.map(lambda function: function(), [function]))
            assert _ADVICE in str(raised.value.__cause__)


_ADVICE = "Next step: of the local module edpk only the code travels"


def test_a_package_of_another_distribution_is_not_taken_for_it(
    make_hosts: Any, edpk: ModuleType, tmp_path: Path
) -> None:
    hosts = make_hosts(1)
    environment = install_on(hosts[0], tmp_path, "something-else")
    with connect(hosts[0], environment) as runtime:
        assert runtime.call(edpk.value) == ("newer", "newer")
        with pytest.raises(TaskExecutionError, match=_ADVICE):
            runtime.call(edpk.by_file)
