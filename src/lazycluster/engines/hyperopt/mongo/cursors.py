"""Results that are fetched in batches."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import codec
from .errors import CommandError
from .store import DocumentStore

Document = dict[str, Any]

_FIRST = 101  # documents, as MongoDB has it
_BATCH = 4 * 1024 * 1024  # bytes
_IDLE = 600.0  # seconds
_MOST = 500


@dataclass
class Cursor:
    """The rest of a result.

    Attributes:
        namespace: The collection.
        rows: The numbers of the documents, the next one last.
        project: What is wanted of each; None: all.
        used: When it was last used.
    """

    namespace: str
    rows: list[int]
    project: Callable[[Document], Document] | None
    used: float = field(default_factory=time.monotonic)


class Cursors:
    """All results that are being fetched. A forgotten one ends after a while.

    Args:
        store: The documents.
    """

    def __init__(self, store: DocumentStore) -> None:
        self._store = store
        self._cursors: dict[int, Cursor] = {}

    def first(
        self,
        namespace: str,
        rows: list[int],
        project: Callable[[Document], Document] | None,
        batch: int | None,
        single: bool,
    ) -> Document:
        """Return the answer with the first documents."""
        cursor = Cursor(namespace, rows[::-1], project)
        documents = self._take(cursor, _FIRST if batch is None else batch)
        number = 0
        if cursor.rows and not single:
            number = secrets.randbits(62) + 1
            self._forget_idle()
            self._cursors[number] = cursor
        return {"cursor": {"firstBatch": documents, "id": _int64(number), "ns": namespace}}

    def more(self, number: int, namespace: str, batch: int | None) -> Document:
        """Return the answer with further documents.

        Raises:
            CommandError: If there is no such result (any more).
        """
        cursor = self._cursors.get(number)
        if cursor is None or cursor.namespace != namespace:
            raise CommandError(43, f"cursor id {number} not found")
        cursor.used = time.monotonic()
        documents = self._take(cursor, batch or 0)
        if not cursor.rows:
            del self._cursors[number]
            number = 0
        return {"cursor": {"nextBatch": documents, "id": _int64(number), "ns": namespace}}

    def kill(self, numbers: list[int]) -> list[int]:
        """Drop results; returns those that were there."""
        return [number for number in numbers if self._cursors.pop(number, None) is not None]

    def _take(self, cursor: Cursor, count: int) -> list[Any]:
        """Return as many documents as fit into an answer; 0: no other limit."""
        documents: list[Any] = []
        size = 0
        collection = self._store.collections.get(cursor.namespace)
        while cursor.rows and collection is not None and (not count or len(documents) < count):
            body = collection.body(cursor.rows[-1])
            if body is not None:
                if documents and size + len(body) > _BATCH:
                    return documents
                size += len(body)
                documents.append(codec.raw(body) if cursor.project is None else cursor.project(codec.decode(body)))
            cursor.rows.pop()
        if collection is None:
            cursor.rows.clear()
        return documents

    def _forget_idle(self) -> None:
        now = time.monotonic()
        for number, cursor in list(self._cursors.items()):
            if now - cursor.used > _IDLE or len(self._cursors) >= _MOST:
                del self._cursors[number]


def _int64(number: int) -> Any:
    from bson import Int64

    return Int64(number)
