"""Calls in chunks, which go to a worker together, and the results that come back for them."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable
from typing import Any, Protocol

from lazycluster.agent.pool_protocol import BROKEN, CHUNK, RETURNED
from lazycluster.exceptions import RemoteTraceback, TaskExecutionError
from lazycluster.tasks.functions import load_parts, loads, raised_outcome

from .serialization import PackedCalls

__all__ = [
    "Chunk", "ChunkResult", "Failure", "ResultSink", "call_name", "initializer_error", "read_results",
    "unreadable_error",
]  # fmt: skip


class ChunkResult:
    """Result of a chunk, as bytes; unpickled where it is wanted, not on the loop's thread.

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
    """Error instead of the result of a chunk: no worker has answered."""

    __slots__ = ("error", "size")

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.size = 0


class ResultSink(Protocol):
    """Receiver of results. The methods are called on the loop's thread, and return at once."""

    def call_name(self, chunk: Chunk, call: int) -> str:
        """Return the name of one of the calls of a chunk, for messages."""

    def is_wanted(self, chunk: Chunk) -> bool:
        """Tell whether a chunk that waits is still wanted."""

    def mark_started(self, chunk: Chunk) -> bool:
        """Learn that a chunk is given to a host; returns whether it is still wanted."""

    def settle(self, chunk: Chunk, outcome: ChunkResult | Failure) -> None:
        """Take the result of a chunk, once."""


class Chunk:
    """Calls that go to a worker together.

    Attributes:
        number: What hosts call it; it gets a new one each time that it is given to a host.
        packed: The arguments, perhaps of more calls.
        first: The first of the calls that are meant.
        count: How many are.
        blob: The function's blob.
        shared: The blobs that the arguments refer to.
        sink: Receives its result.
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


_SHORT = 4096  # bytes of arguments that are shown

Results = list[tuple[bool, Any]]


def read_results(outcome: ChunkResult | Failure, first: int, count: int, name: Callable[[int], str]) -> Results:
    """Return for each call of a chunk True and its return value, or False and its exception.

    Args:
        outcome: The result of the chunk.
        first: The first call of the chunk.
        count: How many it has.
        name: Returns the name of a call, for messages.
    """
    if isinstance(outcome, Failure):
        return [(False, outcome.error)] * count
    try:
        results = _read(outcome, first, count, name)
        if len(results) != count:
            raise ValueError(f"{len(results)} results came of {count} calls")
    except Exception as error:  # noqa: BLE001  (whatever a class's own code raises, or a worker says)
        return [(False, unreadable_error(error, outcome.host, name(first)))] * count
    return results


def _read(result: ChunkResult, first: int, count: int, name: Callable[[int], str]) -> Results:
    content = _load(result.parts)
    if result.kind == RETURNED:
        return [(True, value) for value in content]
    if result.kind == BROKEN:
        return [(False, _exception_from(content, result.host, name(first + index))) for index in range(count)]
    return [_read_one(good, data, result.host, name(first + index)) for index, (good, data) in enumerate(content)]


def _load(parts: list[bytes]) -> Any:
    if len(parts) == 1:
        return loads(parts[0])
    return load_parts(parts, False)


def _read_one(good: bool, data: bytes, host: str, name: str) -> tuple[bool, Any]:
    try:
        content = loads(data)
    except Exception as error:  # noqa: BLE001  (whatever a class's own code raises)
        return False, unreadable_error(error, host, name)
    return (True, content[0]) if good else (False, _exception_from(content, host, name))


def unreadable_error(error: BaseException, host: str, name: str) -> TaskExecutionError:
    """Return the error of a call whose result cannot be had."""
    text = f"{host}: the result of {name} came, but cannot be unpickled here: {type(error).__name__}: {error}"
    wrapped = TaskExecutionError(text, host=host, what=name)
    wrapped.__cause__ = error
    return wrapped


def initializer_error(parts: list[bytes], host: str) -> BaseException:
    """Return the exception that an initializer has raised."""
    name = "the initializer"
    try:
        return _exception_from(_load(parts), host, name)
    except Exception as error:  # noqa: BLE001  (whatever a class's own code raises)
        return unreadable_error(error, host, name)


def call_name(function: str, packed: PackedCalls, call: int) -> str:
    """Return the name of a call, for messages: the function with the arguments, if these are short."""
    if packed.kind == CHUNK and packed.size <= _SHORT:
        try:
            calls, kwargs = loads(b"".join(packed.parts))
            shown = [reprlib.repr(argument) for argument in calls[call]]
            shown += [f"{name}={reprlib.repr(value)}" for name, value in (kwargs or {}).items()]
        except Exception:  # noqa: BLE001  (any error of any __repr__; and large arrays are not in there)
            return f"{function}()"
        return f"{function}({', '.join(shown)})"
    return f"{function}()"


def _exception_from(report: dict[str, Any], host: str, name: str) -> BaseException:
    """Return the exception for an error that a worker has reported.

    Args:
        report: Its report.
        host: Where.
        name: The call.
    """
    exception = None
    if report["exception"] is not None:
        with contextlib.suppress(Exception):  # its text must suffice
            exception = loads(report["exception"])
    outcome = raised_outcome(report, report.get("phase", "run"), exception)
    if outcome.exception is not None and outcome.phase == "run":
        text = f"{outcome.traceback}\n  Next step: {outcome.hint}" if outcome.hint else outcome.traceback
        outcome.exception.__cause__ = RemoteTraceback(host, report.get("pid", 0), text)
        return outcome.exception
    error = TaskExecutionError(f"{host}: {outcome.describe(name.partition('(')[0])}", host=host, what=name)
    error.__cause__ = outcome.exception
    return error
