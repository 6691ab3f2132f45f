"""The packages that are installed for this interpreter, as requirements."""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .spec import normalized

__all__ = ["InstalledPackage", "installed", "left_out", "requirements"]

_logger = logging.getLogger("lazycluster")

_TOOLS = """
    lazycluster jupyter jupyterlab notebook ipython ipykernel ipywidgets nbconvert jupyter-client jupyter-server
    jupyterlab-server nbclassic voila jupytext spyder
    ruff mypy pyright basedpyright flake8 pylint black isort autopep8 yapf bandit pycodestyle pydocstyle pyflakes
    pytest pytest-timeout pytest-xdist pytest-cov pytest-asyncio pytest-mock coverage tox nox hypothesis
    pre-commit twine build hatch bump2version sphinx mkdocs
    pip uv setuptools wheel pipx poetry pipenv virtualenv pip-tools
"""
DEFAULT_EXCLUDE = frozenset(_TOOLS.split())
"""Packages that only the manager needs: notebooks, linters, test runners, release tools and installers."""

_DIRECTORY = re.compile(r"^(?P<name>.+)-(?P<version>[^-]+)\.dist-info$")
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_OF_AN_EXTRA = re.compile(r"\bextra\s*==")


@dataclass(frozen=True)
class InstalledPackage:
    """A distribution that is installed here.

    Attributes:
        name: Its name.
        version: Its version.
        path: The directory with its metadata.
        origin: Its source if that is not an index: a directory, or a URL.
    """

    name: str
    version: str
    path: str
    origin: str = ""

    @property
    def is_directory(self) -> bool:
        """True if it was installed from a directory of this machine."""
        return self.origin.startswith("/")


def installed() -> list[InstalledPackage]:
    """Return the packages of this interpreter, by name; of several versions the one that is imported."""
    found: dict[str, InstalledPackage] = {}
    for folder in dict.fromkeys(Path(path).absolute() for path in sys.path):
        try:
            names = [path.name for path in folder.iterdir()]
        except OSError:
            continue
        for name in names:
            one = _read(str(folder), name)
            if one is not None:
                found.setdefault(normalized(one.name), one)
    return sorted(found.values(), key=lambda one: normalized(one.name))


def _read(folder: str, entry: str) -> InstalledPackage | None:
    path = f"{folder}/{entry}"
    if entry.endswith(".egg-info"):
        return _read_egg(folder, path)
    match = _DIRECTORY.match(entry)
    if match is None:
        return None
    return InstalledPackage(match["name"], match["version"], path, _origin(path))


def _read_egg(folder: str, path: str) -> InstalledPackage | None:
    try:
        about = metadata.Distribution.at(path).metadata
        name, version = about["Name"], about["Version"]
    except (OSError, KeyError, ValueError):
        return None
    if not name or not version:
        return None
    inside = {"site-packages", "dist-packages"} & set(Path(folder).parts)
    return InstalledPackage(name, version, path, "" if inside else _project_of(folder))


def _project_of(folder: str) -> str:
    for candidate in (Path(folder), Path(folder).parent):
        if (candidate / "setup.py").exists() or (candidate / "pyproject.toml").exists():
            return str(candidate)
    return folder


def _origin(path: str) -> str:
    """Return the source of a distribution, if that is not an index (PEP 610)."""
    try:
        about = json.loads(Path(path, "direct_url.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    url = str(about.get("url", ""))
    if "vcs_info" in about:
        vcs = about["vcs_info"]
        folder = f"#subdirectory={about['subdirectory']}" if about.get("subdirectory") else ""
        return f"{vcs['vcs']}+{url}@{vcs.get('commit_id', vcs.get('requested_revision', ''))}{folder}"
    parts = urlsplit(url)
    if parts.scheme == "file" and "dir_info" in about:
        return unquote(parts.path)
    return url


# --- selection ------------------------------------------------------------------------------------
def requirements(exclude: Sequence[str] | None) -> list[InstalledPackage]:
    """Return the installed packages without those excluded and what only these need; what is left out is logged.

    Args:
        exclude: Names, in addition to `DEFAULT_EXCLUDE`; an empty list excludes nothing.
    """
    kept, dropped = _select(exclude)
    if dropped:
        _log_once('environment="manager" leaves out: %s (exclude=[] leaves out nothing)', ", ".join(dropped))
    return kept


def left_out(exclude: Sequence[str] | None) -> list[str]:
    """Return the names of installed packages that are not among the `requirements`."""
    return _select(exclude)[1]


def _select(exclude: Sequence[str] | None) -> tuple[list[InstalledPackage], list[str]]:
    everything = tuple(installed())
    named = frozenset(normalized(name) for name in exclude or ())
    unwanted = frozenset() if exclude is not None and not named else DEFAULT_EXCLUDE | named
    kept = _without(everything, unwanted) if unwanted else everything
    names = {one.name for one in kept}
    return list(kept), [one.name for one in everything if one.name not in names]


@functools.lru_cache(maxsize=8)
def _log_once(text: str, names: str) -> None:
    """Log it once, not for each host."""
    _logger.info(text, names)


@functools.lru_cache(maxsize=8)
def _without(everything: tuple[InstalledPackage, ...], unwanted: frozenset[str]) -> tuple[InstalledPackage, ...]:
    """Remove packages and their dependencies, except what others need."""
    by_name = {normalized(one.name): one for one in everything}
    needs = {name: _needs(one.path) & by_name.keys() for name, one in by_name.items()}
    needed = {other for name, others in needs.items() for other in others if other != name}
    roots = [name for name in by_name if name not in needed and name not in unwanted]
    reached = _closure(roots, needs)
    # Packages that depend on each other in a circle have no root.
    rest = by_name.keys() - reached - _closure([name for name in by_name if name in unwanted], needs)
    reached |= _closure(rest, needs)
    return tuple(one for name, one in by_name.items() if name in reached)


def _closure(names: Iterable[str], needs: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue.extend(needs[name])
    return reached


def _needs(path: str) -> set[str]:
    """Return the names that a distribution requires, under any marker but an extra."""
    found = set()
    try:
        lines = metadata.Distribution.at(path).requires or []
    except (OSError, ValueError):
        return set()
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match and not _OF_AN_EXTRA.search(line):
            found.add(normalized(match[1]))
    return found
