"""Commands that read: find, getMore, count, distinct, aggregate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from . import codec
from .aggregation import run_pipeline
from .errors import CommandError, bad_value
from .query import Document, compile_filter, compile_projection, sort_keys
from .sorting import sorted_rows
from .values import MISSING, order, spread

if TYPE_CHECKING:
    from .dispatch import Dispatcher

_MOST_ROWS = 1 << 62


def namespace(command: Mapping[str, Any], name: Any = None) -> str:
    """Return the full name of the collection that a command is about.

    Raises:
        CommandError: If it names none.
    """
    collection = next(iter(command.values())) if name is None else name
    database = command.get("$db")
    if not isinstance(collection, str) or not collection or "\x00" in collection or collection.startswith("."):
        raise CommandError(73, f"Invalid collection name: {collection!r}")
    if not isinstance(database, str) or not database or set(database) & set('/\\. "$\x00'):
        raise CommandError(73, f"Invalid database name: {database!r}")
    return f"{database}.{collection}"


def whole(command: Mapping[str, Any], name: str, default: int = 0) -> int:
    """Return an argument that is an integer of at least 0.

    Raises:
        CommandError: If it is not.
    """
    value = command.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        raise bad_value(f"{name} must be an integer of at least 0, not {value!r}")
    return int(value)


def matching(engine: Dispatcher, space: str, conditions: Any) -> Iterator[tuple[int, Document]]:
    """Yield the documents that fulfil conditions, with their numbers."""
    conditions = {} if conditions is None else conditions
    fulfils = compile_filter(conditions)
    collection = engine.store.collections.get(space)
    if collection is not None:
        for row, body in collection.candidates(conditions):
            document = codec.decode(body)
            if fulfils(document):
                yield row, document


def _check_hint(engine: Dispatcher, space: str, hint: Any) -> None:
    """Refuse an index that is not there. Those that are make no difference to what is found."""
    collection = engine.store.collections.get(space)
    if hint is None or collection is None or hint in ("_id_", {"_id": 1}, {"$natural": 1}):
        return
    for index in collection.indexes:
        if hint == index.name or (hint == index.spec["key"] and list(hint) == list(index.spec["key"])):
            return
    raise bad_value(f"hint provided does not correspond to an existing index: {hint!r}")


def _rows(engine: Dispatcher, space: str, command: Document) -> list[int]:
    _check_hint(engine, space, command.get("hint"))
    skip, limit = whole(command, "skip"), whole(command, "limit")
    keys = sort_keys(command.get("sort"))
    found = matching(engine, space, command.get("filter"))
    if keys == [("$natural", True)]:
        return [row for row, _ in sorted(found, reverse=True)][skip : (skip + limit) or None]
    if not keys or keys == [("$natural", False)]:
        rows = (row for row, _ in found)
        return list(itertools.islice(rows, skip, skip + limit if limit else None))
    return sorted_rows(found, keys, skip, limit)


def _find(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command)
    project = compile_projection(command.get("projection"))
    batch = whole(command, "batchSize", -1)
    rows = _rows(engine, space, command)
    single = bool(command.get("singleBatch"))
    return engine.cursors.first(space, rows, project, None if batch < 0 else batch, single)


def _get_more(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command, command.get("collection"))
    return engine.cursors.more(int(command["getMore"]), space, whole(command, "batchSize"))


def _kill_cursors(engine: Dispatcher, command: Document) -> Document:
    numbers = command.get("cursors")
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        raise bad_value("cursors must be an array of numbers")
    killed = engine.cursors.kill(numbers)
    rest = [number for number in numbers if number not in killed]
    return {"cursorsKilled": killed, "cursorsNotFound": rest, "cursorsAlive": [], "cursorsUnknown": []}


def _number_of(engine: Dispatcher, space: str, conditions: Any, skip: int, limit: int) -> int:
    collection = engine.store.collections.get(space)
    if collection is not None and not skip and not limit:
        known = collection.count_of(_checked(conditions)) if conditions else collection.count()
        if known is not None:
            return known
    found = matching(engine, space, conditions)
    return sum(1 for _ in itertools.islice(found, skip, skip + limit if limit else _MOST_ROWS))


def _checked(conditions: Any) -> Any:
    compile_filter(conditions)
    return conditions


def _count(engine: Dispatcher, command: Document) -> Document:
    _check_hint(engine, namespace(command), command.get("hint"))
    limit = command.get("limit")
    limits = {**command, "limit": abs(limit) if isinstance(limit, int) else limit}
    number = _number_of(
        engine, namespace(command), command.get("query"), whole(command, "skip"), whole(limits, "limit")
    )
    return {"n": number}


def _distinct(engine: Dispatcher, command: Document) -> Document:
    path = command.get("key")
    if not isinstance(path, str):
        raise bad_value("key must be a string")
    values: dict[bytes, Any] = {}
    for _, document in matching(engine, namespace(command), command.get("query")):
        found = list(spread(document, path))
        listed = any(isinstance(value, list) for value in found)
        for value in found:
            if value is not MISSING and not (listed and isinstance(value, list)):
                values.setdefault(order(value), value)
    return {"values": [values[key] for key in sorted(values)]}


def _aggregate(engine: Dispatcher, command: Document) -> Document:
    """Run a pipeline; what `count_documents` asks for without looking at the documents, where that is possible."""
    stages = command.get("pipeline")
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) and len(stage) == 1 for stage in stages):
        raise bad_value("pipeline must be an array of stages")
    space = namespace(command)
    _check_hint(engine, space, command.get("hint"))
    found = _counted(engine, space, stages)
    if found is None:
        first = stages[0].get("$match", {}) if stages else {}
        found = run_pipeline(stages, (document for _, document in matching(engine, space, first)))
    return {"cursor": {"firstBatch": found, "id": 0, "ns": space}}


def _counted(engine: Dispatcher, space: str, stages: list[Any]) -> list[Document] | None:
    """Return the result of stages that only count; None if they do more."""
    names = [next(iter(stage)) for stage in stages]
    given: Document = {name: next(iter(stage.values())) for name, stage in zip(names, stages, strict=True)}
    answer = _counter(given.get("$group"), given.get("$count"))
    if answer is None or names != [name for name in _STAGES if name in given]:
        return None
    limits = {"skip": given.get("$skip"), "limit": given.get("$limit")}
    number = _number_of(engine, space, given.get("$match"), whole(limits, "skip"), whole(limits, "limit"))
    return [answer(number)] if number else []


_STAGES = ("$match", "$skip", "$limit", "$group", "$count")


def _counter(group: Any, count: Any) -> Callable[[int], Document] | None:
    if isinstance(count, str) and count and not {"$", "."} & set(count) and group is None:
        return lambda number: {count: number}
    if count is None and isinstance(group, Mapping) and len(group) == 2 and "_id" in group:
        constant = group["_id"]
        name = next(name for name in group if name != "_id")
        if group[name] == {"$sum": 1} and not isinstance(constant, (str, Mapping)):
            return lambda number: {"_id": constant, name: number}
    return None


def _known(names: str) -> frozenset[str]:
    return frozenset(names.split())


COMMANDS: dict[str, tuple[Callable[[Dispatcher, Document], Document], frozenset[str]]] = {
    "find": (
        _find,
        _known(
            "filter sort projection skip limit batchSize singleBatch noCursorTimeout allowPartialResults "
            "allowDiskUse hint"
        ),
    ),
    "getmore": (_get_more, _known("collection batchSize")),
    "killcursors": (_kill_cursors, _known("cursors")),
    "count": (_count, _known("query skip limit hint")),
    "distinct": (_distinct, _known("key query")),
    "aggregate": (_aggregate, _known("pipeline cursor allowDiskUse hint")),
}
