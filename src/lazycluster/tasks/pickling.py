"""Calls as bytes: a function with all the local code that it reaches, and its arguments.

Functions and classes of local modules (see `local_code`) go by value, and on the host they are the members of modules
of the same names that exist in memory only: so a module's functions share its globals there, `import helpers` in a
function finds it, and what comes back is an instance of the manager's own class. What cannot go by value (a module's
lock, say) makes the modules concerned go as sources, which the host runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import pickle
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
from cloudpickle import cloudpickle as internals

from lazycluster.agent import localmodules
from lazycluster.agent.call_process import Chunks
from lazycluster.agent.filenames import FileNames

from . import local_code

T = TypeVar("T")

_PROTOCOL = 5
_NONE: Mapping[str, Any] = types.MappingProxyType({})
_OWN = ("builtins", "functools", "cloudpickle", "lazycluster")  # what the process of a call has in any case, or never
_CACHED = type(functools.lru_cache(maxsize=1)(abs))
_PLAIN = (int, str, float, bool, bytes, complex, type(None))
_CODE = (types.FunctionType, type, types.ModuleType, _CACHED)
# Modules whose functions are methods of one object: the module, and where the object is.
_RANDOM_GENERATORS = (("random", "random", "_inst"), ("numpy.random", "numpy.random.mtrand", "_rand"))
# What a module has on the host by itself.
_HOST_ATTRIBUTES = frozenset(("__file__", "__path__", "__spec__", "__loader__", "__cached__"))
# Where errors are raised whose traceback says nothing more than their text.
_PICKLERS = {Path(str(module.__file__)).parent for module in (cloudpickle, localmodules, local_code)}
# A function that uses these may do so to set up what it imports then: it must not find that imported already.
_SET_UP_NAMES = frozenset(("environ", "putenv", "unsetenv", "meta_path"))


@dataclass(frozen=True)
class PickledCall:
    """A call, ready to be sent to any number of hosts.

    Attributes:
        name: What the function is called, for messages.
        parts: The bytes, in order.
        size: How many they are.
        imports: The installed modules that it will import, as far as can be seen.
        fresh: Whether its process must not find anything imported.
    """

    name: str
    parts: tuple[bytes, ...]
    size: int
    imports: tuple[str, ...] = ()
    fresh: bool = False


def dump_call(
    function: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> PickledCall:
    """Pickle a call; later changes of its arguments do not matter any more.

    Args:
        function: Anything that can be called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        TypeError: If something cannot be sent; the message says what, and where it was found.
    """
    if not callable(function):
        raise TypeError(f"{_shown(function)} is not a function")
    arguments, named = tuple(args), dict(kwargs or {})
    return by_value_or_source(
        lambda by_source: _dump(function, arguments, named, by_source), function, [arguments], named
    )


def by_value_or_source(
    dump: Callable[[bool], T],
    function: Any,
    calls: Sequence[tuple[Any, ...]] = ((),),
    kwargs: Mapping[str, Any] = _NONE,
) -> T:
    """Pickle something by value, or else with the sources of local modules.

    Args:
        dump: Does it; is told whether local modules are imported from their sources on the host.
        function: What is pickled, or is to be called with what is pickled; for messages.
        calls: The positional arguments of each call.
        kwargs: The keyword arguments of all calls.

    Returns:
        What `dump` returns.

    Raises:
        TypeError: If something cannot be sent; the message says what, and where it was found.
    """
    try:
        return dump(False)
    except Exception as error:  # noqa: BLE001  (any error of any __reduce__)
        first = error
    try:
        return dump(True)
    except Exception:  # noqa: BLE001
        for arguments in calls:
            text = explain(function, arguments, kwargs, first)
            if "argument" in text:
                break
        raise TypeError(text) from (first if _has_more_to_say(first) else None)


def _has_more_to_say(error: Exception) -> bool:
    """Tell whether code of others has raised an error while it was pickled, so that its traceback is worth showing."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    return step is not None and Path(step.tb_frame.f_code.co_filename).parent not in _PICKLERS


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  (the user's own code)
        return f"a {type(value).__qualname__}"


def name_of(function: Any) -> str:
    """Return what to call a function in messages."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return str(name).replace("<locals>.", "")


def _dump(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], by_source: bool) -> PickledCall:
    file = Snapshot()
    pickler = CallPickler(file, by_source)
    pickler.dump((function, args, kwargs))
    parts = (pickler.dump_rest(), *file.parts)
    return PickledCall(name_of(function), parts, sum(map(len, parts)), pickler.installed(), pickler.fresh)


class Snapshot(Chunks):
    """Keeps copies: the arguments may change while the bytes are on their way."""

    def write(self, data: Any) -> int:
        """Take a part."""
        if isinstance(data, pickle.PickleBuffer):
            data = data.raw()  # the bytes as they lie in memory, whatever the order of dimensions
        part = data if isinstance(data, bytes) else bytes(data)
        self.parts.append(part)
        return len(part)


class _Globals:
    """Stands for the namespace of a local module in a pickle."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module


class CallPickler(FileNames, cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles by value whatever belongs to local modules, and notes what they need.

    Args:
        file: Where to write.
        by_source: Whether local modules are imported from their sources on the host, where they have any.
        buffer_callback: Takes large buffers, which then are not written, see :class:`pickle.Pickler`.

    Attributes:
        pending: By module: the members that it must have on the host, not yet written.
        needed: The local modules whose sources go along.
        imports: The installed modules that are referred to.
        fresh: Whether the process must not find anything imported.
    """

    def __init__(
        self, file: Any, by_source: bool = False, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None
    ) -> None:
        super().__init__(file, protocol=_PROTOCOL, buffer_callback=buffer_callback)
        self.pending: dict[str, dict[str, Any]] = {}
        self.needed: set[str] = set()
        self.imports: dict[str, None] = {}
        self.fresh = False
        self._by_source = by_source
        self._shipped: set[tuple[str, str]] = set()
        self._inspected: set[int] = set()

    def dump_rest(self) -> bytes:
        """Write what local modules must hold, after an object was dumped; returns their sources, which go before it."""
        while self.pending:
            pending, self.pending = self.pending, {}
            self.dump([(sys.modules[name], attributes) for name, attributes in pending.items()])
        self.dump(None)
        return pickle.dumps(local_code.sources_of(self.needed), _PROTOCOL)

    def installed(self) -> tuple[str, ...]:
        """Return the installed modules that the host will import for what was dumped."""
        return tuple(name for name in self.imports if name.partition(".")[0] not in _OWN)

    # --- what to do with an object -------------------------------------------------------------
    def reducer_override(self, obj: Any) -> Any:
        """Decide how an object is pickled."""
        kind = type(obj)
        if kind is types.FunctionType or isinstance(obj, type):
            return self._reduce_code(obj)
        if kind is _Globals:
            return self._reduce_globals(obj.module)
        if isinstance(obj, types.ModuleType):
            return self._reduce_module(obj)
        if kind is _CACHED and self._local_module_of(obj) is not None:
            parameters = obj.cache_parameters()
            self._ship_member(obj)
            return localmodules.cached_function, (obj.__wrapped__, parameters["maxsize"], parameters["typed"])
        if (
            kind in (types.BuiltinMethodType, types.MethodType)
            and (home := _generator_module(obj.__self__)) is not None
        ):
            return getattr, (home, obj.__name__)
        if kind is typing.TypeVar and self._local_module_of(obj) is not None:
            return internals._make_typevar, internals._decompose_typevar(obj)
        in_memory = isinstance(obj, (io.BytesIO, io.StringIO))
        if isinstance(obj, io.IOBase) and not in_memory and obj is not sys.stdout and obj is not sys.stderr:
            raise pickle.PicklingError("an open file cannot be sent")
        return super().reducer_override(obj)

    def _reduce_code(self, obj: Any) -> Any:
        home = self._local_module_of(obj)
        if home is None:
            self._note_import(getattr(obj, "__module__", None))
            return super().reducer_override(obj)
        if self._from_source(home) and _is_member(home, obj):
            return NotImplemented  # by name
        self._ship_member(obj)
        if isinstance(obj, type):
            return internals._dynamic_class_reduce(obj)
        return self._dynamic_function_reduce(obj)

    def _dynamic_function_reduce(self, func: types.FunctionType) -> Any:
        module = sys.modules.get(func.__globals__.get("__name__", ""))
        is_local = module is not None and vars(module) is func.__globals__ and local_code.is_local(module)
        if module is not None and is_local:
            self.globals_ref.setdefault(id(func.__globals__), _Globals(module))
        self._inspect(func)
        reduced = super()._dynamic_function_reduce(func)
        if is_local and func.__globals__["__name__"] != "__main__":
            sent = reduced[2][1]["__globals__"]
            for name in _HOST_ATTRIBUTES & sent.keys():
                del sent[name]
        return reduced

    def _reduce_globals(self, module: types.ModuleType) -> Any:
        if self._from_source(module):
            return localmodules.imported_globals, (module.__name__,)
        return localmodules.module_globals, local_code.identity(module)

    def _reduce_module(self, module: types.ModuleType) -> Any:
        if not local_code.is_local(module) or sys.modules.get(module.__name__) is not module:
            self._note_import(module.__name__)
            return super().reducer_override(module)
        if self._from_source(module):
            return importlib.import_module, (module.__name__,)
        return localmodules.local_module, local_code.identity(module)

    # --- modules -------------------------------------------------------------------------------
    def _local_module_of(self, obj: Any) -> types.ModuleType | None:
        """Return the local module that an object belongs to."""
        name = getattr(obj, "__module__", None)
        module = sys.modules.get(name) if isinstance(name, str) else None
        return module if isinstance(module, types.ModuleType) and local_code.is_local(module) else None

    def _from_source(self, module: types.ModuleType) -> bool:
        """Note that a local module is needed, and tell whether it is to be imported from its source."""
        name = module.__name__
        if name == "__main__":
            return False
        self.needed.add(name)
        return self._by_source and local_code.source_of(name) is not None

    def _note_import(self, name: Any) -> None:
        # What is part of a local package must be imported after the code of the manager, so not ahead of the call.
        if isinstance(name, str) and name not in self.imports and not local_code.is_part(name):
            self.imports[name] = None

    def _ship_member(self, obj: Any) -> None:
        """Make a member of its module here a member of it on the host, too, where others may look for it."""
        module = self._local_module_of(obj)
        if module is not None and _is_member(module, obj) and "." not in obj.__qualname__:
            self._ship(module, obj.__qualname__, obj)

    def _ship(self, module: types.ModuleType, name: str, value: Any) -> None:
        if self._from_source(module) or name in _HOST_ATTRIBUTES or (module.__name__, name) in self._shipped:
            return
        self._shipped.add((module.__name__, name))
        sure = isinstance(value, (*_PLAIN, *_CODE)) or local_code.source_of(module.__name__) is None
        if sure or pickling_error(value) is None:
            self.pending.setdefault(module.__name__, {})[name] = value

    # --- what a function refers to -------------------------------------------------------------
    def _inspect(self, func: types.FunctionType) -> None:
        """Find the modules that a function uses, and what of them."""
        code = func.__code__
        if id(code) in self._inspected:
            return
        self._inspected.add(id(code))
        names = local_code.names_in(code)
        if _SET_UP_NAMES & names or {"sys", "path"} <= names:
            self.fresh = True
        if code.co_flags & inspect.CO_COROUTINE:
            self._note_import("asyncio")
        seen: set[str] = set()
        values = [func.__globals__.get(name) for name in names]
        values += [_content(cell) for cell in func.__closure__ or ()]
        for value in values:
            if isinstance(value, types.ModuleType):
                self._use(value, names, seen)
        package = func.__globals__.get("__package__") or ""
        for statement in local_code.imports_in(code):
            module, *members = local_code.absolute_names(statement, package) or [""]
            if module and self._import(module, names, seen):
                for name in members:
                    self._import(name, names, seen)
            else:
                for name in set(members).intersection(sys.modules):
                    self._note_import(name)

    def _use(self, module: types.ModuleType, names: frozenset[str], seen: set[str]) -> None:
        """Ship those members of a local module that a function which uses it may mean."""
        if module.__name__ in seen or not local_code.is_local(module) or sys.modules.get(module.__name__) is not module:
            return
        seen.add(module.__name__)
        members = vars(module)
        for name in names.intersection(members):
            value = members[name]
            self._ship(module, name, value)
            if isinstance(value, types.ModuleType):
                self._use(value, names, seen)

    def _import(self, name: str, names: frozenset[str], seen: set[str]) -> bool:
        """Handle a module that a function imports; returns whether it is a local one."""
        module = sys.modules.get(name)
        if module is None:
            if local_code.find_local(name) is None:
                self._note_import(name)
                return False
            self.needed.add(name)
        elif isinstance(module, types.ModuleType):
            if not local_code.is_local(module):
                self._note_import(name)
                return False
            if not self._from_source(module):
                if (name, "") not in self._shipped:
                    self._shipped.add((name, ""))
                    self.pending.setdefault(name, {})
                self._use(module, names, seen)
        return True


def _generator_module(owner: Any) -> types.ModuleType | None:
    """Return the module whose random numbers an object makes that is behind its functions, such as `random.random`.

    Sent with what is bound to them, these would carry its state along, and make the same numbers in each call.
    """
    for home, place, name in _RANDOM_GENERATORS:
        module = sys.modules.get(place)
        if module is not None and getattr(module, name, None) is owner:
            return sys.modules.get(home)
    return None


def _is_member(module: types.ModuleType, obj: Any) -> bool:
    found: Any = module
    for part in str(getattr(obj, "__qualname__", "")).split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found is obj


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


class _NullFile:
    def write(self, data: Any) -> int:
        return 0


def pickling_error(value: Any) -> Exception | None:
    """Return the error of pickling an object by value; None if that can be done."""
    try:
        CallPickler(_NullFile()).dump(value)
    except Exception as error:  # noqa: BLE001  (any error of any __reduce__)
        return error
    return None


# --- why a call cannot be pickled: which argument, which part of it, and what to do instead ------------
_DEEPEST = 12
_MOST_PARTS = 200  # of one container; what is beyond is not looked at

_HINTS = (
    (("lock", "RLock", "Condition", "Semaphore", "Event"), "make it in the function: no other process can use it"),
    (("generator", "async_generator", "map", "filter", "zip"), "pass a list of its items"),
    (("TextIOWrapper", "BufferedReader", "BufferedWriter", "FileIO"), "pass the path, and open it in the function"),
    (("socket", "SSLSocket"), "pass the address, and connect in the function"),
    (("coroutine",), "pass the async function itself"),
    (("Thread", "Process", "Popen"), "start it in the function"),
)


def explain(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    """Return a message that names what cannot be sent.

    Args:
        function: The function of the call.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        error: What pickling the call as a whole raised.
    """
    name = name_of(function)
    try:
        return _found(function, name, args, kwargs) or f"the call of {name}() cannot be sent to a host: {error}"
    except Exception:  # noqa: BLE001  (what is looked through may raise anything, also when it is shown)
        return f"the call of {name}() cannot be sent to a host: {type(error).__name__}: {error}"


def _found(function: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    parts = [(f"argument {position + 1} of {name}()", "it", value) for position, value in enumerate(args)]
    parts += [(f"argument {key!r} of {name}()", key, value) for key, value in kwargs.items()]
    parts += [(f"the function {name}()", "its", function)]
    for what, short, value in parts:
        found = find(value)
        if found is not None:
            return _message(what, short, *found)
    return ""


def find(value: Any) -> tuple[str, Any, Exception] | None:
    """Return the innermost part that cannot be pickled: where it is, the part, the error; None if all can."""
    error = pickling_error(value)
    if error is None:
        return None
    where, seen = "", {id(value)}
    for _ in range(_DEEPEST):
        inner = None if _hint(value) else _failing_part(value, seen)
        if inner is None:
            break
        path, value, error = inner
        where += path
        seen.add(id(value))
    return where, value, error


def _failing_part(value: Any, seen: set[int]) -> tuple[str, Any, Exception] | None:
    for count, (path, part) in enumerate(_parts(value)):
        if count >= _MOST_PARTS:
            break
        if id(part) not in seen and not isinstance(part, types.ModuleType):
            error = pickling_error(part)
            if error is not None:
                return path, part, error
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{reprlib.repr(key)}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((" (an item)", part) for part in value)
    elif isinstance(value, functools.partial):
        yield from (("", value.func), (" (partial arguments)", value.args), (" (partial arguments)", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), ("", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, type):
        yield from ((f".{key}", part) for key, part in vars(value).items() if not key.startswith("__"))
    else:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from ((f".{key}", part) for key, part in attributes.items())


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f" (variable {name!r} of the enclosing function)", cell.cell_contents
        except ValueError:
            continue
    for index, default in enumerate(function.__defaults__ or ()):
        yield f" (default value {index + 1})", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f" (default value of {name!r})", default
    for name in sorted(local_code.names_in(function.__code__)):
        if name in function.__globals__:
            yield f" (global variable {name!r})", function.__globals__[name]
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield " (the decorated function)", wrapped


def _hint(value: Any) -> str:
    return next((hint for kinds, hint in _HINTS if type(value).__name__ in kinds), "")


def _message(what: str, short: str, where: str, value: Any, error: Exception) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    # "its global variable 'lock'", but "it (an item)"
    place = where.replace("(", "", 1).replace(")", "", 1) if short == "its" else where
    part = short + place if place else "it"
    text = f"{what} cannot be sent to a host: {part} is a {name} ({error})"
    hint = _hint(value)
    return f"{text}\n  Next step: {hint}" if hint else text
