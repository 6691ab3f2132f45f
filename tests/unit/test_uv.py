"""Which uv is used on this machine: one that is new enough, wherever it comes from."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lazycluster.environments import uv
from lazycluster.exceptions import EnvironmentBuildError

_NEW, _LOWEST, _OLD = "uv 99.1.0 (abcdef 2026-01-01)", "uv 0.11.15", "uv 0.11.14 (abcdef 2026-01-01)"


@pytest.fixture(autouse=True)
def none_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uv, "_chosen", None)


def _made(folder: Path, says: str, status: int = 0) -> str:
    folder.mkdir()
    program = folder / "uv"
    program.write_text(f"#!/bin/sh\n[ $1 = cache ] || printf '%s\\n' '{says}'\nexit {status}\n")
    program.chmod(0o755)
    return str(program)


def _install(monkeypatch: pytest.MonkeyPatch, place: Path, package: str | None, on_path: str | None) -> None:
    """Have a program of the package uv, and one on the PATH, which say something of themselves; None: there is none."""
    module = None if package is None else SimpleNamespace(find_uv_bin=lambda: path)
    path = "" if package is None else _made(place / "package", package)
    monkeypatch.setitem(sys.modules, "uv", module)
    if on_path is not None:
        _made(place / "path", on_path)
    monkeypatch.setenv("PATH", str(place / "path"))


@pytest.mark.parametrize(
    ("package", "on_path", "used"),
    [
        (_NEW, _OLD, "package"),
        (_LOWEST, _NEW, "package"),
        (_OLD, _NEW, "path"),
        (None, _LOWEST, "path"),
        (_NEW, None, "package"),
    ],
)
def test_the_first_that_is_new_enough_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str | None, on_path: str | None, used: str
) -> None:
    _install(monkeypatch, tmp_path, package, on_path)
    assert asyncio.run(uv.find_uv()).path == str(tmp_path / used / "uv")


@pytest.mark.parametrize(("package", "on_path"), [(None, _OLD), (_OLD, None), (_OLD, "uv 0.4.0"), (None, "uv 0.9.99")])
def test_older_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str | None, on_path: str | None
) -> None:
    _install(monkeypatch, tmp_path, package, on_path)
    with pytest.raises(EnvironmentBuildError) as caught:
        asyncio.run(uv.find_uv())
    for says, folder in ((package, "package"), (on_path, "path")):
        if says is not None:
            assert f"{tmp_path / folder / 'uv'} is uv {says.split()[1]}" in str(caught.value)
    assert "0.11.15 or newer" in str(caught.value)
    assert "pip install 'uv>=0.11.15'" in str(caught.value)


def test_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, tmp_path, None, None)
    with pytest.raises(EnvironmentBuildError, match="not installed here"):
        asyncio.run(uv.find_uv())


@pytest.mark.parametrize(
    "says", ["", "uv", "uv ../../x", "uv 1.2.3/../../x", "uv next", "pip 99.0.0", "uv 1.2." + 99 * "3"]
)
def test_what_is_no_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """It becomes the name of a directory on hosts."""
    _install(monkeypatch, tmp_path, None, says)
    with pytest.raises(EnvironmentBuildError, match="does not tell its version"):
        asyncio.run(uv.find_uv())


def test_one_that_fails_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    _made(tmp_path / "path", _NEW, status=3)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(EnvironmentBuildError, match="does not tell its version"):
        asyncio.run(uv.find_uv())
