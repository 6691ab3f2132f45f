"""MongoDB's wire protocol: messages as bytes."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Any

from . import codec
from .errors import CommandError

LARGEST = 48_000_000 + 1024
HEADER = struct.Struct("<iiii")
_OP_REPLY, _OP_QUERY, _OP_MSG = 1, 2004, 2013
_CHECKSUM, _MORE_TO_COME = 1, 2
_REQUIRED_BITS = 0xFFFF  # bits that must be understood
_numbers = itertools.count(1)


class MessageError(Exception):
    """The bytes that came are not a message: the connection cannot be used any more."""


@dataclass(frozen=True)
class MongoRequest:
    """A command.

    Attributes:
        number: What the answer refers to.
        command: The command, with ``$db``.
        answered: Whether an answer is wanted.
        legacy: Whether it came as, and is to be answered in, the form that only greetings still use.
    """

    number: int
    command: dict[str, Any]
    answered: bool = True
    legacy: bool = False


def length_of(head: bytes | bytearray, limit: int = LARGEST) -> int:
    """Return the length of the message that begins with four bytes.

    Raises:
        MessageError: If it cannot be one.
    """
    length = int.from_bytes(head[:4], "little", signed=True)
    if not HEADER.size < length <= limit:
        raise MessageError(f"a message of {length} bytes")
    return length


def parse(data: bytes) -> MongoRequest:
    """Return the request in a whole message.

    Raises:
        MessageError: If it is none.
    """
    _, number, _, operation = HEADER.unpack_from(data)
    try:
        if operation == _OP_MSG:
            return _message(number, data)
        if operation == _OP_QUERY:
            return _query(number, data)
    except (struct.error, IndexError, ValueError) as error:
        raise MessageError(f"malformed message: {error}") from None
    except CommandError as error:
        raise MessageError(error.message) from None
    raise MessageError(f"operation {operation} is not supported")


def _document(data: bytes, start: int, end: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<i", data, start)
    if size < 5 or start + size > end:
        raise MessageError(f"a document of {size} bytes")
    return data[start : start + size], start + size


def _message(number: int, data: bytes) -> MongoRequest:
    (flags,) = struct.unpack_from("<I", data, 16)
    if flags & _REQUIRED_BITS & ~(_CHECKSUM | _MORE_TO_COME):
        raise MessageError(f"flags {flags:#x} are not known")
    end = len(data) - 4 if flags & _CHECKSUM else len(data)
    command: dict[str, Any] | None = None
    sequences: dict[str, list[Any]] = {}
    position = 20
    while position < end:
        kind, position = data[position], position + 1
        if kind == 0 and command is None:
            body, position = _document(data, position, end)
            command = codec.decode(body)
        elif kind == 1:
            position = _sequence(data, position, end, sequences)
        else:
            raise MessageError(f"a section of kind {kind}")
    if command is None or any(name in command for name in sequences):
        raise MessageError("a message without a command" if command is None else "a field that came twice")
    return MongoRequest(number, {**command, **sequences}, not flags & _MORE_TO_COME)


def _sequence(data: bytes, position: int, end: int, sequences: dict[str, list[Any]]) -> int:
    (size,) = struct.unpack_from("<i", data, position)
    stop = position + size
    zero = data.index(b"\x00", position + 4)
    if stop > end or zero >= stop:
        raise MessageError("a sequence that is longer than its message")
    name = data[position + 4 : zero].decode("utf-8")
    if name in sequences:
        raise MessageError("a sequence that came twice")
    documents = sequences[name] = []
    position = zero + 1
    while position < stop:
        body, position = _document(data, position, stop)
        documents.append(codec.decode(body))
    return int(stop)


def _query(number: int, data: bytes) -> MongoRequest:
    zero = data.index(b"\x00", 20)
    space = data[20:zero].decode("utf-8")
    database, _, collection = space.partition(".")
    if collection != "$cmd":
        raise MessageError(f"queries of {space} in the old form are not supported")
    body, _ = _document(data, zero + 9, len(data))
    command = codec.decode(body)
    inner = command.get("$query")
    if isinstance(inner, dict):
        command = inner
    return MongoRequest(number, {**command, "$db": database}, legacy=True)


def answer(request: MongoRequest, document: dict[str, Any]) -> bytes:
    """Return an answer as bytes."""
    body = codec.encode(document)
    if request.legacy:
        head, operation = struct.pack("<iqii", 8, 0, 0, 1), _OP_REPLY
    else:
        head, operation = struct.pack("<IB", 0, 0), _OP_MSG
    size = HEADER.size + len(head) + len(body)
    return HEADER.pack(size, next(_numbers) & 0x7FFFFFFF, request.number, operation) + head + body
