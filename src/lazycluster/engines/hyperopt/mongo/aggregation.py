"""Aggregations: what is usually asked of the trials of a search, such as how many there are in each state.

There are the stages and expressions for that; all others are refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .errors import CommandError, bad_value, failed_to_parse
from .query import Document, compile_filter, compile_projection, sort_keys
from .sorting import key_of
from .values import MISSING, order

__all__ = ["run_pipeline"]

Documents = Iterable[Document]
Expression = Callable[[Document], Any]


def run_pipeline(stages: list[Any], documents: Documents) -> list[Document]:
    """Return what a pipeline makes of documents.

    Args:
        stages: The stages, each with one operator.
        documents: What goes in.

    Raises:
        CommandError: If a stage is not supported, or makes no sense.
    """
    compiled = [_compile_stage(stage) for stage in stages]
    for stage in compiled:
        documents = stage(documents)
    return list(documents)


def _compile_stage(stage: Any) -> Callable[[Documents], Documents]:
    if not isinstance(stage, Mapping) or len(stage) != 1:
        raise bad_value("each stage of a pipeline must have one operator")
    ((name, given),) = stage.items()
    compile_one = _STAGES.get(name)
    if compile_one is None:
        raise CommandError(40324, f"the stage {name} is not supported by this server; it has: {', '.join(_STAGES)}")
    return compile_one(given)


# --- stages --------------------------------------------------------------------------------------
def _match(given: Any) -> Callable[[Documents], Documents]:
    fulfils = compile_filter(given)
    return lambda documents: filter(fulfils, documents)


def _skip(given: Any) -> Callable[[Documents], Documents]:
    count = _whole("$skip", given, 0)
    return lambda documents: itertools.islice(documents, count, None)


def _limit(given: Any) -> Callable[[Documents], Documents]:
    count = _whole("$limit", given, 1)
    return lambda documents: itertools.islice(documents, count)


def _whole(name: str, given: Any, least: int) -> int:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given != int(given) or given < least:
        raise bad_value(f"{name} must be an integer of at least {least}, not {given!r}")
    return int(given)


def _sort(given: Any) -> Callable[[Documents], Documents]:
    keys = sort_keys(given)
    if not keys:
        raise failed_to_parse("$sort must have at least one field")
    key = key_of(keys)
    return lambda documents: sorted(documents, key=key)


def _project(given: Any) -> Callable[[Documents], Documents]:
    project = compile_projection(given)
    if project is None:
        raise failed_to_parse("$project must have at least one field")
    return lambda documents: map(project, documents)


def _count(given: Any) -> Callable[[Documents], Documents]:
    if not isinstance(given, str) or not given or "$" in given or "." in given:
        raise failed_to_parse("$count must be the name of a field")

    def count(documents: Documents) -> Documents:
        number = sum(1 for _ in documents)
        return [{given: number}] if number else []

    return count


def _group(given: Any) -> Callable[[Documents], Documents]:
    if not isinstance(given, Mapping) or "_id" not in given:
        raise failed_to_parse("a group specification must be a document with an _id")
    key = _expression(given["_id"])
    fields = {name: _accumulation(name, how) for name, how in given.items() if name != "_id"}

    def group(documents: Documents) -> Iterator[Document]:
        groups: dict[bytes, tuple[Any, list[Document]]] = {}
        for document in documents:
            value = _present(key(document))
            groups.setdefault(order(value), (value, []))[1].append(document)
        for value, members in groups.values():
            yield {"_id": value, **{name: found(members) for name, found in fields.items()}}

    return group


_STAGES: Mapping[str, Callable[[Any], Callable[[Documents], Documents]]] = {
    "$match": _match,
    "$group": _group,
    "$sort": _sort,
    "$project": _project,
    "$skip": _skip,
    "$limit": _limit,
    "$count": _count,
}


# --- accumulators --------------------------------------------------------------------------------
def _accumulation(name: str, how: Any) -> Callable[[list[Document]], Any]:
    if "." in name or name.startswith("$") or not isinstance(how, Mapping) or len(how) != 1:
        raise CommandError(40234, f"the field {name!r} of $group must be a name with one accumulator")
    ((accumulator, argument),) = how.items()
    gather = _ACCUMULATORS.get(accumulator)
    if gather is None:
        known = ", ".join(_ACCUMULATORS)
        raise CommandError(15952, f"the accumulator {accumulator} is not supported by this server; it has: {known}")
    if accumulator == "$count":
        if argument != {}:
            raise failed_to_parse("$count takes no arguments in $group")
        return len
    value = _expression(argument)
    return lambda members: gather([value(member) for member in members])


def _numbers(values: list[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]


def _average(values: list[Any]) -> float | None:
    numbers = _numbers(values)
    return sum(numbers) / len(numbers) if numbers else None


def _there(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not MISSING and value is not None]


_ACCUMULATORS: Mapping[str, Callable[[list[Any]], Any]] = {
    "$sum": lambda values: sum(_numbers(values)),
    "$avg": _average,
    "$min": lambda values: min(_there(values), key=order, default=None),
    "$max": lambda values: max(_there(values), key=order, default=None),
    "$count": len,
    "$first": lambda values: _present(values[0]),
    "$last": lambda values: _present(values[-1]),
    "$push": lambda values: [value for value in values if value is not MISSING],
    "$addToSet": lambda values: list({order(value): value for value in values if value is not MISSING}.values()),
}


# --- expressions ---------------------------------------------------------------------------------
def _expression(given: Any) -> Expression:
    """Return what an expression is of a document: a field (``"$result.loss"``), a constant, or a document of such."""
    if isinstance(given, str) and given.startswith("$"):
        name = given.removeprefix("$$ROOT").removeprefix("$$CURRENT").lstrip("." if given.startswith("$$") else "$")
        if name.startswith("$") or (not name and not given.startswith("$$")):
            raise CommandError(17276, f"the variable in {given!r} is not supported by this server")
        parts = name.split(".") if name else []
        return lambda document: _at(document, parts)
    if isinstance(given, Mapping):
        operators = [name for name in given if name.startswith("$")]
        if operators == ["$literal"] and len(given) == 1:
            return lambda _: given["$literal"]
        if operators:
            raise CommandError(168, f"the operator {operators[0]} is not supported by this server in expressions")
        inner = {name: _expression(value) for name, value in given.items()}
        return lambda document: {
            name: value for name, each in inner.items() if (value := each(document)) is not MISSING
        }
    return lambda _: given


def _at(value: Any, parts: list[str]) -> Any:
    """Return the value under a path as expressions see it: of a list, that of each of its documents."""
    for index, part in enumerate(parts):
        if isinstance(value, list):
            found = (_at(one, parts[index:]) for one in value)
            return [one for one in found if one is not MISSING]
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    return value


def _present(value: Any) -> Any:
    return None if value is MISSING else value
