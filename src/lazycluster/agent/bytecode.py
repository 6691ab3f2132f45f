"""Compiled modules of an interpreter that may not keep them beside their sources: a cache of this user's own.

Python compiles each module that it imports and keeps the result beside the source. Where that belongs to somebody
else, and was not compiled when it was installed, as uv does not, each process would compile everything anew. Whoever
runs this module in an interpreter has the rest of its imports look into the cache first. What is compiled beside the
sources is used as ever, and nothing is cached for directories that this user may write to.
"""

from __future__ import annotations

import os
import sys
import zlib
from importlib import machinery

from . import ownership

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Dict, List

ROOT = "~/.cache/lazycluster/bytecode"  # where environments are kept, too
_KEPT = 4  # interpreters, as they are installed at one time: what was used longest ago goes
_LEAST_FREE = 512 * 1024 * 1024  # bytes
_LACKING = 0.1  # part of the packages in a directory without bytecode, from which on it is cached

found: Dict[str, Any] = {"lacking": [], "cache": "", "problem": ""}
"""Directories without bytecode, where that is kept, and why it is not if it is not."""


def use() -> None:
    """Have the bytecode of further imports kept, where it would be lost otherwise."""
    if sys.dont_write_bytecode or sys.pycache_prefix or found["lacking"]:
        return
    lacking = [path for path in _directories() if _lacks(path)]
    if not lacking:
        return
    found["lacking"] = lacking
    root = os.path.expanduser(ROOT)
    cache = os.path.join(root, _key(lacking))
    try:
        ownership.make(cache, 0o700)
        space = os.statvfs(cache)
        if space.f_bavail * space.f_frsize < _LEAST_FREE:
            found["problem"] = "the disk of {} is almost full".format(root)
            return
        os.utime(cache)  # the time of the last use
    except OSError as error:
        found["problem"] = "{}: {}".format(error.filename, error.strerror)
        return
    found["cache"] = cache
    _install(cache, lacking)
    _remove_old(root)


def _directories() -> List[str]:
    """Return the directories of the standard library and of installed packages."""
    library = os.path.dirname(os.__file__)
    names = ("site-packages", "dist-packages")
    packages = [path for path in sys.path if os.path.basename(path) in names and os.path.isdir(path)]
    return list(dict.fromkeys([library, *packages]))


def _lacks(directory: str) -> bool:
    """Tell whether modules in a directory have no bytecode, and this user cannot put any there."""
    if os.access(directory, os.W_OK):
        return False
    name = "__init__.{}.pyc".format(sys.implementation.cache_tag)
    packages = compiled = 0
    for entry in _names(directory):
        package = os.path.join(directory, entry)
        if entry != "test" and os.path.isfile(os.path.join(package, "__init__.py")):
            packages += 1
            compiled += os.path.isfile(os.path.join(package, "__pycache__", name))
    return packages - compiled > packages * _LACKING


def _names(directory: str) -> List[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _key(directories: List[str]) -> str:
    """Return a name for an interpreter with what is installed for it.

    Whoever installs another version gets another cache: Python takes a source for the same that has the same size and
    time, and there are installers that set times.
    """
    state = repr((sys.version, [(directory, _names(directory)) for directory in directories])).encode()
    return "{}-{:08x}{:08x}".format(sys.implementation.cache_tag, zlib.crc32(state), zlib.adler32(state))


class _BytecodeLoader(machinery.SourceFileLoader):
    """A loader of modules whose bytecode is in the cache, below the same path as it would have elsewhere."""

    cache = ""

    def get_data(self, path: str) -> bytes:
        """Read a file; bytecode from the cache, if it is there."""
        if path.endswith(".pyc"):
            try:
                return super().get_data(self.cache + path)
            except OSError:
                pass
        return super().get_data(path)

    def set_data(self, path: str, data: Any, **options: Any) -> None:
        """Write bytecode."""
        super().set_data(self.cache + path, data, **options)


def _install(cache: str, directories: List[str]) -> None:
    _BytecodeLoader.cache = cache
    within = tuple(os.path.join(path, "") for path in directories)
    kinds = (
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (_BytecodeLoader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    )

    def hook(path: str) -> machinery.FileFinder:
        if not os.path.join(path, "").startswith(within) or not os.path.isdir(path):
            raise ImportError("not cached", path=path)
        return machinery.FileFinder(path, *kinds)

    sys.path_hooks.insert(0, hook)
    for path in list(sys.path_importer_cache):
        if os.path.join(path, "").startswith(within):
            del sys.path_importer_cache[path]


def _remove_old(root: str) -> None:
    """Remove the caches of interpreters that were not used for long, but a few."""
    times = {}
    for name in _names(root):
        try:
            times[name] = os.stat(os.path.join(root, name)).st_mtime
        except OSError:
            continue  # another process has removed it
    for name in sorted(times, key=lambda name: times[name])[:-_KEPT]:
        import shutil

        shutil.rmtree(os.path.join(root, name), ignore_errors=True)
