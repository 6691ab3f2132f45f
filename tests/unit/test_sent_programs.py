"""Programs that are sent as text: all that they import of ours goes along, and keeps its place."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster.cluster.programs import Source
from lazycluster.engines.dask.launchers import LocalMasterLauncher
from lazycluster.engines.dask.launchers import RoundRobinLauncher as DaskWorkers
from lazycluster.engines.hyperopt.masters import EmbeddedMongoLauncher
from lazycluster.engines.hyperopt.settings import program_source
from lazycluster.engines.hyperopt.workers import RoundRobinLauncher as HyperoptWorkers


def _imports(file: str, text: str) -> Iterator[str]:
    """Yield what a module imports by relative imports, without the ending; there must be no others of ours."""
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            base = "/".join([*above, *(node.module.split(".") if node.module else [])])
            yield from (base, *(f"{base}/{name.name}" for name in node.names))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            assert not any(name.split(".")[0] == "lazycluster" for name in named), (file, named)


def _sources(tmp_path: Path) -> list[Source]:
    group: Any = None
    database = EmbeddedMongoLauncher(group)
    database.hyperopt.dbpath = tmp_path / "db"
    workers = DaskWorkers(group), HyperoptWorkers(group, "db", 1.0)
    place: Any = None
    programs = [LocalMasterLauncher(group).program(), database.program(), *(one.program(place) for one in workers)]
    return [program_source("mongod"), *(program.source for program in programs if program.source is not None)]


def test_what_a_sent_program_imports_goes_along(tmp_path: Path) -> None:
    sources = _sources(tmp_path)
    assert len(sources) == 5
    for source in sources:
        message = source.message()
        files: dict[str, str] = message["files"]
        assert message["module"].replace(".", "/") + ".py" in files
        root = Path(str(importlib.util.find_spec("lazycluster").origin)).parent  # type: ignore[union-attr]
        for file, text in files.items():
            for name in _imports(file, text):
                if (root / f"{name}.py").is_file():
                    assert f"{name}.py" in files, f"{message['module']}: {file} imports {name}, which is not sent"


def test_packages_around_what_is_sent_are_empty(tmp_path: Path) -> None:
    for source in _sources(tmp_path):
        files = source.message()["files"]
        assert files["__init__.py"] == files["cluster/__init__.py"] == files["engines/__init__.py"] == ""


@pytest.mark.parametrize("shared", ["pack.sub", "pack.sub.one"])
def test_a_module_and_a_package_are_sent_along(tmp_path: Path, shared: str) -> None:
    folder = tmp_path / "pack" / "sub"
    folder.mkdir(parents=True)
    for path in (tmp_path / "pack" / "__init__.py", folder / "one.py", folder / "two.py", tmp_path / "app.py"):
        path.write_text(f"# {path.stem}")
    files = Source(tmp_path, "app", "some_program", (shared,)).message()["files"]
    assert files["pack/__init__.py"] == ""
    assert files["pack/sub/one.py"] == "# one"
    assert ("pack/sub/two.py" in files) == (shared == "pack.sub")
