"""The shape of the source tree: no import circles, no layer crossed upwards, one meaning for a name, engines apart."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "lazycluster"
PUBLIC = ROOT / "tests" / "api" / "snapshot" / "names.txt"

# Classes that may have the name of another one, and why.
SAME_NAME = {
    "RoundRobinLauncher": "documented: each engine's own worker launcher",
}
# Classes that are made in no other way than as their one subclass, and why they are classes of their own.
ONE_SUBCLASS = {
    "ClusterClient": "the client of `DaskCluster.connect`; not called by its name, since it is closed if that fails",
    "FileNames": "a mix-in: `agent.filenames` makes another class of it and cloudpickle's where that is imported",
}
# Modules that may name engines although they lie where none is named: the documented import paths.
RE_EXPORTS = {
    "cluster/dask_cluster.py",
    "cluster/hyperopt_cluster.py",
    "cluster/hyperopt_progress.py",
}
ENGINES = re.compile(r"dask|distributed\b|hyperopt|mongo", re.IGNORECASE)


@cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax trees of all modules, by their paths below the package."""
    return {
        str(path.relative_to(SOURCES)): ast.parse(path.read_text("utf-8")) for path in sorted(SOURCES.rglob("*.py"))
    }


def module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(("lazycluster", *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def imports() -> dict[str, set[str]]:
    """Return which modules each one imports, wherever that stands; not what only a type checker reads."""
    names = {module_name(path) for path in trees()}
    found: dict[str, set[str]] = {name: set() for name in names}
    for path, tree in trees().items():
        own = module_name(path)
        package = own if path.endswith("__init__.py") else own.rpartition(".")[0]
        for node in imported(tree):
            if isinstance(node, ast.Import):
                found[own].update(name for alias in node.names if (name := alias.name) in names)
                continue
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found[own].update({whole if whole in names else base} & names)
        found[own].discard(own)
    return found


def imported(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for other in node.orelse for found in imported(other))
        else:
            yield from imported(node)


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the sets of modules that reach each other."""
    reached = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(graph[name])
        reached[start] = seen
    together = (tuple(n for n in sorted(graph) if n in reached[name] and name in reached[n]) for name in graph)
    return sorted({names for names in together if names})


def test_no_module_imports_itself_over_others() -> None:
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [("a", "b")]
    assert not circles(imports())


def test_nothing_imports_what_lies_above_it(tmp_path: Path) -> None:
    """Which layer lies above which is said in pyproject.toml."""
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([command, "--cache-dir", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path, tree in trees().items():
        yield from ((path, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def test_no_two_classes_have_one_name() -> None:
    where = defaultdict(list)
    for path, node in classes():
        where[node.name].append(path)
    twice = {name: paths for name, paths in where.items() if len(paths) > 1}
    assert set(twice) == set(SAME_NAME), twice


def test_no_class_is_split_into_a_base_and_its_only_subclass() -> None:
    """What is public, an error or a protocol may have one subclass here, and others elsewhere."""
    own = {node.name: (path, node) for path, node in classes()}
    below = defaultdict(list)
    for _, node in classes():
        for base in node.bases:
            name = ast.unparse(base).partition("[")[0]
            if name in own:
                below[name].append(node.name)
    calls = (node.func for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    made = {ast.unparse(called).rpartition(".")[2] for called in calls}
    public = set(re.findall(r"^class (\w+)", PUBLIC.read_text("utf-8"), re.MULTILINE))
    split = {}
    for name, subclasses in below.items():
        path, node = own[name]
        if len(subclasses) > 1 or name in public | made or is_error(own, name) or "Protocol" in bases(node):
            continue
        split[name] = path, subclasses[0]
    assert set(split) == set(ONE_SUBCLASS), split


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).partition("[")[0] for base in node.bases]


def is_error(own: dict[str, tuple[str, ast.ClassDef]], name: str) -> bool:
    """Whether a class is an exception, also over others of ours."""
    if name not in own:
        return name.endswith(("Error", "Exception"))
    return any(is_error(own, base) for base in bases(own[name][1]))


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Return the names and texts in code; docstrings show examples, of engines too."""
    texts = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.lineno, node.value
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield getattr(node, "lineno", 0), value


@pytest.mark.parametrize("package", ["cluster", "cli"])
def test_no_engine_is_named_where_all_are_meant(package: str) -> None:
    named = [
        f"{path}:{line}: {word}"
        for path, tree in trees().items()
        if path.startswith(f"{package}/") and path not in RE_EXPORTS
        for line, word in words(tree)
        if ENGINES.search(word)
    ]
    assert not named, "\n".join(named)
