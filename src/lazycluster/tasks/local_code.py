"""Local modules: those that are neither installed nor part of the standard library, so that no host has them."""

from __future__ import annotations

import dis
import functools
import importlib.machinery
import os
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lazycluster.agent.localmodules import Source

_INSTALLED = {"site-packages", "dist-packages"}
_LIBRARY = os.path.dirname(os.__file__)
# As sysconfig has them: which stays broken for the rest of the process if Ctrl-C comes while it is asked first.
_STANDARD = tuple(
    {
        os.path.realpath(path) + os.sep
        for path in (_LIBRARY, os.path.join(sys.exec_prefix, sys.platlibdir, os.path.basename(_LIBRARY)))
    }
)
_EXTENSIONS = tuple(importlib.machinery.EXTENSION_SUFFIXES)
# Where a project says its name; read without a parser of TOML, which Python 3.10 does not have.
_PROJECT_NAMES = {
    "pyproject.toml": re.compile(
        r"""^\[(?:project|tool\.poetry)\][^\n]*\n(?:(?!\[)[^\n]*\n)*?name\s*=\s*["']([\w.-]+)["']""", re.MULTILINE
    ),
    "setup.cfg": re.compile(r"^\[metadata\][^\n]*\n(?:(?!\[)[^\n]*\n)*?name\s*=\s*([\w.-]+)", re.MULTILINE),
}
_MOST_LEVELS = 6  # directories above a module in which its project is looked for
# Ours and the pickling library are on the host in the manager's version, or not at all.
_NEVER = {"lazycluster", "cloudpickle"}


class Import(NamedTuple):
    """An import statement in compiled code."""

    name: str
    level: int
    names: tuple[str, ...]


# --- which modules are local ----------------------------------------------------------------------
def is_local(module: types.ModuleType) -> bool:
    """Tell whether a module must be sent along, because no host can have it."""
    name = module.__name__
    if name == "__main__":
        return True
    root = name.partition(".")[0]
    if root in _NEVER:
        return False
    file = getattr(module, "__file__", None)
    if isinstance(file, str):
        return is_local_file(file)
    spec = getattr(module, "__spec__", None)
    if getattr(spec, "origin", None) in ("built-in", "frozen"):
        return False
    paths = [path for path in getattr(module, "__path__", ()) if isinstance(path, str)]
    if paths:
        return any(is_local_file(path) for path in paths)
    # Made by a program, not found by an import: it belongs to what made it.
    parent = sys.modules.get(root)
    return spec is None if parent is None or parent is module else is_local(parent)


def is_part(name: str) -> bool:
    """Tell whether a module is local or belongs to a local package, as its compiled parts do."""
    while name:
        module = sys.modules.get(name)
        if module is not None and isinstance(getattr(module, "__file__", None), str) and is_local(module):
            return True
        name = name.rpartition(".")[0]
    return False


@functools.lru_cache(maxsize=8192)
def is_local_file(path: str) -> bool:
    """Tell whether a module from this file is local. Compiled ones are not: they cannot be sent."""
    if path.endswith(_EXTENSIONS) or path.startswith("<frozen"):
        return False
    real = os.path.realpath(path)
    return not _INSTALLED.intersection(Path(real).parts) and not real.startswith(_STANDARD)


def identity(module: types.ModuleType) -> tuple[str, bool, str]:
    """Return what the host needs to know of a module: name, whether it is a package, file name."""
    return module.__name__, hasattr(module, "__path__"), getattr(module, "__file__", None) or ""


# --- what code refers to --------------------------------------------------------------------------
@functools.lru_cache(maxsize=2048)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return the names that code (and what is defined in it) may look up in modules, also by `getattr`."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


@functools.lru_cache(maxsize=2048)
def imports_in(code: types.CodeType) -> tuple[Import, ...]:
    """Return the import statements in code and in what is defined in it."""
    found = []
    if any(dis.opname[operation] == "IMPORT_NAME" for operation in code.co_code[::2]):
        recent: list[Any] = [None, None]
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                level, names = recent
                found.append(Import(instruction.argval, level or 0, tuple(names or ())))
            recent = [recent[1], instruction.argval]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.extend(imports_in(constant))
    return tuple(found)


def absolute_names(statement: Import, package: str) -> list[str]:
    """Return the modules that an import statement may mean: the one it names, then those that `from` may name."""
    name = statement.name
    if statement.level:
        base = package.rsplit(".", statement.level - 1)[0] if statement.level > 1 else package
        name = f"{base}.{name}" if name else base
    if not name:
        return []
    return [name, *(f"{name}.{attribute}" for attribute in statement.names if attribute != "*")]


# --- sources --------------------------------------------------------------------------------------
def sources_of(names: Iterable[str], rewritten: bool = False) -> dict[str, Source]:
    """Return the sources of local modules, of their packages and of all local ones that they import.

    Args:
        names: The modules.
        rewritten: Whether also of those that were rewritten when they were loaded, as pytest does with tests.
    """
    found: dict[str, Source] = {}
    seen: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in seen or name == "__main__":
            continue
        seen.add(name)
        source = source_of(name, rewritten)
        if source is None:
            continue
        found[name] = source
        package = name if source[1] else name.rpartition(".")[0]
        queue.extend(_parents(name))
        for statement in _imports_of_text(source[0], source[2]):
            queue.extend(absolute_names(statement, package))
    return found


def imported_by(text: str, filename: str) -> set[str]:
    """Return the modules that a script may import, wherever in it."""
    return {name for statement in _imports_of_text(text, filename) for name in absolute_names(statement, "")}


def source_of(name: str, rewritten: bool = False) -> Source | None:
    """Return the source of a local module, whether it has been imported or not; None if there is none.

    Args:
        name: The module.
        rewritten: Whether also that of one which was rewritten when it was loaded.
    """
    module = sys.modules.get(name)
    if module is not None:
        if not isinstance(module, types.ModuleType) or not is_local(module):
            return None
        spec = getattr(module, "__spec__", None)
    else:
        spec = find_local(name)
    if spec is None:
        return None
    is_package = spec.submodule_search_locations is not None
    if spec.origin is None or not Path(spec.origin).is_absolute():
        return ("", True, "", "") if is_package else None
    try:
        stamp = Path(spec.origin).stat().st_mtime_ns
    except OSError:
        stamp = 0  # inside an archive
    loader = spec.loader
    if rewritten and not hasattr(loader, "get_source") and spec.origin.endswith(".py"):
        loader = importlib.machinery.SourceFileLoader(spec.name, spec.origin)
    text = _text(loader, spec.name, spec.origin, stamp)
    return None if text is None else (text, is_package, spec.origin, distribution_of(str(Path(spec.origin).parent)))


@functools.lru_cache(maxsize=1024)
def distribution_of(folder: str) -> str:
    """Return the name of the project that a directory is in; empty if there is none that says its name."""
    for place in [Path(folder), *Path(folder).parents][:_MOST_LEVELS]:
        for name, pattern in _PROJECT_NAMES.items():
            try:
                found = pattern.search((place / name).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
            if found:
                return found[1]
        try:
            eggs = sorted(place.glob("*.egg-info"))
        except OSError:
            eggs = []
        if eggs:
            return eggs[0].stem
    return ""


@functools.lru_cache(maxsize=1024)
def _text(loader: Any, name: str, origin: str, stamp: int) -> str | None:
    try:
        text: str | None = loader.get_source(name)
    except (AttributeError, ImportError, OSError, UnicodeError, SyntaxError):
        return None
    return text


@functools.lru_cache(maxsize=1024)
def _imports_of_text(text: str, filename: str) -> tuple[Import, ...]:
    try:
        return imports_in(compile(text, filename, "exec", dont_inherit=True))
    except (SyntaxError, ValueError):
        return ()


def find_local(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find a local module that has not been imported, without importing its package."""
    path: list[str] | None = None
    spec = None
    for end in [*_parents(name), name]:
        known = sys.modules.get(end)
        spec = getattr(known, "__spec__", None) if known is not None else _find_spec(end, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    if spec is None or spec.origin in ("built-in", "frozen"):
        return None
    files = [spec.origin] if spec.origin else path or []
    return spec if any(is_local_file(file) for file in files) else None


def _find_spec(name: str, path: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except (AttributeError, ImportError, OSError, ValueError):
            continue
        if spec is not None:
            return spec
    return None


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
