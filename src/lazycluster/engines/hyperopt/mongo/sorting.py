"""Documents in an order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

from .query import Document, sort_value

__all__ = ["key_of", "sorted_rows"]


class _Downwards:
    """A key that sorts the other way round."""

    __slots__ = ("key",)

    def __init__(self, key: bytes) -> None:
        self.key = key

    def __lt__(self, other: _Downwards) -> bool:
        return other.key < self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Downwards) and other.key == self.key

    __hash__ = None  # type: ignore[assignment]


def key_of(keys: list[tuple[str, bool]]) -> Callable[[Document], list[Any]]:
    """Return what tells the key of a document.

    Args:
        keys: Fields and whether they sort downwards, see `sort_keys`.
    """

    def key(document: Document) -> list[Any]:
        parts = [(sort_value(document, name, down), down) for name, down in keys]
        return [_Downwards(part) if down else part for part, down in parts]

    return key


def sorted_rows(
    found: Iterator[tuple[int, Document]], keys: list[tuple[str, bool]], skip: int, limit: int
) -> list[int]:
    """Return the numbers of documents in an order."""
    key = key_of(keys)
    keyed = ((key(document), row) for row, document in found)
    ordered = heapq.nsmallest(skip + limit, keyed) if limit else sorted(keyed)
    return [row for _, row in ordered][skip:]
