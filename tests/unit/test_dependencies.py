"""What is depended on: lower bounds that exclude what is known to be weak, as SECURITY.md says, and pinned versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lazycluster.core import toml
from lazycluster.environments import uv

_ROOT = Path(__file__).parents[2]
_CONSTRAINTS = _ROOT / "constraints"
_PYTHONS = ("3.10", "3.11", "3.12", "3.13")
_ROW = re.compile(r"^\| ([a-z]+) \| ([0-9.]+) \| .*(?:CVE|GHSA)-", re.MULTILINE)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _pyproject() -> dict[str, Any]:
    return toml.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _wanted() -> list[str]:
    """Return what users get, with the package and with its extras."""
    project = _pyproject()["project"]
    return [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]


def _bounds() -> dict[str, list[tuple[int, ...]]]:
    """Return the lower bounds of each package, wherever users get it from."""
    bounds: dict[str, list[tuple[int, ...]]] = {}
    for item in _wanted():
        found = re.match(r"([A-Za-z0-9_-]+)(?:\[[a-z,]+\])?>=([0-9.]+)", item)
        assert found is not None, f"{item} has no lower bound"
        bounds.setdefault(found[1].lower(), []).append(_version(found[2]))
    return bounds


def _table() -> dict[str, str]:
    return dict(_ROW.findall((_ROOT / "SECURITY.md").read_text(encoding="utf-8")))


def test_all_has_a_lower_bound() -> None:
    assert {"click", "cloudpickle", "rich", "dask", "hyperopt", "uv"} <= _bounds().keys()


@pytest.mark.parametrize("package", ["bokeh", "cryptography", "pymongo", "tornado", "uv"])
def test_versions_that_are_known_to_be_weak_are_excluded(package: str) -> None:
    assert set(_bounds()[package]) == {_version(_table()[package])}


def test_the_bound_of_uv_holds_for_whichever_is_found() -> None:
    assert _bounds()["uv"] == [uv.LOWEST]


def test_the_table_is_about_what_is_depended_on() -> None:
    assert _table().keys() <= _bounds().keys()


def _lines(name: str) -> list[str]:
    return (_CONSTRAINTS / name).read_text(encoding="utf-8").splitlines()


def _chosen(name: str, python: str) -> dict[str, str]:
    """Return the version of each package that a file chooses for a Python on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    chosen: dict[str, str] = {}
    for line in _lines(name):
        if not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate(environment):
                assert one.name not in chosen, f"{one.name} twice"
                chosen[one.name] = str(one.specifier).removeprefix("==")
    return chosen


def _named(groups: tuple[str, ...]) -> list[Requirement]:
    """Return all that pyproject.toml names: for users, for building, and in these groups."""
    project = _pyproject()
    items = [*_wanted(), *project["build-system"]["requires"]]
    left = list(groups)
    while left:
        for item in project["dependency-groups"][left.pop()]:
            if isinstance(item, str):
                items.append(item)
            else:
                left.append(item["include-group"])
    return [Requirement(item) for item in items]


@pytest.mark.parametrize("name", ["pinned.txt", "oldest.txt"])
def test_constraints_are_names_and_versions(name: str) -> None:
    assert sorted(path.name for path in _CONSTRAINTS.iterdir()) == ["oldest.txt", "pinned.txt", "tools.txt"]
    comments = [line for line in _lines(name) if line.startswith("#")]
    assert "scripts/pin" in "\n".join(comments), "the command that makes it anew"
    assert (_ROOT / "scripts" / "pin").is_file()
    for line in _lines(name):
        assert "/" not in line.replace("scripts/pin", ""), f"an address or a path: {line}"
        assert line in comments or re.fullmatch(
            r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*( ; [a-z_<>=!.*0-9' ()PyC]+)?", line
        ), line


@pytest.mark.parametrize("python", _PYTHONS)
def test_all_that_pyproject_names_is_pinned(python: str) -> None:
    chosen = _chosen("pinned.txt", python)
    for item in _named(("dev", "bench", "setup")):
        if item.marker is None or item.marker.evaluate({"python_version": python}):
            assert item.specifier.contains(chosen[canonicalize_name(item.name)]), str(item)


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    chosen = _chosen("oldest.txt", "3.10")
    for name, bounds in _bounds().items():
        assert {tuple([*bound, 0, 0][:3]) for bound in bounds} == {_version(chosen[name])}
    for item in _named(("tests", "setup")):
        assert item.specifier.contains(chosen[canonicalize_name(item.name)]), str(item)


def test_nothing_tells_to_install_this_package_from_an_index() -> None:
    """PyPI's lazycluster is another one, of 2020."""
    tops = [_ROOT / name for name in ("src", "docs", "examples", "README.md", "SECURITY.md", "CHANGELOG.md")]
    files = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*"))]
    texts = [path for path in files if path.suffix in (".py", ".md", ".ipynb", ".toml")]
    assert len(texts) > 100
    found = [
        path for path in texts if re.search(r"install[^\n]{0,20}['\" ]lazycluster\b", path.read_text(encoding="utf-8"))
    ]
    assert found == []
