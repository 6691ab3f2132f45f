"""Chunks: calls that go to a worker together, and who waits for what comes out of them."""

from __future__ import annotations

from typing import Any, Protocol

from .serialization import PackedCalls

__all__ = ["Chunk", "ChunkResult", "Failure", "ResultSink"]


class ChunkResult:
    """What a worker answered to a chunk; read where it is wanted, not on the loop's thread.

    Attributes:
        kind: ``RETURNED``, ``MIXED`` or ``BROKEN``, see `lazycluster.agent.pool_protocol`.
        parts: The bytes as they came.
        size: How many they are.
        host: The host that it came from.
    """

    __slots__ = ("host", "kind", "parts", "size")

    def __init__(self, kind: int, parts: list[bytes], size: int, host: str) -> None:
        self.kind = kind
        self.parts = parts
        self.size = size
        self.host = host


class Failure:
    """Why no worker answered to a chunk."""

    __slots__ = ("error", "size")

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.size = 0


class ResultSink(Protocol):
    """Who waits for chunks. The methods are called on the loop's thread, and return at once."""

    def call_name(self, chunk: Chunk, call: int) -> str:
        """Return what to call one of the calls of a chunk in messages."""

    def is_wanted(self, chunk: Chunk) -> bool:
        """Tell whether a chunk that waits is still wanted."""

    def mark_started(self, chunk: Chunk) -> bool:
        """Learn that a chunk is given to a host; returns whether it is still wanted."""

    def settle(self, chunk: Chunk, outcome: ChunkResult | Failure) -> None:
        """Take what came out of a chunk, once."""


class Chunk:
    """Calls that go to a worker together.

    Attributes:
        number: What hosts call it; it gets a new one each time that it is given to a host.
        packed: The arguments, perhaps of more calls.
        first: The first of the calls that are meant.
        count: How many are.
        blob: The function's blob.
        shared: The blobs that the arguments refer to.
        sink: Who waits for it.
        key: What the sink knows it by.
        deaths: How many workers or hosts have died under it.
        tried_on: On which hosts that was.
        suspect: Whether it is its last chance, and others were beside it when hosts were lost: any of them may have
            done it, so a host gets one of them at a time.
        cancelled: Whether it is wanted no more.
    """

    __slots__ = (
        "blob", "cancelled", "count", "deaths", "first", "key", "number", "packed", "shared", "sink", "suspect",
        "tried_on",
    )  # fmt: skip

    def __init__(
        self,
        packed: PackedCalls,
        first: int,
        count: int,
        blob: int,
        shared: tuple[int, ...],
        sink: ResultSink,
        key: Any = None,
    ) -> None:
        self.number = 0
        self.packed = packed
        self.first = first
        self.count = count
        self.blob = blob
        self.shared = shared
        self.sink = sink
        self.key = key
        self.deaths = 0
        self.tried_on: tuple[str, ...] = ()
        self.suspect = False
        self.cancelled = False

    def part(self, first: int, count: int) -> Chunk:
        """Return a chunk of some of the calls."""
        chunk = Chunk(self.packed, first, count, self.blob, self.shared, self.sink, self.key)
        chunk.deaths, chunk.tried_on, chunk.suspect = self.deaths, self.tried_on, self.suspect
        return chunk

    def calls(self) -> list[Chunk]:
        """Return a chunk for each of the calls."""
        return [self] if self.count == 1 else [self.part(self.first + index, 1) for index in range(self.count)]
