"""The public names: all that the documentation imports, and the classes of what those give."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api.check_api import API

ROOT = Path(__file__).parents[2]
OURS = "lazycluster"

_MODULES = sorted({*API, f"{OURS}.cluster"})
_FROM = re.compile(rf"from ({OURS}[\w.]*) import \(?((?:\w+(?: as \w+)?(?:,\s*)?)+)\)?")
_REFERENCE = re.compile(rf"^::: ({OURS}[\w.]*)\.(\w+)$", re.MULTILINE)
_DUNDERS = frozenset(
    {
        *("aenter", "aexit", "await", "call", "contains", "enter", "exit", "getitem", "iter", "len", "next"),
        *("add", "and", "eq", "ge", "gt", "hash", "le", "lt", "ne", "or", "sub"),
    }
)


def lines() -> list[str]:
    """Return the names by module, then the classes with what they have."""
    shown = _Shown()
    found: list[str] = []
    for module, some in _documented().items():
        found.append(f"[{module}]")
        for name in some:
            value = getattr(importlib.import_module(module), name)
            found.append(f"{name}: {shown.brief(name, value)}")
        found.append("")
    for name in sorted(_in_reference()):
        shown.add(_in_reference()[name])
    return found + shown.classes()


@functools.cache
def _documented() -> dict[str, list[str]]:
    """Return what can be imported from where: the modules' own lists, and what texts and examples import."""
    found: dict[str, set[str]] = {}
    for name in _MODULES:
        module = importlib.import_module(name)
        found[name] = {*getattr(module, "__all__", ()), *(row.partition(".")[0] for row in API.get(name, ()))}
    for path in _texts():
        for module, some in _FROM.findall(path.read_text(encoding="utf-8").replace("\\n", "\n")):
            names = {one.split()[0] for one in some.split(",") if one.strip()}
            found.setdefault(module, set()).update(names)
    return {module: sorted(found[module]) for module in sorted(found)}


def _texts() -> Iterator[Path]:
    yield from sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*")])


@functools.cache
def _in_reference() -> dict[str, type]:
    """Return the classes of the reference; where they are defined is no promise."""
    found: dict[str, type] = {}
    for path in sorted(ROOT.glob("docs/reference/*.md")):
        for module, name in _REFERENCE.findall(path.read_text(encoding="utf-8")):
            value = _imported(module, name)
            names = value.__all__ if isinstance(value, types.ModuleType) else [name]
            for one in names:
                found[one] = getattr(value, one) if isinstance(value, types.ModuleType) else value
    return {name: value for name, value in found.items() if inspect.isclass(value)}


def _imported(module: str, name: str) -> Any:
    value = getattr(importlib.import_module(module), name, None)
    return importlib.import_module(f"{module}.{name}") if value is None else value


class _Shown:
    """The classes that are described, each once."""

    def __init__(self) -> None:
        self._classes: dict[str, type] = {}

    def add(self, one: type) -> None:
        if one.__module__.partition(".")[0] != OURS:
            return
        known = self._classes.setdefault(_key(one), one)
        assert known is one, f"two public classes are called {_key(one)}: {known} and {one}"

    def brief(self, name: str, value: Any) -> str:
        if inspect.isclass(value):
            self.add(value)
            return f"class {_key(value)}"
        if callable(value):
            return f"def {_signature(value)}"
        return "module" if isinstance(value, types.ModuleType) else type(value).__name__

    def classes(self) -> list[str]:
        """Return the descriptions, those of the classes that public names give included."""
        described: dict[str, list[str]] = {}
        while left := self._classes.keys() - described.keys():
            for key in sorted(left):
                described[key] = list(self._describe(self._classes[key]))
        return [line for key in sorted(described) for line in [*described[key], ""]]

    def _describe(self, one: type) -> Iterator[str]:
        yield f"class {_key(one)}({', '.join(self._bases(one))})"
        yield f"  {_constructor(one)}"
        members: dict[str, str] = {}
        for base in reversed(_own_bases(one)):
            self._add_fields(base)
            members.update(_fields(base))
            members.update(self._members(base))
        yield from (f"  {members[name]}" for name in sorted(members))

    def _bases(self, one: type) -> list[str]:
        """Return the bases that users may name in `except` or `isinstance`: what is inside is no promise."""
        public = {value for value in self._classes.values() if not value.__name__.startswith("_")}
        promised = public & {*_in_reference().values(), *_named()}
        direct = {base for own in _own_bases(one) for base in own.__bases__}
        # Not before Python 3.11 is ReprEnum a base of IntEnum.
        shown = [base for base in one.__mro__[1:] if base is not object and base.__name__ != "ReprEnum"]
        return [
            base.__name__
            for base in shown
            if base in promised or _is_of_python(base) or (base in direct and base.__module__.partition(".")[0] != OURS)
        ]

    def _members(self, base: type) -> Iterator[tuple[str, str]]:
        for name, value in vars(base).items():
            special = name.startswith("__") and name.strip("_") in _DUNDERS and value is not None
            if name.startswith("_") and not special:
                continue
            if special and dataclasses.is_dataclass(base) and name in ("__eq__", "__hash__"):
                continue  # made by the standard library
            text = self._member(base, name, value)
            if text:
                yield name, text

    def _member(self, base: type, name: str, value: Any) -> str:
        if isinstance(value, (property, functools.cached_property)):
            getter = value.fget if isinstance(value, property) else value.func
            self._add_returned(getter)
            return f"{name}: property" + (", can be set" if getattr(value, "fset", None) else "")
        if isinstance(value, (staticmethod, classmethod)):
            self._add_returned(value.__func__)
            return f"{type(value).__name__} {name}{_signature(value.__func__, isinstance(value, classmethod))}"
        if inspect.isfunction(value):
            self._add_returned(value)
            return f"{'async ' if inspect.iscoroutinefunction(value) else ''}{name}{_signature(value, True)}"
        if isinstance(value, enum.Enum):
            return f"{name} = {value.value!r}"
        if inspect.isclass(value) or _is_field(base, name) or type(value).__module__.startswith(("typing", "types")):
            return ""
        return f"{name} = {value!r}" if name.isupper() else f"{name}: attribute"

    def _add_fields(self, base: type) -> None:
        """Note the classes of ours that the fields of a dataclass hold."""
        for field in dataclasses.fields(base) if dataclasses.is_dataclass(base) else ():
            for name in re.findall(r"\w+", str(field.type)) if not field.name.startswith("_") else ():
                found = vars(sys.modules[base.__module__]).get(name)
                if inspect.isclass(found) and not name.startswith("_"):
                    self.add(found)

    def _add_returned(self, function: Any) -> None:
        """Note the classes of ours that a function says it returns."""
        returned = getattr(inspect.unwrap(function), "__annotations__", {}).get("return")
        for name in re.findall(r"\w+", returned) if isinstance(returned, str) else ():
            found = _resolve(inspect.unwrap(function), name)
            if inspect.isclass(found) and not name.startswith("_"):
                self.add(found)


def _key(one: type) -> str:
    """Return the name of a class; where several public ones share it, with the module that it is imported from."""
    homes = _homes().get(one.__name__, {})
    if len(set(homes.values())) < 2:
        return one.__name__
    return next(
        (f"{module.rpartition('.')[2]}.{one.__name__}" for module in homes if homes[module] is one), one.__name__
    )


@functools.cache
def _homes() -> dict[str, dict[str, type]]:
    """Return for the name of each documented class what it stands for in which module."""
    found: dict[str, dict[str, type]] = {}
    for module, some in _documented().items():
        for name in some:
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value):
                found.setdefault(name, {})[module] = value
    return found


def _named() -> set[type]:
    return {one for homes in _homes().values() for one in homes.values()}


def _is_of_python(one: type) -> bool:
    return one.__module__.partition(".")[0] in sys.stdlib_module_names


def _own_bases(one: type) -> list[type]:
    return [base for base in one.__mro__ if base.__module__.partition(".")[0] == OURS]


def _is_field(base: type, name: str) -> bool:
    return dataclasses.is_dataclass(base) and name in {field.name for field in dataclasses.fields(base)}


def _fields(base: type) -> Iterator[tuple[str, str]]:
    """Yield what the objects of a class have beside what the class has."""
    if dataclasses.is_dataclass(base):
        for field in dataclasses.fields(base):
            if not field.name.startswith("_"):
                yield field.name, f"{field.name}: field"
        return
    tree = _class_definitions(base.__module__)[base.__qualname__]
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _is_annotated(node) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and _last(target.value) == "self" and not target.attr.startswith("_"):
                yield target.attr, f"{target.attr}: attribute"
    for node in tree.body:
        if _is_annotated(node) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            yield node.target.id, f"{node.target.id}: attribute"


@functools.cache
def _class_definitions(module: str) -> dict[str, ast.ClassDef]:
    """Return the top-level classes of a module as they are written."""
    return {node.name: node for node in ast.parse(_source(module)).body if isinstance(node, ast.ClassDef)}


@functools.cache
def _source(module: str) -> str:
    return Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")


def _is_annotated(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign)


def _last(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _constructor(one: type) -> str:
    if issubclass(one, enum.Enum):  # what there is of it differs between versions of Python
        return "made of one of its values"
    for base in one.__mro__:
        if "__init__" in vars(base):
            if base.__module__.partition(".")[0] != OURS or getattr(base, "_is_protocol", False):
                return "made as its base is" if base is not object else "made without arguments"
            return f"__init__{_signature(vars(base)['__init__'], True)}"
    return "made without arguments"


def _signature(function: Any, bound: bool = False) -> str:
    """Return the parameters with their defaults; what annotations say is checked by mypy."""
    found = inspect.signature(function)
    some = list(found.parameters.values())[1 if bound else 0 :]
    plain = [one.replace(annotation=one.empty, default=_default(one.default)) for one in some]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


class _Verbatim:
    """A default that is shown as a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _default(value: Any) -> Any:
    if value is inspect.Parameter.empty or value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, (tuple, list)):
        return _Verbatim(repr(type(value)(_default(one) for one in value)))
    if isinstance(value, enum.Enum):
        return _Verbatim(f"{type(value).__name__}.{value.name}")
    if isinstance(value, (dict, set, frozenset)) and not value:
        return value
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return _Verbatim("<factory>")
    return _Verbatim(getattr(value, "__name__", f"<{type(value).__name__}>"))


def _resolve(function: Any, name: str) -> Any:
    """Return what a name in an annotation stands for, also if it is imported for type checkers only."""
    module = sys.modules.get(function.__module__)
    if module is None or not function.__module__.startswith(OURS):
        return None
    if name in vars(module):
        return vars(module)[name]
    where = _for_type_checkers(function.__module__).get(name)
    if where is None or not where[0].startswith(OURS):
        return None
    return getattr(importlib.import_module(where[0]), where[1], None)


@functools.cache
def _for_type_checkers(module: str) -> dict[str, tuple[str, str]]:
    """Return what a module imports under `if TYPE_CHECKING`: name -> (module, name there)."""
    found = {}
    tree = ast.parse(_source(module))
    package = module if hasattr(sys.modules[module], "__path__") else module.rpartition(".")[0]
    for branch in ast.walk(tree):
        if not (isinstance(branch, ast.If) and _last(branch.test) == "TYPE_CHECKING"):
            continue
        for node in branch.body:
            if isinstance(node, ast.ImportFrom):
                path = "." * node.level + (node.module or "")
                where = importlib.util.resolve_name(path, package) if node.level else path
                found.update({alias.asname or alias.name: (where, alias.name) for alias in node.names})
    return found
