"""Programs that are sent as text: all that they import of ours goes along, and keeps its place."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazycluster.cluster.engine import Endpoint
from lazycluster.cluster.service_spec import Source
from lazycluster.engines.dask.engine import DaskEngine
from lazycluster.engines.hyperopt.engine import HyperoptEngine, program


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


def _sources() -> list[Source]:
    specs = [program("mongod", "programs.mongod")]
    for engine in (DaskEngine(), HyperoptEngine()):
        specs += [engine.master(Endpoint("master")), engine.worker(Endpoint("worker"), Endpoint("master"))]
    check = Source.of("lazycluster.cluster.sent.check", "lazycluster_check")
    return [check, *(spec.source for spec in specs if spec.source is not None)]


def test_what_a_sent_program_imports_goes_along() -> None:
    sources = _sources()
    assert len(sources) == 6
    for source in sources:
        message = source.message()
        files: dict[str, str] = message["files"]
        assert message["module"].replace(".", "/") + ".py" in files
        root = Path(str(importlib.util.find_spec("lazycluster").origin)).parent  # type: ignore[union-attr]
        for file, text in files.items():
            for name in _imports(file, text):
                if (root / f"{name}.py").is_file():
                    assert f"{name}.py" in files, f"{message['module']}: {file} imports {name}, which is not sent"


def test_packages_around_what_is_sent_are_empty() -> None:
    for source in _sources():
        files = source.message()["files"]
        assert files["__init__.py"] == files["cluster/__init__.py"] == files.get("engines/__init__.py", "") == ""


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
