"""Commands that write: insert, update, delete, findAndModify."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bson import ObjectId, Regex

from . import codec
from .errors import CommandError, bad_value, failed_to_parse
from .query import Document, compile_projection, operators, sort_keys
from .read_commands import matching, namespace
from .sorting import sorted_rows
from .updates import Change, compile_update, upserted

if TYPE_CHECKING:
    from .dispatch import Dispatcher
    from .store import Collection


def _statements(command: Document, name: str, known: str) -> list[Document]:
    statements = command.get(name)
    if not isinstance(statements, list) or not statements:
        raise bad_value(f"{name} must be a nonempty array")
    allowed = known.split()
    for statement in statements:
        unknown = [key for key in statement if key not in allowed]
        if unknown:
            raise CommandError(40415, f"BSON field '{name}.{unknown[0]}' is not supported by this server")
    return statements


def _each(command: Document, statements: list[Any], do: Callable[[int, Any], None]) -> Document:
    """Do something with each statement; one that fails ends an ordered command, and is told of in the answer."""
    errors = []
    for number, statement in enumerate(statements):
        try:
            do(number, statement)
        except CommandError as error:
            errors.append({"index": number, "code": error.code, "errmsg": error.message, **error.fields})
            if command.get("ordered", True):
                break
    return {"writeErrors": errors} if errors else {}


def _insert(engine: Dispatcher, command: Document) -> Document:
    documents = command.get("documents")
    if not isinstance(documents, list) or not documents:
        raise bad_value("documents must be a nonempty array")
    collection = engine.store.collection(namespace(command))
    inserted = 0

    def do(_: int, document: Any) -> None:
        nonlocal inserted
        _add(collection, document)
        inserted += 1

    errors = _each(command, documents, do)
    return {"n": inserted, **errors}


def _add(collection: Collection, document: Document) -> Document:
    if not isinstance(document, dict):
        raise bad_value("a document is needed")
    if "_id" not in document:
        document = {"_id": ObjectId(), **document}
    _check_id(document["_id"])
    collection.insert(document, codec.encode(document))
    return document


def _check_id(value: Any) -> None:
    if isinstance(value, (list, Regex, re.Pattern)):
        what = "array" if isinstance(value, list) else "regex"
        raise CommandError(53, f"The '_id' value cannot be of type {what}")
    if isinstance(value, Mapping):
        _check_names(value)


def _check_names(value: Any) -> None:
    """Refuse names in an _id that would be taken for operators when one looks for it."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for name in value if isinstance(value, Mapping) else ():
        if name.startswith("$"):
            raise CommandError(52, f"_id fields may not contain '$'-prefixed fields: {name} is not valid for storage.")
    for one in inner:
        _check_names(one)


def _change(engine: Dispatcher, space: str, row: int, old: Document, change: Change) -> tuple[Document, bool]:
    """Change a document; returns the new one, and whether it differs."""
    new = change(old, False)
    before, body = codec.encode(old), codec.encode(new)
    if body != before:
        engine.store.collection(space).replace(row, old, new, body)
    return new, body != before


def _upsert(engine: Dispatcher, space: str, conditions: Mapping[str, Any], change: Change) -> Document:
    return _add(engine.store.collection(space), change(upserted(conditions), True))


def _update(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command)
    total = {"n": 0, "nModified": 0}
    upserts: list[Document] = []

    def do(number: int, statement: Document) -> None:
        conditions = statement.get("q", {})
        change = compile_update(statement.get("u"))
        if statement.get("multi") and not operators(statement["u"]):
            raise failed_to_parse("multi update is not supported for replacement-style update")
        wanted = None if statement.get("multi") else 1
        found = list(itertools.islice(matching(engine, space, conditions), wanted))
        for row, document in found:
            _, differs = _change(engine, space, row, document, change)
            total["n"] += 1
            total["nModified"] += differs
        if not found and statement.get("upsert"):
            document = _upsert(engine, space, conditions, change)
            total["n"] += 1
            upserts.append({"index": number, "_id": document["_id"]})

    errors = _each(command, _statements(command, "updates", "q u multi upsert"), do)
    return {**total, **({"upserted": upserts} if upserts else {}), **errors}


def _delete(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command)
    deleted = 0

    def do(_: int, statement: Document) -> None:
        nonlocal deleted
        limit = statement.get("limit")
        if isinstance(limit, bool) or limit not in (0, 1):
            raise failed_to_parse(f"The limit field in delete objects must be 0 or 1. Got {limit!r}")
        wanted = 1 if limit else None
        found = list(itertools.islice(matching(engine, space, statement.get("q", {})), wanted))
        for row, document in found:
            engine.store.collection(space).delete(row, document)
            deleted += 1

    errors = _each(command, _statements(command, "deletes", "q limit"), do)
    return {"n": deleted, **errors}


def _first(engine: Dispatcher, space: str, command: Document) -> tuple[int, Document] | None:
    found: Iterator[tuple[int, Document]] = matching(engine, space, command.get("query"))
    keys = sort_keys(command.get("sort"))
    if keys:
        kept = list(found)
        rows = sorted_rows(iter(kept), keys, 0, 1)
        return (rows[0], dict(kept)[rows[0]]) if rows else None
    return next(found, None)


def _find_and_modify(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command)
    project = compile_projection(command.get("fields")) or (lambda document: document)
    if bool(command.get("remove")) == ("update" in command):
        raise bad_value("Either an update or remove=true must be specified")
    found = _first(engine, space, command)
    if command.get("remove"):
        if found is not None:
            engine.store.collection(space).delete(*found)
        return {"lastErrorObject": {"n": int(found is not None)}, "value": project(found[1]) if found else None}
    change = compile_update(command["update"])
    if found is not None:
        new, _ = _change(engine, space, *found, change)
        outcome = {"n": 1, "updatedExisting": True}
        return {"lastErrorObject": outcome, "value": project(new if command.get("new") else found[1])}
    if not command.get("upsert"):
        return {"lastErrorObject": {"n": 0, "updatedExisting": False}, "value": None}
    new = _upsert(engine, space, command.get("query") or {}, change)
    outcome = {"n": 1, "updatedExisting": False, "upserted": new["_id"]}
    return {"lastErrorObject": outcome, "value": project(new) if command.get("new") else None}


def _known(names: str) -> frozenset[str]:
    return frozenset(names.split())


COMMANDS: dict[str, tuple[Callable[[Dispatcher, Document], Document], frozenset[str]]] = {
    "insert": (_insert, _known("documents ordered bypassDocumentValidation")),
    "update": (_update, _known("updates ordered bypassDocumentValidation")),
    "delete": (_delete, _known("deletes ordered")),
    "findandmodify": (_find_and_modify, _known("query sort remove update new fields upsert bypassDocumentValidation")),
}
