"""Functions and calls as bytes for the workers of a pool: functions once, arguments in chunks, large arrays apart."""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lazycluster.agent import localmodules
from lazycluster.agent.pool_protocol import CHUNK, LOCAL_CHUNK
from lazycluster.tasks import local_code
from lazycluster.tasks.pickling import CallPickler, Snapshot, by_value_or_source, name_of

__all__ = ["PLAIN", "FunctionCache", "Packed", "PackedCalls", "Share", "cache_key", "pack", "pack_calls"]

_PROTOCOL = 5
PLAIN = frozenset((int, str, float, bool, bytes, complex, type(None)))  # types whose values never change
_LAYOUT = struct.Struct("!QI")
_BUFFER = struct.Struct("!QQ")
_ALIGNMENT = 64
_MAX_FUNCTIONS = 128  # in the cache

Share = Callable[[Any], "int | None"]  # gives an array a number, under which workers find it, or declines


@dataclass(frozen=True)
class Packed:
    """An object for all workers of a host: laid out so that they map it instead of copying it.

    Attributes:
        name: What it is called, for messages.
        parts: The bytes, in order.
        size: How many they are.
        digest: Equal for equal bytes.
        imports: The installed modules that it needs.
        fresh: Whether nothing may be imported before it.
    """

    name: str
    parts: tuple[bytes, ...]
    size: int
    digest: bytes
    imports: tuple[str, ...] = ()
    fresh: bool = False


@dataclass(frozen=True)
class PackedCalls:
    """The arguments of some calls.

    Attributes:
        kind: What kind of chunk they are.
        parts: The bytes, in order.
        size: How many they are.
        imports: The installed modules that they need.
    """

    kind: int
    parts: tuple[bytes, ...]
    size: int
    imports: tuple[str, ...] = ()


class _SharingPickler(CallPickler):
    def __init__(self, file: Any, by_source: bool, share: Share) -> None:
        super().__init__(file, by_source)
        self._share = share

    def reducer_override(self, obj: Any) -> Any:
        if is_array(obj):
            number = self._share(obj)
            if number is not None:
                return localmodules.shared, (number,)
        return super().reducer_override(obj)


def is_array(obj: Any) -> bool:
    """Tell whether something is a NumPy array that holds its values itself."""
    kind = type(obj)
    return kind.__name__ == "ndarray" and kind.__module__ == "numpy" and not obj.dtype.hasobject


def pack(value: Any) -> Packed:
    """Pack an object that workers share; later changes of it do not matter any more.

    Raises:
        TypeError: If something cannot be sent; the message says what, and where it was found.
    """
    return by_value_or_source(lambda by_source: _pack(value, by_source), value)


def _pack(value: Any, by_source: bool) -> Packed:
    file = Snapshot()
    buffers: list[bytes] = []
    pickler = CallPickler(file, by_source, lambda buffer: buffers.append(bytes(buffer.raw())))
    pickler.dump(value)
    stream = [pickler.dump_rest(), *file.parts]
    size = sum(map(len, stream))
    position = _LAYOUT.size + len(buffers) * _BUFFER.size + size
    table, tail = [], []
    for data in buffers:
        gap = -position % _ALIGNMENT
        table.append(_BUFFER.pack(position + gap, len(data)))
        tail += [bytes(gap), data]
        position += gap + len(data)
    parts = (_LAYOUT.pack(size, len(buffers)), *table, *stream, *tail)
    name = name_of(value) if callable(value) else type(value).__name__
    return Packed(name, parts, position, _digest(parts), pickler.installed(), pickler.fresh)


def _digest(parts: Sequence[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(part)
    return digest.digest()


def pack_calls(
    function: Any, calls: Sequence[tuple[Any, ...]], kwargs: dict[str, Any] | None, share: Share
) -> PackedCalls:
    """Pack the arguments of calls.

    Args:
        function: What is to be called, for messages.
        calls: The positional arguments of each.
        kwargs: Keyword arguments, the same for all.
        share: Gives large arrays their numbers.

    Raises:
        TypeError: If something cannot be sent; the message says what.
    """
    if not kwargs and all(type(argument) in PLAIN for arguments in calls for argument in arguments):
        data = pickle.dumps((calls, None), _PROTOCOL)
        return PackedCalls(CHUNK, (data,), len(data))
    return by_value_or_source(
        lambda by_source: _pack_calls(calls, kwargs, share, by_source), function, calls, kwargs or {}
    )


def _pack_calls(
    calls: Sequence[tuple[Any, ...]], kwargs: dict[str, Any] | None, share: Share, by_source: bool
) -> PackedCalls:
    file = Snapshot()
    pickler = _SharingPickler(file, by_source, share)
    pickler.dump((calls, kwargs))
    if not pickler.pending and not pickler.needed:
        parts = tuple(file.parts)
        return PackedCalls(CHUNK, parts, sum(map(len, parts)), pickler.installed())
    sources = pickler.dump_rest()
    parts = (sources, *file.parts)
    return PackedCalls(LOCAL_CHUNK, parts, sum(map(len, parts)), pickler.installed())


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
            while len(self._known) > _MAX_FUNCTIONS:
                self._known.popitem(last=False)
        return found[0]


def cache_key(function: Any) -> tuple[Any, ...] | None:
    """Return a key that is equal as long as a function would be packed to the same bytes; None if there is none."""
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
    """Return a key that equals that of the same value only: ``1 == True`` and ``0.0 == -0.0``."""
    return type(value), repr(value) if isinstance(value, (float, complex)) else value
