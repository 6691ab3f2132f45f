"""Commands about the server, databases, collections and indexes."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import codec
from .errors import CommandError, bad_value
from .query import Document, compile_filter
from .read_commands import namespace

if TYPE_CHECKING:
    from .dispatch import Dispatcher
    from .store import Collection

LARGEST_MESSAGE = 48_000_000
_VERSION = (7, 0, 0)  # the MongoDB whose commands these are; drivers decide by the wire version what they may ask for
_WIRE_VERSION = 21
_INDEX_OPTIONS = frozenset(["key", "name", "unique", "sparse", "background", "v", "ns"])


def greeting() -> Document:
    """Return what drivers want to know first."""
    return {
        "helloOk": True,
        "ismaster": True,
        "isWritablePrimary": True,
        "maxBsonObjectSize": codec.LARGEST,
        "maxMessageSizeBytes": LARGEST_MESSAGE,
        "maxWriteBatchSize": 100_000,
        "localTime": datetime.datetime.now(datetime.timezone.utc),
        "minWireVersion": 0,
        "maxWireVersion": _WIRE_VERSION,
        "readOnly": False,
    }


def _nothing(engine: Dispatcher, command: Document) -> Document:
    return {}


def _build_info(engine: Dispatcher, command: Document) -> Document:
    return {
        "version": ".".join(map(str, _VERSION)),
        "versionArray": [*_VERSION, 0],
        "modules": ["lazycluster"],
        "bits": 64,
        "maxBsonObjectSize": codec.LARGEST,
    }


def _list_databases(engine: Dispatcher, command: Document) -> Document:
    conditions = command.get("filter") or {}
    fulfils = compile_filter(conditions)
    for name in conditions:
        if name not in ("name", "empty"):
            raise bad_value(f"databases cannot be filtered by {name} here, only by name and empty")
    names = sorted({name.partition(".")[0] for name in engine.store.collections})
    found = [{"name": name, "empty": False} for name in names]
    shown = [{"name": one["name"]} if command.get("nameOnly") else one for one in found if fulfils(one)]
    return {"databases": shown, "totalSize": 0}


def _in_database(engine: Dispatcher, command: Document) -> list[tuple[str, Collection]]:
    prefix = f"{command.get('$db')}."
    spaces = sorted(engine.store.collections.items())
    return [(name[len(prefix) :], collection) for name, collection in spaces if name.startswith(prefix)]


def _all_at_once(documents: list[Any], space: str) -> Document:
    return {"cursor": {"firstBatch": documents, "id": 0, "ns": space}}


def _list_collections(engine: Dispatcher, command: Document) -> Document:
    fulfils = compile_filter(command.get("filter") or {})
    names = [name for name, _ in _in_database(engine, command)]
    listed = [{"name": name, "type": "collection", "options": {}, "info": {"readOnly": False}} for name in names]
    return _all_at_once([entry for entry in listed if fulfils(entry)], f"{command.get('$db')}.$cmd.listCollections")


def _create(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command)
    if space in engine.store.collections:
        raise CommandError(48, f"Collection already exists. NS: {space}")
    engine.store.collection(space)
    return {}


def _drop(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command)
    if not engine.store.drop(space):
        raise CommandError(26, "ns not found")
    return {"ns": space}


def _drop_database(engine: Dispatcher, command: Document) -> Document:
    for _, collection in _in_database(engine, command):
        engine.store.drop(collection.name)
    return {"dropped": command.get("$db")}


def _id_index() -> Document:
    return {"v": 2, "key": {"_id": 1}, "name": "_id_"}


def _create_indexes(engine: Dispatcher, command: Document) -> Document:
    specs = command.get("indexes")
    if not isinstance(specs, list) or not specs:
        raise bad_value("indexes must be a nonempty array")
    for spec in specs:
        _check_index(spec)
    collection = engine.store.collection(namespace(command))
    before = len(collection.indexes) + 1
    for spec in specs:
        _create_one(collection, spec)
    after = len(collection.indexes) + 1
    return {"numIndexesBefore": before, "numIndexesAfter": after, "createdCollectionAutomatically": False}


def _check_index(spec: Any) -> None:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("key"), Mapping) or not spec["key"]:
        raise bad_value("an index needs a key")
    if not isinstance(spec.get("name"), str):
        raise bad_value("an index needs a name")
    for name in spec:
        if name not in _INDEX_OPTIONS:
            raise CommandError(115, f"indexes with {name} are not supported")
    for name, how in spec["key"].items():
        if how not in (1, -1) or not name or "$" in name:
            raise CommandError(115, f"an index of {name}: {how!r} is not supported")


def _create_one(collection: Collection, spec: Document) -> None:
    if dict(spec["key"]) == {"_id": 1}:
        return
    wanted = {"v": 2, "key": dict(spec["key"]), "name": spec["name"]}
    wanted.update({name: True for name in ("unique", "sparse") if spec.get(name)})
    for index in collection.indexes:
        if index.spec == wanted and list(index.spec["key"]) == list(wanted["key"]):
            return
        if index.name == wanted["name"]:
            raise CommandError(85, f"there is an index {index.name} with other options already")
    collection.create_index(wanted)


def _list_indexes(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command)
    collection = engine.store.collections.get(space)
    if collection is None:
        raise CommandError(26, f"ns does not exist: {space}")
    return _all_at_once([_id_index(), *(index.spec for index in collection.indexes)], space)


def _drop_indexes(engine: Dispatcher, command: Document) -> Document:
    space = namespace(command, command.get("dropIndexes") or command.get("deleteIndexes"))
    collection = engine.store.collections.get(space)
    if collection is None:
        raise CommandError(26, f"ns not found: {space}")
    wanted, before = command.get("index"), len(collection.indexes) + 1
    chosen = [index for index in collection.indexes if wanted in ("*", index.name, index.spec["key"])]
    if not chosen and wanted != "*":
        raise CommandError(27, f"index not found: {wanted!r}")
    for index in chosen:
        collection.drop_index(index)
    return {"nIndexesWas": before}


def _known(names: str = "") -> frozenset[str]:
    return frozenset(names.split())


COMMANDS: dict[str, tuple[Callable[[Dispatcher, Document], Document], frozenset[str]]] = {
    "ping": (_nothing, _known()),
    "endsessions": (_nothing, _known()),
    "buildinfo": (_build_info, _known()),
    "listdatabases": (_list_databases, _known("nameOnly filter authorizedDatabases")),
    "listcollections": (_list_collections, _known("nameOnly filter cursor authorizedCollections")),
    "create": (_create, _known()),
    "drop": (_drop, _known()),
    "dropdatabase": (_drop_database, _known()),
    "createindexes": (_create_indexes, _known("indexes commitQuorum")),
    "listindexes": (_list_indexes, _known("cursor")),
    "dropindexes": (_drop_indexes, _known("index")),
    "deleteindexes": (_drop_indexes, _known("index")),
}
