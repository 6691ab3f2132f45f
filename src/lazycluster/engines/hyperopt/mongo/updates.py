"""Updates: what becomes of a document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bson import Int64

from . import codec
from .errors import CommandError, bad_value, failed_to_parse
from .query import operators
from .values import MISSING, order

Document = dict[str, Any]
Change = Callable[[Document, bool], Document]
_INT32 = range(-(1 << 31), 1 << 31)
_INT64 = range(-(1 << 63), 1 << 63)


def compile_update(changes: Any) -> Change:
    """Return the function that makes the new document from the old one, and from whether it is being inserted."""
    if not isinstance(changes, Mapping):
        raise failed_to_parse("an update must be a document; pipelines are not supported")
    if not operators(changes):
        return lambda document, inserted: _replaced(document, changes)
    for name, fields in changes.items():
        _check_modifier(name, fields)
    _check_conflicts([path for fields in changes.values() for path in fields])

    def change(document: Document, inserted: bool) -> Document:
        result = codec.decode(codec.encode(document))  # much faster than a deep copy
        for name, fields in changes.items():
            if name == "$setOnInsert" and not inserted:
                continue
            for path, operand in fields.items():
                _MODIFIERS[name](result, path.split("."), operand)
        _check_id(document, result)
        return result

    return change


def _check_modifier(name: str, fields: Any) -> None:
    if name not in _MODIFIERS:
        raise failed_to_parse(f"Unknown modifier: {name}")
    if not isinstance(fields, Mapping):
        raise failed_to_parse(f"{name} needs a document")
    for path in fields:
        if not path or "$" in path or "" in path.split("."):
            raise bad_value(f"the path {path!r} is not supported in an update")


def _check_conflicts(paths: list[str]) -> None:
    """Refuse two changes of one field, or of a field and of a part of it: which of them should be the last?"""
    taken: set[str] = set()
    whole = set(paths)
    for path in paths:
        parts = path.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts))} & whole
        if path in taken or above:
            at = min(above, default=path)
            raise CommandError(40, f"Updating the path '{path}' would create a conflict at '{at}'")
        taken.add(path)


def _replaced(document: Document, replacement: Mapping[str, Any]) -> Document:
    if any(name.startswith("$") for name in replacement):
        raise failed_to_parse("a replacement cannot have fields that begin with $")
    result = dict(replacement)
    if "_id" in document:
        result = {"_id": document["_id"], **result}
    _check_id(document, result)
    return result


def _check_id(document: Document, result: Document) -> None:
    if "_id" in document and ("_id" not in result or order(result["_id"]) != order(document["_id"])):
        raise CommandError(66, "Performing an update on the path '_id' would modify the immutable field '_id'")


def _parent(document: Any, path: list[str], create: bool) -> Any:
    """Return what holds the last part of a path; None if there is no such thing."""
    place = document
    for part in path[:-1]:
        if isinstance(place, list):
            place = _element(place, part)
            inner = place[0]
        else:
            inner = place.get(part, MISSING)
            if inner is MISSING:
                if not create:
                    return None
                inner = place[part] = {}
        if not isinstance(inner, (dict, list)):
            if not create:
                return None
            raise CommandError(28, f"Cannot create field {path[-1]!r} in element {{{part}: {inner!r}}}")
        place = inner
    return place


def _element(place: list[Any], part: str) -> list[Any]:
    if not part.isdigit() or int(part) >= len(place):
        raise CommandError(28, f"there is no element {part!r} in the array")
    return [place[int(part)]]


def _get(document: Document, path: list[str]) -> Any:
    place = _parent(document, path, False)
    if isinstance(place, list):
        index = int(path[-1]) if path[-1].isdigit() else len(place)
        return place[index] if index < len(place) else MISSING
    return MISSING if place is None else place.get(path[-1], MISSING)


def _set(document: Document, path: list[str], value: Any) -> None:
    place = _parent(document, path, True)
    if isinstance(place, list):
        if not path[-1].isdigit() or int(path[-1]) > len(place) + 1000:
            raise CommandError(28, f"Cannot create field {path[-1]!r} in an array")
        index = int(path[-1])
        place += [None] * (index + 1 - len(place))
        place[index] = value
    else:
        place[path[-1]] = value


def _unset(document: Document, path: list[str], operand: Any) -> None:
    place = _parent(document, path, False)
    if isinstance(place, list):
        if path[-1].isdigit() and int(path[-1]) < len(place):
            place[int(path[-1])] = None
    elif place is not None:
        place.pop(path[-1], None)


def _increase(document: Document, path: list[str], operand: Any) -> None:
    old = _get(document, path)
    for value in (operand, 0 if old is MISSING else old):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CommandError(14, f"Cannot increment {'.'.join(path)!r}: {value!r} is not a number")
    result = operand if old is MISSING else old + operand
    if isinstance(result, int):
        if result not in _INT64:
            raise bad_value(f"{'.'.join(path)!r} would not fit into 64 bits")
        if isinstance(operand, Int64) or isinstance(old, Int64) or result not in _INT32:
            result = Int64(result)
    _set(document, path, result)


def _push(document: Document, path: list[str], operand: Any) -> None:
    if operators(operand):
        raise bad_value(f"$push with {next(iter(operand))} is not supported")
    old = _get(document, path)
    if old is MISSING:
        _set(document, path, [operand])
    elif isinstance(old, list):
        old.append(operand)
    else:
        raise bad_value(f"The field {'.'.join(path)!r} must be an array")


_MODIFIERS: dict[str, Callable[[Document, list[str], Any], None]] = {
    "$set": _set,
    "$setOnInsert": _set,
    "$unset": _unset,
    "$inc": _increase,
    "$push": _push,
}


def upserted(conditions: Mapping[str, Any]) -> Document:
    """Return the document that an upsert begins with: the fields that the filter says to be equal to something."""
    document: Document = {}
    for name, wanted in conditions.items():
        if name == "$and":
            for inner in wanted:
                document.update(upserted(inner))
        elif not name.startswith("$") and not operators(wanted):
            _set(document, name.split("."), wanted)
        elif operators(wanted) and "$eq" in wanted:
            _set(document, name.split("."), wanted["$eq"])
    return document
