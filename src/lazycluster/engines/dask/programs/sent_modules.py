"""The user's own modules, which the manager sends as files, and sends again when they change."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from ....agent import localmodules

STAMP = "stamp"
"""The file beside the directory of the modules that is replaced after they have changed."""

DISTRIBUTIONS = ".distributions.json"
"""The file among the modules that says by name which distributions they are of."""

LOOK = 0.25
"""Seconds between two looks at it."""


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module anew each time: bytecode in files cannot be told from that of the second before."""

    def __init__(self, fullname: str, path: str, shown: str) -> None:
        super().__init__(fullname, path)
        self._shown = shown  # its file as others see it: where what belongs to the module is beside it

    def get_code(self, fullname: str) -> Any:
        text = self.get_data(self.path)
        if self._shown != self.path:
            localmodules.show_lines(self._shown, text.decode("utf-8", "replace"))
        return compile(text, self.path, "exec", dont_inherit=True)

    def get_resource_reader(self, name: Any = None) -> Any:
        return importlib.machinery.SourceFileLoader(name, self._shown).get_resource_reader(name)


class _SentFinder(importlib.abc.MetaPathFinder):
    """Finds the modules before those that may be installed under the same names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stamp = self.read_stamp()
        self._copies = localmodules.InstalledCopies(_SentFinder)

    def read_stamp(self) -> bytes:
        """Return what changes when the modules do."""
        try:
            return (self.directory / STAMP).read_bytes()
        except OSError:
            return b""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find one of the modules."""
        base = self.directory / "modules" / name.replace(".", "/")
        file = base / "__init__.py"
        is_package = file.is_file()
        if not is_package:
            file = base.with_suffix(".py")
            if not file.is_file():
                return None
        # What was not sent of a package, such as its data, may be installed.
        copy = self._copies.find(name, is_package, self._distributions().get(name, ""))
        shown = copy.file if copy is not None and copy.file else str(file)
        places = [str(base), *(copy.paths if copy is not None else ())] if is_package else None
        loader = _Loader(name, str(file), shown)
        return importlib.util.spec_from_file_location(name, shown, loader=loader, submodule_search_locations=places)

    def _distributions(self) -> Any:
        try:
            return json.loads((self.directory / "modules" / DISTRIBUTIONS).read_bytes())
        except OSError:
            return {}

    def forget(self) -> None:
        """Forget what was found."""
        self._copies = localmodules.InstalledCopies(_SentFinder)

    def is_ours(self, module: Any) -> bool:
        """Tell whether a module was sent."""
        return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Loader)


_finder: _SentFinder | None = None


def install(directory: str | None) -> None:
    """Let the modules in a directory be imported."""
    global _finder
    if directory and _finder is None:
        _finder = _SentFinder(Path(directory))
        sys.meta_path.insert(0, _finder)


def refresh() -> None:
    """Forget the modules that were imported if they have changed since."""
    if _finder is None:
        return
    stamp = _finder.read_stamp()
    if stamp == _finder.stamp:
        return
    _finder.stamp = stamp
    _finder.forget()
    importlib.invalidate_caches()
    for name in [name for name, module in list(sys.modules.items()) if _finder.is_ours(module)]:
        sys.modules.pop(name, None)


def look(server: Any) -> None:
    """Have changes noticed soon in a server of distributed, for clients of other origin: ours see to it before."""
    from tornado.ioloop import PeriodicCallback

    server.periodic_callbacks["sent-modules"] = PeriodicCallback(refresh, LOOK * 1000)
