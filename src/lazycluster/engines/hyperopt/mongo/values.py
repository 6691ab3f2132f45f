"""Values of documents: how they are ordered, and how a dotted path finds them."""

from __future__ import annotations

import datetime
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp

from .errors import bad_value

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_SIGN = 1 << 63


class _Missing:
    """The value of a field that a document does not have."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()


# --- order ---------------------------------------------------------------------------------------
def order(value: Any) -> bytes:
    """Return a key that sorts as MongoDB sorts the value: first by kind, then within the kind.

    Equal keys mean equal values (the number 1 is equal to 1.0). Keys can be joined: those of lists of values sort as
    the lists do. None of them begins with the byte 0xff.
    """
    encode = _ENCODERS.get(type(value))
    if encode is not None:
        return encode(value)
    for kind, encode in _ENCODERS.items():
        if isinstance(value, kind):
            return encode(value)
    raise bad_value(f"values of type {type(value).__name__} cannot be compared")


def bracket(key: bytes) -> int:
    """Return the kind of a key; comparisons never cross kinds."""
    return key[0]


def _number(value: float | int) -> bytes:
    if value != value:
        return b"\x0a\x00"  # not a number is less than all of them
    near = float(value) + 0.0  # the addition makes -0.0 equal to 0.0
    bits = int(struct.unpack(">Q", struct.pack(">d", near))[0])
    bits = ~bits & 0xFFFFFFFFFFFFFFFF if bits & _SIGN else bits | _SIGN
    # Whole numbers above 2**53 are not all doubles: the rest tells them apart.
    rest = value - int(near) if isinstance(value, int) else 0
    return b"\x0a\x01" + bits.to_bytes(8, "big") + (rest + 0x8000).to_bytes(2, "big")


def _text(value: str) -> bytes:
    return b"\x0f" + _terminated(value.encode("utf-8", "surrogatepass"))


def _terminated(data: bytes) -> bytes:
    return data.replace(b"\x00", b"\x00\xff") + b"\x00\x00"


def _mapping(value: Mapping[str, Any]) -> bytes:
    parts = [b"\x14"]
    for name, inner in value.items():
        key = order(inner)
        parts += [key[:1], _terminated(str(name).encode("utf-8", "surrogatepass")), key]
    parts.append(b"\x00")
    return b"".join(parts)


def _list(value: Sequence[Any]) -> bytes:
    return b"\x19" + b"".join(map(order, value)) + b"\x00"


def _binary(value: bytes) -> bytes:
    subtype = value.subtype if isinstance(value, Binary) else 0
    return b"\x1e" + struct.pack(">IB", len(value), subtype) + bytes(value)


def milliseconds(value: datetime.datetime) -> int:
    """Return a date as MongoDB has it; one without a time zone is UTC."""
    if value.tzinfo is None:
        value = value.replace(tzinfo=datetime.timezone.utc)
    return (value - _EPOCH) // datetime.timedelta(milliseconds=1)


def _signed(tag: bytes, value: int) -> bytes:
    return tag + (value + _SIGN).to_bytes(8, "big")


_ENCODERS: dict[type, Callable[[Any], bytes]] = {
    MinKey: lambda value: b"\x01",
    type(None): lambda value: b"\x05",
    _Missing: lambda value: b"\x05",
    bool: lambda value: b"\x28\x01" if value else b"\x28\x00",
    int: _number,
    Int64: _number,
    float: _number,
    Decimal128: lambda value: _number(float(value.to_decimal())),
    str: _text,
    dict: _mapping,
    list: _list,
    bytes: _binary,
    Binary: _binary,
    ObjectId: lambda value: b"\x23" + value.binary,
    datetime.datetime: lambda value: _signed(b"\x2d", milliseconds(value)),
    Timestamp: lambda value: b"\x2f" + struct.pack(">II", value.time, value.inc),
    Regex: lambda value: b"\x32" + _terminated(str(value.pattern).encode()) + _terminated(str(value.flags).encode()),
    re.Pattern: lambda value: order(Regex.from_native(value)),
    Code: lambda value: b"\x3c" + _terminated(str(value).encode()),
    MaxKey: lambda value: b"\x7f",
}
try:
    from bson.datetime_ms import DatetimeMS
except ImportError:  # an older bson, which has no dates outside Python's range
    pass
else:
    _ENCODERS[DatetimeMS] = lambda value: _signed(b"\x2d", int(value))


# --- paths ---------------------------------------------------------------------------------------
def find(document: Any, path: str) -> Iterator[Any]:
    """Yield the values under a dotted path: several where it leads through lists, MISSING where there is none."""
    if "." not in path:
        yield document.get(path, MISSING) if isinstance(document, dict) else MISSING
        return
    yield from _walk(document, path.split("."), 0)


def _walk(value: Any, parts: list[str], depth: int) -> Iterator[Any]:
    if depth == len(parts):
        yield value
    elif isinstance(value, dict):
        if parts[depth] in value:
            yield from _walk(value[parts[depth]], parts, depth + 1)
        else:
            yield MISSING
    elif isinstance(value, list):
        if parts[depth].isdigit():
            index = int(parts[depth])
            if index < len(value):
                yield from _walk(value[index], parts, depth + 1)
        found = [inner for inner in value if isinstance(inner, dict)]
        for inner in found:
            yield from _walk(inner, parts, depth)
        if not found and not parts[depth].isdigit():
            yield MISSING
    else:
        yield MISSING


def spread(document: Any, path: str) -> Iterator[Any]:
    """Yield the values under a path, and for a list also its elements: a condition holds if one of them fulfils it."""
    nothing = True
    for value in find(document, path):
        nothing = False
        if isinstance(value, list):
            yield from value
        yield value
    if nothing:
        yield MISSING
