"""Messages for calls that cannot be pickled: which argument, which part of it, and what to do instead."""

from __future__ import annotations

import functools
import reprlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

from .local_code import names_in
from .pickling import name_of, pickling_error

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
    for name in sorted(names_in(function.__code__)):
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
    return f"{text}. Next step: {hint}" if hint else text
