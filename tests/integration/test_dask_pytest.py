"""Functions of modules that pytest has loaded, as tasks of a Dask cluster: pytest rewrites what it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")

_CONFTEST = """
import os
import sys

import pytest


def conftest_helper(x):
    return 100 + x


@pytest.fixture(scope="session")
def group():
    from lazycluster import RuntimeGroup

    with RuntimeGroup(hosts=["host1"], python=sys.executable) as group:
        yield group


@pytest.fixture(scope="session")
def client(group):
    from lazycluster.cluster.dask_cluster import DaskCluster

    with DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            yield client
"""

_TESTS = """
import dataclasses
import enum

import dask
import pytest
from distributed import WorkerPlugin

IMPORTS


def double(x):
    return 2 * x


def checked(x):
    assert x > 10, "too small"
    return x


def all_helpers(x):
    return double(x) + helper(x) + conftest_helper(x)


@dataclasses.dataclass
class Point:
    x: int

    def norm(self):
        return abs(self.x)

    @staticmethod
    def make(x):
        return Point(x)

    @classmethod
    def next(cls, x):
        return cls(x + 1)


class Color(enum.Enum):
    RED = 1


class OwnError(Exception):
    pass


def fail():
    raise OwnError("own")


class Counter:
    count = 0

    def up(self):
        self.count += 1
        return self.count


class Plugin(WorkerPlugin):
    def setup(self, worker):
        worker.mine = double(3)


@pytest.fixture
def made_by_fixture():
    k = 5
    return lambda x: double(x) + k


def result(client, function, *arguments, **options):
    return client.submit(function, *arguments, pure=False, **options).result(timeout=30)


def test_functions(client, made_by_fixture):
    assert result(client, double, 3) == 6
    assert result(client, lambda: double(2) + helper(1)) == 15
    assert result(client, made_by_fixture, 1) == 7
    assert client.gather(client.map(all_helpers, [1, 2], pure=False)) == [114, 118]
    assert dask.delayed(double)(dask.delayed(all_helpers)(1)).compute(scheduler=client) == 228
    assert set(client.run(double, 2).values()) == {4}
    assert client.run_on_scheduler(double, 2) == 4


@pytest.mark.parametrize("function", [lambda x: double(x), double, Point.make, Point.next])
def test_parameters(client, function):
    assert result(client, function, 1) == function(1)


def test_objects(client):
    assert type(result(client, Point.make, 3)) is Point
    assert result(client, Point.norm, Point(-2)) == 2
    assert result(client, Point(-4).norm) == 4
    assert result(client, lambda color: color, Color.RED) is Color.RED
    assert result(client, Point.norm, client.scatter(Point(7))) == 7
    assert result(client, Counter, actor=True).up().result(timeout=30) == 1
    client.register_plugin(Plugin(), name="mine")
    assert set(client.run(lambda dask_worker: dask_worker.mine).values()) == {6}


def test_errors_and_assertions(client):
    with pytest.raises(OwnError):
        result(client, fail)
    assert result(client, checked, 11) == 11
    with pytest.raises(AssertionError, match="too small"):
        result(client, checked, 1)


class TestInAClass:
    @staticmethod
    def static(x):
        return double(x)

    def method(self, x):
        return double(x) + 1

    def test_methods(self, client):
        assert result(client, TestInAClass.static, 1) == 2
        assert result(client, self.method, 1) == 3
        assert result(client, lambda: self.method(1)) == 3


def test_calls_on_all_hosts(group):
    assert set(group.call(all_helpers, 1).values()) == {114}
    assert set(group.call(lambda: checked(11)).values()) == {11}
    assert list(group.map(all_helpers, [1])) == [114]
"""

# How the tests lie, how pytest imports them, and how they import their helpers.
_LAYOUTS = {
    "plain": ("prepend", ["tests/helpers.py"], "from helpers import helper\nfrom conftest import conftest_helper", "."),
    "package": (
        "prepend",
        ["tests/__init__.py", "tests/helpers.py"],
        "from .helpers import helper\nfrom .conftest import conftest_helper",
        ".",
    ),
    "importlib": (
        "importlib",
        ["my-tests/helpers.py"],
        "def helper(x):\n    return 10 + x\n\n\ndef conftest_helper(x):\n    return 100 + x",
        "tests",
    ),
}


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_functions_of_tests_are_tasks(layout: str, hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, files, imports, pythonpath = _LAYOUTS[layout]
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("def helper(x):\n    return 10 + x\n" if "helpers" in file else "")
    folder = (tmp_path / files[-1]).parent
    (folder / "conftest.py").write_text(_CONFTEST)
    (folder / "test_tasks.py").write_text(_TESTS.replace("IMPORTS", imports))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {pythonpath}\n")
    monkeypatch.setenv("LAZYCLUSTER_SSH_CONFIG", str(hosts.config_file))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--import-mode={mode}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "9 passed" in done.stdout
