"""Local modules of the manager in the process of a call: their code exists there in memory only.

Where the host has a package of the same distribution installed, the rest of it is found there: data and compiled parts.

Pickles of calls refer to the functions of this module by its name, so it has the same name on manager and host.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import linecache
import os
import pickle
import sys
import types
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

# Text, whether it is a package, file name, and the distribution that it is of, as far as the manager knows.
Source = Tuple[str, bool, str, str]

_INSTALLED = ("site-packages", "dist-packages")


# --- copies that are installed here ---------------------------------------------------------------
class Copy(NamedTuple):
    """A module as it is installed.

    Attributes:
        file: Its file, which need not exist if the manager has added the module since; empty for a namespace.
        paths: Where its submodules are searched, if it is a package.
    """

    file: str
    paths: List[str]


class InstalledCopies:
    """Finds modules of the manager among what is installed here.

    Args:
        skipped: The class of the finders that have the manager's own modules.
    """

    def __init__(self, skipped: type) -> None:
        self._skipped = skipped
        self._specs: Dict[str, Any] = {}  # top-level modules and those of namespaces

    def find(self, name: str, is_package: bool, distribution: str) -> Optional[Copy]:
        """Find the installed copy of a module; None if this distribution is not installed.

        Args:
            name: The module's full name.
            is_package: Whether it has submodules.
            distribution: What it is of on the manager; empty if that has the name of the module.
        """
        parts = name.split(".")
        path: Optional[List[str]] = None
        for end in range(1, len(parts) + 1):
            top = ".".join(parts[:end])
            if top not in self._specs:
                self._specs[top] = self._find_spec(top, path, distribution)
            spec = self._specs[top]
            if spec is None:
                return None
            path = list(spec.submodule_search_locations or ())
            if not spec.has_location:
                continue  # a namespace, whose parts may be of several distributions
            if end == len(parts):
                return Copy(spec.origin, path) if bool(path) == is_package else None
            if not path:
                return None
            base = os.path.join(path[0], *parts[end:])
            return Copy(os.path.join(base, "__init__.py"), [base]) if is_package else Copy(base + ".py", [])
        return Copy("", path or [])

    def _find_spec(self, name: str, path: Optional[List[str]], distribution: str) -> Any:
        if name in getattr(sys, "stdlib_module_names", ()):
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, self._skipped):
                continue
            spec = None
            with contextlib.suppress(Exception):  # others' finders may raise anything
                spec = finder.find_spec(name, path)
            if spec is not None:
                there = not spec.has_location or _is_installed(spec, name, distribution)
                return spec if there else None
        return None


def _is_installed(spec: Any, name: str, distribution: str) -> bool:
    """Return whether a module is of an installed distribution: another one may have the same name by chance."""
    wanted = {_normalized(distribution or name), _normalized(name), _normalized(name.partition(".")[0])}
    base = spec.origin
    for _ in range(name.count(".") + (2 if spec.submodule_search_locations else 1)):
        base = os.path.dirname(base)
    for directory in [base, *(path for path in sys.path if os.path.basename(path) in _INSTALLED)]:
        try:
            entries = os.listdir(directory)
        except OSError:
            continue
        for entry in entries:
            stem, extension = os.path.splitext(entry)
            if extension in (".dist-info", ".egg-info") and _normalized(stem.partition("-")[0]) in wanted:
                return True
    return False


def _normalized(name: str) -> str:
    return name.replace("-", "_").replace(".", "_").lower()


def show_lines(file: str, text: str) -> None:
    """Have `inspect` show the manager's code for a module whose file is the one of an installed copy."""
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)


def _is_here(file: str, text: str) -> bool:
    """Return whether this is the manager's machine, or has its directory: the same file at the same path."""
    try:
        with open(file, "rb") as opened:
            return opened.read() == text.encode("utf-8")
    except (OSError, UnicodeEncodeError):
        return False


# --- modules in memory ----------------------------------------------------------------------------
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
    """Imports modules from sources in memory.

    Args:
        sources: The sources by the names of modules.
        copies: Finds what else there is of them; None: nothing else is wanted.
    """

    def __init__(self, sources: Dict[str, Source], copies: Optional[InstalledCopies] = None) -> None:
        self.sources = sources
        self._completed: Dict[str, Set[str]] = {}  # partial modules -> what running their source has added
        self._copies = copies

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find one of the modules in memory."""
        return self.spec(name) if name in self.sources else None

    def spec(self, name: str, is_package: bool = False, filename: str = "") -> Any:
        """Return the spec of a module, whether its source is here or not; what is not sent is in the installed copy."""
        text, is_package, filename, distribution = self.sources.get(name, ("", is_package, filename, ""))
        copy = self._copies.find(name, is_package, distribution) if self._copies is not None else None
        if copy is not None and filename and copy.file:
            filename = copy.file
            if text:
                show_lines(filename, text)
        spec = importlib.machinery.ModuleSpec(name, self, origin=filename, is_package=is_package)
        if is_package and copy is not None:
            spec.submodule_search_locations = list(copy.paths)
        elif is_package and self._copies is not None and _is_here(filename, text):
            spec.submodule_search_locations = [os.path.dirname(filename)]
        spec.has_location = True
        return spec

    def get_data(self, path: str) -> bytes:
        """Return the content of a data file of a package."""
        with open(path, "rb") as file:
            return file.read()

    def get_resource_reader(self, fullname: str) -> Any:
        """Return what `importlib.resources` reads the data of a package with."""
        spec = self.spec(fullname)
        if spec.submodule_search_locations is None:
            return None
        files = [spec.origin, *(os.path.join(path, "__init__.py") for path in spec.submodule_search_locations), ""]
        loader: Any = importlib.machinery.SourceFileLoader(fullname, next(filter(None, files), ""))
        return loader.get_resource_reader(fullname) if loader.path else None

    def get_source(self, fullname: str) -> Optional[str]:
        """Return a module's text; tracebacks show its lines."""
        source = self.sources.get(fullname)
        return source[0] if source else None

    def is_package(self, fullname: str) -> bool:
        """Tell whether a module is a package."""
        return self.sources[fullname][1]

    def get_code(self, fullname: str) -> Any:
        """Compile a module."""
        text, _, filename, _ = self.sources[fullname]
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
_finder = LocalFinder({}, InstalledCopies(LocalFinder))


def install(sources: Dict[str, Source]) -> None:
    """Let the manager's local modules be imported."""
    # Stored objectives of 1.0.0rc1 say nothing of the distributions that their modules are of.
    sources = {name: (*source[:3], source[3] if len(source) > 3 else "") for name, source in sources.items()}
    _finder.update(sources)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _forget_copies(sources)


def _forget_copies(sources: Dict[str, Source]) -> None:
    """Forget modules that others have imported from installed copies: the manager's code counts, with all its parts."""
    for name, (_, _, filename, _) in sources.items():
        module = sys.modules.get(name)
        if module is None or not filename or name.partition(".")[0] in getattr(sys, "stdlib_module_names", ()):
            continue
        if getattr(module, "__loader__", None) is not _finder:
            for other in [other for other in sys.modules if other == name or other.startswith(name + ".")]:
                del sys.modules[other]


def is_local(name: str) -> bool:
    """Tell whether a module is one of the manager's, or a part of one that is found in an installed copy."""
    while name:
        if _finder.sources.get(name, ("", True, "", ""))[2] or name in _modules:
            return True
        name = name.rpartition(".")[0]
    return False


def missing_part(error: BaseException) -> str:
    """Return the next step for an error about something beside a local module that did not travel; else nothing."""
    if isinstance(error, ImportError):
        name = str(error.name or "")
        return _advice(name) if is_local(name) else ""
    path = getattr(error, "filename", None)
    if isinstance(error, FileNotFoundError) and isinstance(path, (str, os.PathLike)):
        for name, (_, _, filename, _) in _finder.sources.items():
            folders = {os.path.dirname(path) for path in (filename, _finder.spec(name).origin) if path}
            if any(os.fspath(path).startswith(folder + os.sep) for folder in folders):
                return _advice(name)
    return ""


def _advice(name: str) -> str:
    top = name.partition(".")[0]
    text = "of the local module {} only the code travels, not its data and compiled parts; if this is one of them, "
    text = text.format(top)
    if _finder.spec(top).submodule_search_locations:
        return text + "bring what is installed on the host up to date, e.g. by prepare()"
    return text + (
        'have it on the hosts (environment="manager" installs there what is installed here, also by '
        '"pip install -e"), or send the file and pass its path'
    )


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
    """Return whether two values are one, as far as pickles keep that."""
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
    spec = _finder.spec(name, is_package, filename)
    if is_package and not spec.origin and hasattr(sys.modules.get(name), "__path__"):
        _modules[name] = sys.modules[name]  # a namespace, of which something is imported already
        return _modules[name]
    module = _modules[name] = LocalModule(name)
    module.__spec__, module.__loader__, module.__file__ = spec, _finder, spec.origin
    module.__package__ = spec.parent
    if is_package:
        module.__path__ = spec.submodule_search_locations
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


@contextlib.contextmanager
def found_by_name() -> Iterator[None]:
    """Have pickle find what is in this module also where the package that it is of on the manager is not installed."""
    package = __name__.partition(".")[0]
    if package in sys.modules:
        yield
        return
    sys.modules[package] = types.ModuleType(package)
    try:
        yield
    finally:
        del sys.modules[package]


def reduced_error(error: BaseException) -> Any:
    """Return how an exception is pickled, such that it can be made again whatever arguments its class takes.

    Nothing, if its class says that itself.
    """
    kind = type(error)
    if kind.__reduce__ is not BaseException.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return NotImplemented
    return made_error, (kind, error.args), error.__dict__ or None


def made_error(kind: Any, args: Tuple[Any, ...]) -> BaseException:
    """Return an exception of a class as pickle makes it; if `__init__` takes other arguments, without calling that."""
    try:
        made: BaseException = kind(*args)
    except Exception:  # noqa: BLE001  (the user's own code)
        made = kind.__new__(kind, *args)
        built_in: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
        with contextlib.suppress(Exception):
            built_in.__init__(made, *args)
    made.args = args
    return made


def tracked_class(identity: str) -> Any:
    """Return the class that went from the manager to a host and comes back."""
    library: Any = importlib.import_module("cloudpickle.cloudpickle")
    try:
        return library._DYNAMIC_CLASS_TRACKER_BY_ID[identity]
    except KeyError:
        raise pickle.UnpicklingError("a class of this result does not exist any more") from None
