"""The lower bounds of what is depended on exclude what is known to be weak, as SECURITY.md says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lazycluster.environments import uv

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| ([a-z]+) \| ([0-9.]+) \| .*(?:CVE|GHSA)-", re.MULTILINE)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _bounds() -> dict[str, list[tuple[int, ...]]]:
    """Return the lower bounds of each package, wherever users get it from."""
    project: dict[str, Any] = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    bounds: dict[str, list[tuple[int, ...]]] = {}
    for item in wanted:
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
