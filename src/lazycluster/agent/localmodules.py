"""Local modules of the manager in the process of a call: they exist there in memory only.

Pickles of calls refer to the functions of this module by its name, so it has the same name on manager and host.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import pickle
import sys
import types
from typing import Any, Callable, Dict, Iterable, Optional, Set, Tuple

Source = Tuple[str, bool, str]  # text, whether it is a package, file name


class LocalModule(types.ModuleType):
    """A module of which only what the function uses was sent.

    What is missing comes from running its source, if something asks for it all the same (`getattr` with a name that
    could not be foreseen).
    """

    def __getattr__(self, name: str) -> Any:
        finder = self.__loader__
        if name.startswith("__") or not isinstance(finder, LocalFinder) or not finder.complete(self):
            raise AttributeError("module {!r} has no attribute {!r}".format(self.__name__, name))
        return getattr(self, name)


class LocalFinder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports modules from sources in memory."""

    def __init__(self, sources: Dict[str, Source]) -> None:
        self.sources = sources
        self._completed: Dict[str, Set[str]] = {}  # partial modules -> what running their source has added

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find one of the modules in memory."""
        return self.spec(name) if name in self.sources else None

    def spec(self, name: str, is_package: bool = False, filename: str = "") -> Any:
        """Return the spec of a module, whether its source is here or not."""
        _, is_package, filename = self.sources.get(name, ("", is_package, filename))
        spec = importlib.machinery.ModuleSpec(name, self, origin=filename, is_package=is_package)
        spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> Optional[str]:
        """Return a module's text; tracebacks show its lines."""
        source = self.sources.get(fullname)
        return source[0] if source else None

    def is_package(self, fullname: str) -> bool:
        """Tell whether a module is a package."""
        return self.sources[fullname][1]

    def get_code(self, fullname: str) -> Any:
        """Compile a module."""
        text, _, filename = self.sources[fullname]
        return compile(text, filename, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run a module."""
        exec(self.get_code(module.__name__), module.__dict__)

    def complete(self, module: types.ModuleType) -> bool:
        """Run the source of a partial module once; what was sent of it keeps its identity."""
        name = module.__name__
        if name not in self.sources or name in self._completed:
            return False
        sent = dict(module.__dict__)
        self._completed[name] = set()
        try:
            self.exec_module(module)
        finally:
            self._completed[name].update(module.__dict__.keys() - sent.keys())
            module.__dict__.update(sent)
        return True

    def update(self, sources: Dict[str, Source]) -> None:
        """Take sources. If one has changed, nothing is kept that was made by running any: they use each other."""
        changed = any(name in self.sources and self.sources[name] != source for name, source in sources.items())
        self.sources.update(sources)
        if changed:
            self._forget()

    def _forget(self) -> None:
        for name, names in self._completed.items():
            space = sys.modules[name].__dict__ if name in sys.modules else {}
            for added in names:
                space.pop(added, None)
        self._completed = {}
        for name, module in list(sys.modules.items()):
            if type(module) is types.ModuleType and getattr(module, "__loader__", None) is self:
                del sys.modules[name]
                package, _, last = name.rpartition(".")
                if getattr(sys.modules.get(package), last, None) is module:
                    delattr(sys.modules[package], last)


_PLAIN = (int, float, complex, str, bytes, type(None))

_modules: Dict[str, types.ModuleType] = {}
_sent: Dict[Tuple[str, str], Any] = {}  # module and name -> the value that the manager sent last
_finder = LocalFinder({})


def install(sources: Dict[str, Source]) -> None:
    """Let the manager's local modules be imported."""
    _finder.update(sources)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def fill(portion: Iterable[Tuple[types.ModuleType, Dict[str, Any]]]) -> None:
    """Give modules the members that the manager's have now, in place of what it sent before.

    What was set here meanwhile stays, by an initializer for example.
    """
    for module, members in portion:
        space = module.__dict__
        for name, value in members.items():
            key = (module.__name__, name)
            if name not in space or (key in _sent and _is(space[name], _sent[key])):
                space[name] = value
            _sent[key] = value


def _is(one: Any, other: Any) -> bool:
    """Whether two values are one, as far as pickles keep that."""
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and bool(one == other))


def install_library(sources: Dict[str, Source]) -> None:
    """Import the manager's cloudpickle, whatever version may be installed here."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cloudpickle"]:
        del sys.modules[name]
    sys.meta_path.insert(0, LocalFinder(sources))
    importlib.import_module("cloudpickle.cloudpickle")


# --- what pickles refer to ------------------------------------------------------------------------
def local_module(name: str, is_package: bool, filename: str) -> types.ModuleType:
    """Return the module that stands for a local one of the manager, making it if need be."""
    if name == "__main__":
        return sys.modules[name]
    if name in _modules:
        return _modules[name]
    module = _modules[name] = LocalModule(name)
    spec = _finder.spec(name, is_package, filename)
    module.__spec__, module.__loader__, module.__file__ = spec, _finder, filename
    module.__package__ = spec.parent
    if is_package:
        module.__path__ = []
    # One that is named like a module of the standard library must not take that one's place.
    if name.partition(".")[0] not in getattr(sys, "stdlib_module_names", ()):
        sys.modules[name] = module
    package, _, last = name.rpartition(".")
    if package:
        setattr(local_module(package, True, ""), last, module)
    return module


def module_globals(name: str, is_package: bool, filename: str) -> Dict[str, Any]:
    """Return the namespace of a local module, for the functions that live in it."""
    return local_module(name, is_package, filename).__dict__


def imported_globals(name: str) -> Dict[str, Any]:
    """Return the namespace of a module that is imported from its source."""
    return importlib.import_module(name).__dict__


def cached_function(function: Callable[..., Any], maxsize: Optional[int], typed: bool) -> Any:
    """Make a function with `functools.lru_cache` again."""
    import functools

    return functools.lru_cache(maxsize, typed)(function)


shared_objects: Dict[int, Any] = {}  # a worker of a pool puts in this place what knows where to get them


def shared(number: int) -> Any:
    """Return a large object that several calls have in common."""
    return shared_objects[number]


def tracked_class(identity: str) -> Any:
    """Return the class that went from the manager to a host and comes back."""
    library: Any = importlib.import_module("cloudpickle.cloudpickle")
    try:
        return library._DYNAMIC_CLASS_TRACKER_BY_ID[identity]
    except KeyError:
        raise pickle.UnpicklingError("a class of this result does not exist any more") from None
