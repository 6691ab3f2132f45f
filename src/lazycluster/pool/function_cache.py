"""Functions that need not be packed each time: those of which it can be seen that they are what they were."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from typing import Any

from lazycluster.tasks import local_code

from .serialization import PLAIN, Packed, pack

__all__ = ["FunctionCache"]

_KEPT = 128


class FunctionCache:
    """Packs functions, each state of one once."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], tuple[Packed, Any]] = OrderedDict()

    def pack(self, function: Any) -> Packed:
        """Pack a function, see :func:`~lazycluster.pool.serialization.pack`."""
        key = cache_key(function)
        if key is None:
            return pack(function)
        found = self._known.get(key)
        if found is None:
            # The code is kept along, so that no other gets its identity.
            found = self._known[key] = pack(function), getattr(function, "__code__", function)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return found[0]


def cache_key(function: Any) -> tuple[Any, ...] | None:
    """Return what is equal as long as a function would be packed to the same; None if that cannot be told."""
    if type(function) is not types.FunctionType:
        return None
    module = sys.modules.get(function.__module__)
    if module is None or function.__closure__ or function.__dict__:
        return None
    code = function.__code__
    if not local_code.is_local(module):
        here = getattr(module, function.__name__, None) is function
        return (id(code), id(function.__globals__), "installed") if here else None
    values = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if not all(type(value) in PLAIN for value in values):
        return None
    if local_code.imports_in(code):
        return None  # what it imports may be local, and have changed
    found: list[Any] = [id(code), function.__qualname__, function.__module__, *map(_exact, values)]
    for name in local_code.names_in(code):
        if name in function.__globals__:
            value = function.__globals__[name]
            if type(value) in PLAIN:
                found += [name, _exact(value)]
            elif isinstance(value, types.ModuleType) and not local_code.is_local(value):
                found += [name, id(value)]
            else:
                return None
    return tuple(found)


def _exact(value: Any) -> tuple[type, Any]:
    """Return what equals that of the same value only: ``1 == True`` and ``0.0 == -0.0``."""
    return type(value), repr(value) if isinstance(value, (float, complex)) else value
