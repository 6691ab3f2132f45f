"""The frames that manager and agent exchange; used on both sides.

A frame is a header (payload length, channel, kind) and a payload. The manager opens a channel with a REQUEST; the
agent ends it with exactly one RESULT. The agent's program is always sent by the manager that talks to it, so the two
never differ in version and the format carries none.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Deque, Dict, Iterator, Tuple, Union

HEADER = struct.Struct("!IIB")
MAX_PAYLOAD = 256 * 1024
MAX_BYTES = 1024 * 1024  # what a frame of bytes may hold when it comes; what is sent is less
FROM_AGENT = 8 * 1024 * 1024  # what a message of an agent may hold: the longest tell an environment
WINDOW = 4 * 1024 * 1024  # bytes of INPUT or OUTPUT that may be under way on a channel before they are consumed
CREDIT_UNIT = WINDOW // 4  # consumed bytes are reported in portions of this size

# manager to agent
REQUEST, INPUT, INPUT_END, CONTROL = 1, 2, 3, 4
# both ways
CREDIT = 8
# agent to manager
STDOUT, STDERR, OUTPUT, EVENT, RESULT = 16, 17, 18, 19, 20

_MESSAGES = frozenset((REQUEST, CONTROL, EVENT, RESULT))
_KINDS = _MESSAGES | {INPUT, INPUT_END, CREDIT, STDOUT, STDERR, OUTPUT}


class ProtocolError(Exception):
    """The bytes that arrived are not frames."""


def frame(channel: int, kind: int, payload: bytes = b"") -> bytes:
    """Return one frame as bytes."""
    return HEADER.pack(len(payload), channel, kind) + payload


def json_frame(channel: int, kind: int, message: Any) -> bytes:
    """Return one frame whose payload is JSON. Lone surrogates (undecodable file names) survive the round trip."""
    return frame(channel, kind, json.dumps(message, separators=(",", ":")).encode("ascii"))


def loads(payload: bytes) -> Dict[str, Any]:
    """Decode a message, which is a JSON object.

    Raises:
        ProtocolError: It is something else.
    """
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message is not JSON: {}".format(error)) from None
    if not isinstance(message, dict):
        raise ProtocolError("a message is not an object, but {!r:.60}".format(message))
    return message


class Decoder:
    """Cuts a stream of bytes into frames.

    Args:
        limit: The longest message that is taken, in bytes; those of a manager hold programs and environments.
    """

    def __init__(self, limit: int = 64 * 1024 * 1024) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[Tuple[int, int, bytes]]:
        """Yield (channel, kind, payload) for each frame that `data` completes.

        Raises:
            ProtocolError: The stream holds something else than frames.
        """
        buffer = self._buffer
        buffer += data
        position, end, head = 0, len(buffer), HEADER.size
        try:
            while end - position >= head:
                length, channel, kind = HEADER.unpack_from(buffer, position)
                if kind not in _KINDS or length > (self._limit if kind in _MESSAGES else MAX_BYTES):
                    raise ProtocolError("not a frame: {!r}".format(bytes(buffer[position : position + 64])))
                if end - position - head < length:
                    break
                start = position + head
                position = start + length
                yield channel, kind, bytes(memoryview(buffer)[start:position])
        finally:
            del buffer[:position]


class Outbox:
    """Bytes that wait to be written to a non-blocking descriptor.

    Attributes:
        size: How many wait.
    """

    def __init__(self) -> None:
        self.size = 0
        self._parts: Deque[memoryview] = deque()

    def put(self, *parts: Union[bytes, memoryview]) -> None:
        """Add bytes."""
        for part in parts:
            if part:
                self._parts.append(memoryview(part))
                self.size += len(part)

    def write(self, fd: int) -> None:
        """Write as much as is taken at once.

        Raises:
            OSError: Nobody reads any more.
        """
        try:
            while self._parts:
                batch = [self._parts[i] for i in range(min(len(self._parts), 64))]
                self._written(os.writev(fd, batch))
        except BlockingIOError:
            pass

    def _written(self, count: int) -> None:
        self.size -= count
        while count:
            first = self._parts[0]
            if count < len(first):
                self._parts[0] = first[count:]
                return
            count -= len(first)
            self._parts.popleft()

    def clear(self) -> None:
        """Drop what waits."""
        self._parts.clear()
        self.size = 0
