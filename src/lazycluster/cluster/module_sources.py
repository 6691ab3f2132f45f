"""Choice of the user's modules that are sent to hosts, with their present content."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lazycluster.core import event_loop
from lazycluster.tasks import local_code

if TYPE_CHECKING:
    import types

__all__ = ["ModuleSources"]

logger = logging.getLogger("lazycluster")

_READINGS = 10  # tries to read all files while none of them changes
_MOST_DATA = 16 * 1024 * 1024  # bytes of all data files
_MOST_FILES = 500  # of a package; they are all looked at whenever something is submitted
_NO_DATA = ("node_modules", "venv", "build", "dist")
# Code goes by itself, compiled code fits this machine, and keys are for this user.
_NO_DATA_SUFFIXES = (".py", ".pyc", ".pyo", ".so", ".pyd", ".pem", ".key", *importlib.machinery.EXTENSION_SUFFIXES)
_DISTRIBUTIONS = ".distributions.json"  # names the distributions that modules are of


class ModuleSources:
    """The local modules of this process, with all that they import and their data, as files.

    Attributes:
        paths: Where each was read, by file name; "" for what is made up.
    """

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self._stamps: dict[str, int] = {}
        self._seen: set[str] = set()
        self._is_new = False
        self._local: set[str] = set()

    def changed(self) -> bool:
        """Tell whether a module has changed or is new since they were read. For any thread; takes some microseconds."""
        self._find_new()
        return self._is_new or any(_stamp(path) != stamp for path, stamp in self._stamps.items())

    def _find_new(self) -> None:
        new = sys.modules.keys() - self._seen
        if not new:
            return
        self._seen |= new
        found = {name for name in new if _is_sent(name, sys.modules.get(name))} - self._local
        self._local |= found
        if found:
            self._is_new = True

    async def read(self) -> dict[str, str | bytes]:
        """Return their present contents by file name."""
        self._is_new = False  # before the look, not to miss those that come meanwhile
        self._find_new()
        sources, self._stamps = await event_loop.in_thread(_read, frozenset(self._local))
        self.paths = {name: path for name, (_, path) in sources.items()}
        return {name: text for name, (text, _) in sources.items()}


def _is_sent(name: str, module: types.ModuleType | None) -> bool:
    # What is not found by an import cannot be sent as a file; __main__ goes by value.
    if name == "__main__" or module is None:
        return False
    try:
        return getattr(module, "__spec__", None) is not None and local_code.is_local(module)
    except Exception:  # noqa: BLE001  (anything may stand in for a module, and answer as it likes)
        return False


def _read(names: frozenset[str]) -> tuple[dict[str, tuple[str | bytes, str]], dict[str, int]]:
    """Return what `_sources` does, and the times of change of the files that it was read from."""
    sources = _sources(names)
    for _ in range(_READINGS):
        stamps = {path: _stamp(path) for _, path in sources.values() if path}
        sources = _sources(names)
        if {path: _stamp(path) for _, path in sources.values() if path} == stamps:
            break
    return sources, stamps


def _sources(names: frozenset[str]) -> dict[str, tuple[str | bytes, str]]:
    """Return content and path of modules, of all local ones that they or the main script import, and of their data.

    By file name.
    """
    wanted = set(names)
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if isinstance(main, str) and main.endswith(".py"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            wanted |= local_code.imported_by(Path(main).read_text(encoding="utf-8"), main)
    found: dict[str, tuple[str | bytes, str]] = {}
    distributions, packages = {}, {}
    for name, (text, is_package, path, distribution) in local_code.sources_of(wanted, rewritten=True).items():
        file = name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
        found[file] = (text, path)
        if distribution:
            distributions[name] = distribution
        if is_package and path and name.rpartition(".")[0] not in packages:
            packages[name] = path
    found.update(_data_of(packages))
    found[_DISTRIBUTIONS] = (json.dumps(distributions, sort_keys=True), "")
    return found


# --- data of packages -----------------------------------------------------------------------------
def _data_of(packages: Mapping[str, str]) -> dict[str, tuple[bytes, str]]:
    """Return content and path of what lies in the directories of packages beside their code, by file name.

    Args:
        packages: The file of each package by its name.
    """
    found: dict[str, tuple[bytes, str]] = {}
    room = _MOST_DATA
    for name, file in sorted(packages.items()):
        folder = Path(file).parent
        try:
            paths = _data_files(folder)
            size = sum(path.stat().st_size for path in paths)
            if size > room or len(paths) > _MOST_FILES:
                _warn_of_data(name, str(folder))
                continue
            found.update({f"{name.replace('.', '/')}/{path.relative_to(folder)}": _with_path(path) for path in paths})
        except OSError as error:
            logger.warning("the data of the package %s cannot be read: %s", name, error)
            continue
        room -= size
    return found


def _with_path(path: Path) -> tuple[bytes, str]:
    return path.read_bytes(), str(path)


def _data_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith((".", "__pycache__")) and one not in _NO_DATA)
        if "pyvenv.cfg" in names:
            folders[:] = []
            continue
        wanted = [name for name in sorted(names) if not name.startswith(".") and not name.endswith(_NO_DATA_SUFFIXES)]
        found += [path for path in (Path(place, name) for name in wanted) if path.is_file()]
        if len(found) > _MOST_FILES:
            break
    return found


@functools.lru_cache(maxsize=64)
def _warn_of_data(name: str, folder: str) -> None:
    logger.warning(
        "the data files of the package %s are not sent: %s has more than %d, or together they have more than %d MiB"
        '\n  Next step: install the package on the hosts, e.g. by environment="manager", or send the data yourself',
        name,
        folder,
        _MOST_FILES,
        _MOST_DATA // 1024**2,
    )


def _stamp(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116  (six times as fast; a client asks this of all files at each call)
    except OSError:
        return 0
