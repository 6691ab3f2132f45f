"""Documents and indexes in SQLite.

An index is a table of keys, which sort as MongoDB sorts the values, so that SQLite needs to know nothing about them.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import codec
from .errors import CommandError
from .query import equalities, operators
from .values import find, order

FILE = "lazycluster-mongo.sqlite"
_LOCK = "lazycluster-mongo.lock"
_ENOUGH = 500  # an index that leads to more documents than that need not be counted further
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS collections(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS indexes(id INTEGER PRIMARY KEY, collection INTEGER NOT NULL, spec BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS documents(
    id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL, key BLOB NOT NULL, body BLOB NOT NULL,
    UNIQUE(collection, key));
CREATE INDEX IF NOT EXISTS documents_of ON documents(collection);
CREATE TABLE IF NOT EXISTS entries(
    indexed INTEGER NOT NULL, key BLOB NOT NULL, document INTEGER NOT NULL,
    PRIMARY KEY(indexed, key, document)) WITHOUT ROWID;
"""

Document = dict[str, Any]
Row = tuple[int, bytes]


class StoreError(Exception):
    """The directory cannot be used."""


@dataclass(frozen=True)
class Index:
    """An index of a collection.

    Attributes:
        id: Its number.
        spec: What it was made from: ``key``, ``name``, and what else was asked for.
    """

    id: int
    spec: Document

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.spec["name"])

    @property
    def fields(self) -> list[str]:
        """Its fields."""
        return list(self.spec["key"])

    @property
    def unique(self) -> bool:
        """True if no two documents may have the same values."""
        return bool(self.spec.get("unique"))

    def same(self, old: Document, new: Document) -> bool:
        """Tell whether two documents surely have the same keys, without making these."""
        return all(_same(list(find(old, name)), list(find(new, name))) for name in self.fields)

    def keys(self, document: Document) -> set[bytes]:
        """Return the keys of a document: several if it has lists."""
        if self.spec.get("sparse") and not any(name in document for name in self.fields):
            return set()
        parts = [_keys_of(document, name) for name in self.fields]
        if sum(len(part) > 1 for part in parts) > 1:
            raise CommandError(171, f"cannot index parallel arrays: {', '.join(self.fields)}")
        return {b"".join(key) for key in itertools.product(*parts)}


def _same(some: list[Any], others: list[Any]) -> bool:
    # Python takes True for 1, also within lists and documents; MongoDB does not.
    pairs = zip(some, others, strict=False)
    plain = all(type(one) is type(other) and not isinstance(one, (dict, list)) for one, other in pairs)
    return plain and some == others


def _says_more(one: tuple[int, Index, list[bytes]], other: tuple[int, Index, list[bytes]]) -> bool:
    return set(one[1].fields[: one[0]]) > set(other[1].fields[: other[0]])


def _keys_of(document: Document, path: str) -> set[bytes]:
    if "." not in path and not isinstance(value := document.get(path), list):
        return {order(value)}  # the usual case, in which many a search spends its time
    keys: set[bytes] = set()
    for value in find(document, path):
        keys.add(order(value))
        if isinstance(value, list):
            keys.update(map(order, value))
    return keys or {order(None)}


class Collection:
    """The documents of one collection."""

    def __init__(self, store: DocumentStore, number: int, name: str) -> None:
        self._sql = store.sql
        self.id = number
        self.name = name
        rows = self._sql.execute("SELECT id, spec FROM indexes WHERE collection = ? ORDER BY id", (number,))
        self.indexes = [Index(row[0], codec.decode(row[1])) for row in rows]

    # --- reading -------------------------------------------------------------------------------
    def candidates(self, conditions: Mapping[str, Any]) -> Iterator[Row]:
        """Yield documents, among which are all that fulfil the conditions, each once, oldest first where possible."""
        exact = equalities(conditions)
        if "_id" in exact:
            yield from self._by_id(exact["_id"])
            return
        best = self._best(exact)
        if best is None:
            yield from self._sql.execute("SELECT id, body FROM documents WHERE collection = ? ORDER BY id", (self.id,))
            return
        index, prefixes = best
        seen: set[int] = set()
        for prefix in prefixes:
            rows = self._sql.execute(
                "SELECT d.id, d.body FROM entries e JOIN documents d ON d.id = e.document "
                "WHERE e.indexed = ? AND e.key >= ? AND e.key < ? ORDER BY e.key, e.document",
                (index.id, prefix, prefix + b"\xff"),
            )
            for row in rows:
                if row[0] not in seen:
                    seen.add(row[0])
                    yield row

    def _by_id(self, keys: Sequence[bytes]) -> Iterator[Row]:
        for key in keys:
            yield from self._sql.execute(
                "SELECT id, body FROM documents WHERE collection = ? AND key = ?", (self.id, key)
            )

    def _best(self, exact: Mapping[str, list[bytes]]) -> tuple[Index, list[bytes]] | None:
        """Return the index that leads to the fewest documents, and where to look in it."""
        usable: list[tuple[int, Index, list[bytes]]] = []
        for index in self.indexes:
            if index.spec.get("sparse"):
                continue
            prefixes, used = [b""], 0
            for name in index.fields:
                if name not in exact or not exact[name] or len(prefixes) * len(exact[name]) > _ENOUGH:
                    break
                prefixes, used = [prefix + key for prefix in prefixes for key in exact[name]], used + 1
            if used:
                usable.append((used, index, prefixes))
        # One that says all that another one says, and more, is better whatever is in them: that need not be counted.
        usable = [one for one in usable if not any(_says_more(other, one) for other in usable)]
        if len(usable) < 2:
            return usable[0][1:] if usable else None
        # Of two that lead to very many documents, the one that says more about them.
        _, index, prefixes = min(usable, key=lambda one: (sum(self._size(one[1], key) for key in one[2]), -one[0]))
        return index, prefixes

    def _size(self, index: Index, prefix: bytes) -> int:
        row = self._sql.execute(
            "SELECT count(*) FROM (SELECT 1 FROM entries WHERE indexed = ? AND key >= ? AND key < ? LIMIT ?)",
            (index.id, prefix, prefix + b"\xff", _ENOUGH),
        ).fetchone()
        return int(row[0])

    def count_of(self, conditions: Mapping[str, Any]) -> int | None:
        """Return how many documents fulfil conditions, if an index alone can tell."""
        exact = equalities(conditions)
        plain = all(
            name in exact and (not operators(wanted) or len(wanted) == 1) for name, wanted in conditions.items()
        )
        best = self._best(exact) if plain and "_id" not in exact else None
        if best is None or not set(exact) <= set(best[0].fields[: len(exact)]):
            return None
        index, prefixes = best
        # A document with a list has several entries, so it may be under several of the keys.
        spans = " UNION ".join(
            ["SELECT document FROM entries WHERE indexed = ? AND key >= ? AND key < ?"] * len(prefixes)
        )
        values = [value for prefix in prefixes for value in (index.id, prefix, prefix + b"\xff")]
        row = self._sql.execute(f"SELECT count(DISTINCT document) FROM ({spans})", values).fetchone()  # noqa: S608
        return int(row[0])

    def body(self, row: int) -> bytes | None:
        """Return a document by its number in here; None if it was deleted."""
        found = self._sql.execute("SELECT body FROM documents WHERE id = ?", (row,)).fetchone()
        return found[0] if found else None

    def count(self) -> int:
        """Return the number of documents."""
        row = self._sql.execute("SELECT count(*) FROM documents WHERE collection = ?", (self.id,)).fetchone()
        return int(row[0])

    # --- writing -------------------------------------------------------------------------------
    def insert(self, document: Document, body: bytes) -> int:
        """Add a document.

        Raises:
            CommandError: If an index does not allow it.
        """
        codec.check_size(body)
        keys = {index.id: index.keys(document) for index in self.indexes}
        self._check_unique(document, keys, None)
        key = order(document["_id"])
        try:
            cursor = self._sql.execute(
                "INSERT INTO documents(collection, key, body) VALUES(?, ?, ?)", (self.id, key, body)
            )
        except sqlite3.IntegrityError:
            raise self._duplicate("_id_", {"_id": 1}, {"_id": document["_id"]}) from None
        row = cursor.lastrowid
        assert row is not None
        self._sql.executemany(
            "INSERT INTO entries(indexed, key, document) VALUES(?, ?, ?)",
            [(number, key, row) for number, some in keys.items() for key in some],
        )
        return row

    def replace(self, row: int, old: Document, new: Document, body: bytes) -> None:
        """Put a new document in the place of an old one.

        Raises:
            CommandError: If an index does not allow it.
        """
        codec.check_size(body)
        touched = [index for index in self.indexes if not index.same(old, new)]
        after = {index.id: index.keys(new) for index in touched}
        before = {index.id: index.keys(old) for index in touched}
        changed = {number: keys - before[number] for number, keys in after.items()}
        self._check_unique(new, changed, row)
        self._sql.execute("UPDATE documents SET body = ? WHERE id = ?", (body, row))
        for number, keys in after.items():
            gone = before[number] - keys
            if gone:
                self._drop_entries([(number, key, row) for key in gone])
            if changed[number]:
                self._sql.executemany(
                    "INSERT INTO entries(indexed, key, document) VALUES(?, ?, ?)",
                    [(number, key, row) for key in changed[number]],
                )

    def delete(self, row: int, document: Document) -> None:
        """Remove a document."""
        self._sql.execute("DELETE FROM documents WHERE id = ?", (row,))
        for index in self.indexes:
            self._drop_entries([(index.id, key, row) for key in index.keys(document)])

    def _drop_entries(self, entries: list[tuple[int, bytes, int]]) -> None:
        self._sql.executemany("DELETE FROM entries WHERE indexed = ? AND key = ? AND document = ?", entries)

    def _check_unique(self, document: Document, keys: Mapping[int, set[bytes]], row: int | None) -> None:
        for index in self.indexes:
            if not index.unique:
                continue
            for key in keys.get(index.id, ()):
                taken = self._sql.execute(
                    "SELECT document FROM entries WHERE indexed = ? AND key = ? AND document IS NOT ? LIMIT 1",
                    (index.id, key, row),
                ).fetchone()
                if taken:
                    values = {name: next(find(document, name)) for name in index.fields}
                    raise self._duplicate(index.name, index.spec["key"], values)

    def _duplicate(self, index: str, pattern: Document, values: Document) -> CommandError:
        shown = {name: value for name, value in values.items() if isinstance(value, (str, int, float, bytes))}
        message = f"E11000 duplicate key error collection: {self.name} index: {index} dup key: {shown or values!r}"
        fields = {"keyPattern": pattern, "keyValue": codec.decode(codec.encode(_present(values)))}
        return CommandError(11000, message, **fields)

    # --- indexes -------------------------------------------------------------------------------
    def create_index(self, spec: Document) -> None:
        """Make an index of all documents.

        Raises:
            CommandError: If it is to be unique, and is not.
        """
        cursor = self._sql.execute("INSERT INTO indexes(collection, spec) VALUES(?, ?)", (self.id, codec.encode(spec)))
        assert cursor.lastrowid is not None
        index = Index(cursor.lastrowid, spec)
        self.indexes.append(index)
        try:
            for row, body in self._sql.execute(
                "SELECT id, body FROM documents WHERE collection = ?", (self.id,)
            ).fetchall():
                document = codec.decode(body)
                keys = index.keys(document)
                self._check_unique(document, {index.id: keys}, row)
                self._sql.executemany(
                    "INSERT INTO entries(indexed, key, document) VALUES(?, ?, ?)",
                    [(index.id, key, row) for key in keys],
                )
        except CommandError:
            self.drop_index(index)
            raise

    def drop_index(self, index: Index) -> None:
        """Remove an index."""
        self._sql.execute("DELETE FROM entries WHERE indexed = ?", (index.id,))
        self._sql.execute("DELETE FROM indexes WHERE id = ?", (index.id,))
        self.indexes.remove(index)


def _present(values: Document) -> Document:
    return {name: value for name, value in values.items() if order(value) != order(None)}


class DocumentStore:
    """All collections of a directory, which no other server may use meanwhile.

    Args:
        directory: The directory; it is made if it is missing.

    Raises:
        StoreError: If it cannot be used.
    """

    def __init__(self, directory: str) -> None:
        self.path = Path(directory)
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.close(os.open(self.path / FILE, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StoreError(f"{directory} cannot be used: {error.strerror}: {error.filename}") from None
        self._take_lock()
        self.sql = sqlite3.connect(self.path / FILE, isolation_level=None)
        try:
            self._open()
        except sqlite3.Error as error:
            self.close()
            raise StoreError(f"{self.path / FILE} cannot be used: {error}") from None
        rows = self.sql.execute("SELECT id, name FROM collections")
        self.collections = {name: Collection(self, number, name) for number, name in rows.fetchall()}

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            os.close(self._lock)
            raise StoreError(
                f"{self.path} is locked by another server that uses it (process {owner})\n  Next step: end that "
                "cluster, or pass another dbpath"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _open(self) -> None:
        self.sql.execute("PRAGMA journal_mode = WAL")
        self.sql.execute("PRAGMA synchronous = FULL")
        self.sql.execute("PRAGMA cache_size = -8000")
        self.sql.execute("PRAGMA wal_autocheckpoint = 4000")  # what is changed again meanwhile is copied once
        version = self.sql.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}; this program knows {_VERSION}")
        self.sql.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")

    def collection(self, name: str) -> Collection:
        """Return a collection, which is made if it is missing."""
        if name not in self.collections:
            cursor = self.sql.execute("INSERT INTO collections(name) VALUES(?)", (name,))
            assert cursor.lastrowid is not None
            self.collections[name] = Collection(self, cursor.lastrowid, name)
        return self.collections[name]

    def drop(self, name: str) -> bool:
        """Remove a collection; tells whether it was there."""
        collection = self.collections.pop(name, None)
        if collection is None:
            return False
        for index in list(collection.indexes):
            collection.drop_index(index)
        self.sql.execute("DELETE FROM documents WHERE collection = ?", (collection.id,))
        self.sql.execute("DELETE FROM collections WHERE id = ?", (collection.id,))
        return True

    def forget(self) -> None:
        """Read again what is known of collections: a transaction was undone."""
        rows = self.sql.execute("SELECT id, name FROM collections").fetchall()
        self.collections = {name: Collection(self, number, name) for number, name in rows}

    def close(self) -> None:
        """Close the files and release the lock."""
        self.sql.close()
        os.close(self._lock)
