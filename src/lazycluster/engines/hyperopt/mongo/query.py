"""Filters and projections: which documents are meant, and what of them is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from bson import Regex

from .errors import bad_value, failed_to_parse
from .values import MISSING, bracket, find, order, spread

Document = dict[str, Any]
Test = Callable[[Document], bool]

_DEEPEST = 100  # how many conditions may stand in one another
_POSIX_CLASS = re.compile(r"\[:\^?[a-z]+:\]")  # in MongoDB's regular expressions; Python takes it for something else


def compile_filter(conditions: Any, depth: int = 0) -> Test:
    """Return the function that tells whether a document fulfils conditions."""
    if not isinstance(conditions, Mapping):
        raise bad_value("a filter must be a document")
    if depth > _DEEPEST:
        raise bad_value("the filter is nested too deeply")
    tests = [_clause(name, wanted, depth) for name, wanted in conditions.items()]
    if len(tests) == 1:
        return tests[0]
    return lambda document: all(test(document) for test in tests)


def _clause(name: str, wanted: Any, depth: int) -> Test:
    if name in ("$and", "$or", "$nor"):
        if not isinstance(wanted, list) or not wanted:
            raise bad_value(f"{name} must be a nonempty array")
        tests = [compile_filter(inner, depth + 1) for inner in wanted]
        if name == "$and":
            return lambda document: all(test(document) for test in tests)
        if name == "$or":
            return lambda document: any(test(document) for test in tests)
        return lambda document: not any(test(document) for test in tests)
    if name == "$comment":
        return lambda document: True
    if name.startswith("$"):
        raise bad_value(f"unknown top level operator: {name}")
    return _field(name, wanted, depth)


def operators(wanted: Any) -> bool:
    """Tell whether a condition consists of operators, as in {"$gt": 3}."""
    return isinstance(wanted, Mapping) and bool(wanted) and next(iter(wanted)).startswith("$")


def _field(path: str, wanted: Any, depth: int) -> Test:
    if depth > _DEEPEST:
        raise bad_value("the filter is nested too deeply")
    if _is_regex(wanted):
        return _regex(path, wanted)
    if not operators(wanted):
        return _equal(path, wanted)
    tests = []
    for name, operand in wanted.items():
        if name == "$regex":
            tests.append(_regex(path, operand, wanted.get("$options", "")))
        elif name == "$not":
            if not (_is_regex(operand) or operators(operand)):
                raise bad_value("$not needs a regex or a document with operators")
            tests.append(_negated(_field(path, operand, depth + 1)))
        elif name != "$options" or "$regex" not in wanted:
            if name not in _OPERATORS:
                raise bad_value(f"unknown operator: {name}")
            tests.append(_OPERATORS[name](path, operand))
    return lambda document: all(test(document) for test in tests)


def _negated(test: Test) -> Test:
    return lambda document: not test(document)


def _equal(path: str, wanted: Any) -> Test:
    key = order(wanted)
    return lambda document: any(order(value) == key for value in spread(document, path))


def _is_regex(value: Any) -> bool:
    return isinstance(value, (Regex, re.Pattern))


def _unequal(path: str, wanted: Any) -> Test:
    if _is_regex(wanted):
        raise bad_value("Can't have regex as arg to $ne.")
    return _negated(_equal(path, wanted))


def _within(path: str, wanted: Any) -> Test:
    if not isinstance(wanted, list):
        raise bad_value("$in and $nin need an array")
    if any(operators(value) for value in wanted):
        raise bad_value("cannot nest $ under $in")
    patterns = [_regex(path, value) for value in wanted if _is_regex(value)]
    keys = {order(value) for value in wanted if not _is_regex(value)}

    def test(document: Document) -> bool:
        found = any(order(value) in keys for value in spread(document, path))
        return found or any(matches(document) for matches in patterns)

    return test


def _compare(holds: Callable[[bytes, bytes], bool]) -> Callable[[str, Any], Test]:
    def make(path: str, wanted: Any) -> Test:
        if _is_regex(wanted):
            raise bad_value(f"Can't have RegEx as arg to predicate over field '{path}'.")
        key = order(wanted)
        if wanted != wanted:  # nothing is more or less than NaN; it is only equal to itself
            return lambda document: holds(key, key) and any(order(value) == key for value in spread(document, path))

        def test(document: Document) -> bool:
            for value in spread(document, path):
                if value is MISSING or value != value:
                    continue
                found = order(value)
                if bracket(found) == bracket(key) and holds(found, key):
                    return True
            return False

        return test

    return make


def _exists(path: str, wanted: Any) -> Test:
    return lambda document: any(value is not MISSING for value in find(document, path)) == bool(wanted)


def _size(path: str, wanted: Any) -> Test:
    return lambda document: any(isinstance(value, list) and len(value) == wanted for value in find(document, path))


def _regex(path: str, pattern: Any, options: Any = "") -> Test:
    if isinstance(pattern, re.Pattern):
        pattern = Regex.from_native(pattern)
    elif isinstance(pattern, str) and isinstance(options, str):
        pattern = Regex(pattern, options)
    elif not isinstance(pattern, Regex):
        raise bad_value("$regex has to be a string")
    try:
        if found := _POSIX_CLASS.search(pattern.pattern):
            raise re.error(f"{found.group()} is unknown")
        compiled = pattern.try_compile()
    except re.error as error:
        raise bad_value(f"the regular expression {pattern.pattern!r} is not supported: {error}") from None
    key = order(pattern)

    def matches(value: Any) -> bool:
        if isinstance(value, str):
            return compiled.search(value) is not None
        return _is_regex(value) and order(value) == key

    return lambda document: any(matches(value) for value in spread(document, path))


def _options(path: str, wanted: Any) -> Test:
    raise bad_value("$options needs a $regex")


_OPERATORS: dict[str, Callable[[str, Any], Test]] = {
    "$options": _options,
    "$eq": _equal,
    "$ne": _unequal,
    "$in": _within,
    "$nin": lambda path, wanted: _negated(_within(path, wanted)),
    "$gt": _compare(lambda found, key: found > key),
    "$gte": _compare(lambda found, key: found >= key),
    "$lt": _compare(lambda found, key: found < key),
    "$lte": _compare(lambda found, key: found <= key),
    "$exists": _exists,
    "$size": _size,
}


def equalities(conditions: Mapping[str, Any]) -> dict[str, list[bytes]]:
    """Return for the fields that can have few values only the keys of these: what an index can be asked for."""
    found: dict[str, list[bytes]] = {}
    for name, wanted in conditions.items():
        if name == "$and":
            for inner in wanted:
                found = {**equalities(inner), **found}
        elif name.startswith("$") or _is_regex(wanted):
            continue
        elif not operators(wanted):
            found[name] = [order(wanted)]
        elif "$eq" in wanted:
            found[name] = [order(wanted["$eq"])]
        elif "$in" in wanted and not any(map(_is_regex, wanted["$in"])):
            found[name] = sorted({order(value) for value in wanted["$in"]})
    return found


# --- projections ---------------------------------------------------------------------------------
def compile_projection(wanted: Any) -> Callable[[Document], Document] | None:
    """Return the function that leaves of a document what is wanted; None if all of it is."""
    if not wanted:
        return None
    if not isinstance(wanted, Mapping):
        raise failed_to_parse("a projection must be a document")
    for name, how in wanted.items():
        if not isinstance(how, (bool, int, float)) or "$" in name:
            raise bad_value(f"projections other than 0 and 1 are not supported: {name}")
    others = [bool(how) for name, how in wanted.items() if name != "_id"]
    if len(set(others)) > 1:
        raise failed_to_parse("a projection cannot both include and exclude fields")
    include = others[0] if others else bool(wanted["_id"])
    paths = [name.split(".") for name in wanted if name != "_id"]
    keep_id = bool(wanted.get("_id", True))
    if not include:
        dropped = paths if keep_id else [*paths, ["_id"]]
        return lambda document: _without(document, dropped)
    kept = [["_id"], *paths] if keep_id else paths
    return lambda document: _only(document, kept)


def _by_head(paths: list[list[str]]) -> dict[str, list[list[str]]]:
    heads: dict[str, list[list[str]]] = {}
    for path in paths:
        heads.setdefault(path[0], []).append(path[1:])
    return heads


def _only(value: Any, paths: list[list[str]]) -> Any:
    heads = _by_head(paths)
    result: Document = {}
    for name, inner in value.items():
        if name not in heads:
            continue
        if [] in heads[name]:
            result[name] = inner
        elif isinstance(inner, dict):
            result[name] = _only(inner, heads[name])
        elif isinstance(inner, list):
            result[name] = [_only(element, heads[name]) for element in inner if isinstance(element, dict)]
    return result


def _without(value: Any, paths: list[list[str]]) -> Any:
    heads = _by_head(paths)
    result: Document = {}
    for name, inner in value.items():
        if name not in heads:
            result[name] = inner
        elif [] in heads[name]:
            continue
        elif isinstance(inner, dict):
            result[name] = _without(inner, heads[name])
        elif isinstance(inner, list):
            result[name] = [_without(e, heads[name]) if isinstance(e, dict) else e for e in inner]
        else:
            result[name] = inner
    return result


# --- sorting -------------------------------------------------------------------------------------
def sort_keys(wanted: Any) -> list[tuple[str, bool]]:
    """Return fields and whether they sort downwards, the first one being the most important."""
    if not wanted:
        return []
    if not isinstance(wanted, Mapping):
        raise bad_value("a sort must be a document")
    for name, how in wanted.items():
        if how not in (1, -1):
            raise bad_value(f"sorting by {name} must be 1 or -1")
    return [(name, how == -1) for name, how in wanted.items()]


def sort_value(document: Document, path: str, downwards: bool) -> bytes:
    """Return what a document is sorted by: of several values the one that comes first."""
    keys: list[bytes] = []
    for value in find(document, path):
        keys += map(order, value) if isinstance(value, list) and value else [order(value)]
    if not keys:
        return order(None)
    return max(keys) if downwards else min(keys)
