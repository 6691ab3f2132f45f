"""The user's own modules, which the manager sends as files, and sends again when they change."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

STAMP = "stamp"
"""The file beside the directory of the modules that is replaced after they have changed."""

LOOK = 0.25
"""Seconds between two looks at it."""


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module anew each time: bytecode in files cannot be told from that of the second before."""

    def get_code(self, fullname: str) -> Any:
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules before those that may be installed under the same names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stamp = self.read_stamp()

    def read_stamp(self) -> bytes:
        """Return what changes when the modules do."""
        try:
            return (self.directory / STAMP).read_bytes()
        except OSError:
            return b""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find one of the modules."""
        base = self.directory / "modules" / name.replace(".", "/")
        package = base / "__init__.py"
        if package.is_file():
            # What was not sent of a package, such as its data, may be installed.
            places = [str(base), *_installed(name, path)]
            loader = _Loader(name, str(package))
            return importlib.util.spec_from_file_location(
                name, package, loader=loader, submodule_search_locations=places
            )
        file = base.with_suffix(".py")
        if file.is_file():
            return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))
        return None

    def is_ours(self, module: Any) -> bool:
        """Whether a module was sent."""
        return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Loader)


def _installed(name: str, path: Any) -> list[str]:
    try:
        spec = importlib.machinery.PathFinder.find_spec(name, path)
    except (ImportError, ValueError):
        return []
    return list(spec.submodule_search_locations or ()) if spec is not None else []


_finder: _Finder | None = None


def install(directory: str | None) -> None:
    """Let the modules in a directory be imported."""
    global _finder
    if directory and _finder is None:
        _finder = _Finder(Path(directory))
        sys.meta_path.insert(0, _finder)


def refresh() -> None:
    """Forget the modules that were imported if they have changed since."""
    if _finder is None:
        return
    stamp = _finder.read_stamp()
    if stamp == _finder.stamp:
        return
    _finder.stamp = stamp
    importlib.invalidate_caches()
    for name in [name for name, module in list(sys.modules.items()) if _finder.is_ours(module)]:
        sys.modules.pop(name, None)


def look(server: Any) -> None:
    """Have changes noticed soon in a server of distributed, for clients of other origin: ours see to it before."""
    from tornado.ioloop import PeriodicCallback

    server.periodic_callbacks["sent-modules"] = PeriodicCallback(refresh, LOOK * 1000)
