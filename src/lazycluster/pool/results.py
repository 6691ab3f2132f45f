"""What came out of calls: reading the answers of workers."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable
from typing import Any

from lazycluster.agent.pool_protocol import BROKEN, CHUNK, RETURNED
from lazycluster.exceptions import RemoteTraceback, TaskExecutionError
from lazycluster.tasks.functions import load_parts, loads, raised_outcome

from .chunks import ChunkAnswer, Failure
from .serialization import PackedCalls

__all__ = ["call_name", "initializer_error", "read", "unreadable"]

_SHORT = 4096  # bytes of arguments that are shown

Results = list[tuple[bool, Any]]


def read(outcome: ChunkAnswer | Failure, first: int, count: int, name: Callable[[int], str]) -> Results:
    """Return for each call of a chunk whether it returned, and what it returned or raised.

    Args:
        outcome: What came.
        first: The first call of the chunk.
        count: How many it has.
        name: Returns what to call one in messages.
    """
    if isinstance(outcome, Failure):
        return [(False, outcome.error)] * count
    try:
        results = _read(outcome, first, count, name)
        if len(results) != count:
            raise ValueError(f"{len(results)} results came of {count} calls")
    except Exception as error:  # noqa: BLE001  (whatever a class's own code raises, or a worker says)
        return [(False, unreadable(error, outcome.host, name(first)))] * count
    return results


def _read(answer: ChunkAnswer, first: int, count: int, name: Callable[[int], str]) -> Results:
    content = _load(answer.parts)
    if answer.kind == RETURNED:
        return [(True, value) for value in content]
    if answer.kind == BROKEN:
        return [(False, _described(content, answer.host, name(first + index))) for index in range(count)]
    return [_one(good, data, answer.host, name(first + index)) for index, (good, data) in enumerate(content)]


def _load(parts: list[bytes]) -> Any:
    if len(parts) == 1:
        return loads(parts[0])
    return load_parts(parts, False)


def _one(good: bool, data: bytes, host: str, name: str) -> tuple[bool, Any]:
    try:
        content = loads(data)
    except Exception as error:  # noqa: BLE001  (whatever a class's own code raises)
        return False, unreadable(error, host, name)
    return (True, content[0]) if good else (False, _described(content, host, name))


def unreadable(error: BaseException, host: str, name: str) -> TaskExecutionError:
    """Return the error of a call whose result cannot be had."""
    text = f"{host}: the result of {name} came, but cannot be unpickled here: {type(error).__name__}: {error}"
    wrapped = TaskExecutionError(text, host=host, what=name)
    wrapped.__cause__ = error
    return wrapped


def initializer_error(parts: list[bytes], host: str) -> BaseException:
    """Return what an initializer has raised."""
    name = "the initializer"
    try:
        return _described(_load(parts), host, name)
    except Exception as error:  # noqa: BLE001  (whatever a class's own code raises)
        return unreadable(error, host, name)


def call_name(function: str, packed: PackedCalls, call: int) -> str:
    """Return what to call a call in messages: the function with the arguments, if these are short."""
    if packed.kind == CHUNK and packed.size <= _SHORT:
        try:
            calls, kwargs = loads(b"".join(packed.parts))
            shown = [reprlib.repr(argument) for argument in calls[call]]
            shown += [f"{name}={reprlib.repr(value)}" for name, value in (kwargs or {}).items()]
        except Exception:  # noqa: BLE001  (any error of any __repr__; and large arrays are not in there)
            return f"{function}()"
        return f"{function}({', '.join(shown)})"
    return f"{function}()"


def _described(told: dict[str, Any], host: str, name: str) -> BaseException:
    """Return what to raise for an error that a worker has told of.

    Args:
        told: What it said.
        host: Where.
        name: The call.
    """
    exception = None
    if told["exception"] is not None:
        with contextlib.suppress(Exception):  # its text must suffice
            exception = loads(told["exception"])
    outcome = raised_outcome(told, told.get("phase", "run"), exception)
    if outcome.exception is not None and outcome.phase == "run":
        text = f"{outcome.traceback}\nNext step: {outcome.hint}" if outcome.hint else outcome.traceback
        outcome.exception.__cause__ = RemoteTraceback(host, told.get("pid", 0), text)
        return outcome.exception
    error = TaskExecutionError(f"{host}: {outcome.describe(name.partition('(')[0])}", host=host, what=name)
    error.__cause__ = outcome.exception
    return error
