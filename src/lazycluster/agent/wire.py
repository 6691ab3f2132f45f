"""The frames that manager and agent exchange; used on both sides.

A frame is a header (payload length, channel, kind) and a payload. The manager opens a channel with a REQUEST; the
agent ends it with exactly one RESULT. The agent's program is always sent by the manager that talks to it, so the two
never differ in version and the format carries none.
"""

from __future__ import annotations

import os
import struct

from . import json_text

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from collections import deque
    from typing import Any, Deque, Dict, Iterator, Optional, Tuple, Union

    from .spool import Spool
else:
    from _collections import deque  # the module proper takes longer to import

HEADER = struct.Struct("!IIB")
MAX_PAYLOAD = 256 * 1024
MAX_BYTES = 1024 * 1024  # what a frame of bytes may hold when it comes; what is sent is less
FROM_MANAGER = 64 * 1024 * 1024  # what a message of a manager may hold: they hold programs and environments
FROM_AGENT = 8 * 1024 * 1024  # what a message of an agent may hold: the longest tell an environment
WINDOW = 4 * 1024 * 1024  # bytes of INPUT or OUTPUT that may be under way on a channel before they are consumed
CREDIT_UNIT = WINDOW // 4  # consumed bytes are reported in portions of this size
HELD = 8 * 1024 * 1024  # bytes that may be written and not acknowledged; more than what ssh and its pipes take
ACK_UNIT = 256 * 1024  # received bytes are acknowledged in portions of this size
TOTAL_SIZE = 8  # bytes of a count of bytes

# manager to agent
REQUEST, INPUT, INPUT_END, CONTROL = 1, 2, 3, 4
# both ways
CREDIT, ACK = 8, 9
# agent to manager
STDOUT, STDERR, OUTPUT, EVENT, RESULT = 16, 17, 18, 19, 20

_MESSAGES = frozenset((REQUEST, CONTROL, EVENT, RESULT))
_KINDS = _MESSAGES | {INPUT, INPUT_END, CREDIT, ACK, STDOUT, STDERR, OUTPUT}


class FrameError(Exception):
    """The bytes that arrived are not frames."""


def frame(channel: int, kind: int, payload: bytes = b"") -> bytes:
    """Return one frame as bytes."""
    return HEADER.pack(len(payload), channel, kind) + payload


def json_frame(channel: int, kind: int, message: Any) -> bytes:
    """Return one frame whose payload is JSON. Lone surrogates (undecodable file names) survive the round trip."""
    return frame(channel, kind, json_text.dumps(message))


def ack_frame(total: int) -> bytes:
    """Return the frame that says how many bytes have been received in all."""
    return frame(0, ACK, total.to_bytes(TOTAL_SIZE, "big"))


def loads(payload: bytes) -> Dict[str, Any]:
    """Decode a message, which is a JSON object.

    Raises:
        FrameError: It is something else.
    """
    try:
        message = json_text.loads(payload)
    except (ValueError, RecursionError) as error:
        raise FrameError("a message is not JSON: {}".format(error)) from None
    if not isinstance(message, dict):
        raise FrameError("a message is not an object, but {!r:.60}".format(message))
    return message


class Decoder:
    """Cuts a stream of bytes into frames.

    Args:
        limit: The longest message that is taken, in bytes.

    Attributes:
        total: How many bytes it was fed.
    """

    def __init__(self, limit: int = FROM_MANAGER) -> None:
        self.total = 0
        self._buffer = bytearray()
        self._position = 0  # where in the buffer the next frame begins
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[Tuple[int, int, bytes]]:
        """Take bytes, and yield (channel, kind, payload) for each frame that is complete now.

        Raises:
            FrameError: The stream holds something else than frames.
        """
        self.put(data)
        return self.frames()

    def put(self, data: bytes) -> None:
        """Take bytes; a `MemoryError` leaves all as it was."""
        self._buffer += data
        self.total += len(data)

    def frames(self) -> Iterator[Tuple[int, int, bytes]]:
        """Yield (channel, kind, payload) for each frame that is there and was not yielded before.

        Who stops in between goes on with another call. A `MemoryError` leaves the frame where it is.

        Raises:
            FrameError: The stream holds something else than frames.
        """
        buffer, end, head = self._buffer, len(self._buffer), HEADER.size
        try:
            while end - self._position >= head:
                length, channel, kind = HEADER.unpack_from(buffer, self._position)
                if kind not in _KINDS or length > (self._limit if kind in _MESSAGES else MAX_BYTES):
                    wrong = bytes(buffer[self._position : self._position + 64])
                    raise FrameError("not a frame: {!r}".format(wrong))
                start = self._position + head
                if end - start < length:
                    break
                payload = bytes(memoryview(buffer)[start : start + length])
                self._position = start + length
                yield channel, kind, payload
        finally:
            self._forget_read()

    def skip(self) -> int:
        """Drop the next frame, which is there; return its channel."""
        length, channel, _ = HEADER.unpack_from(self._buffer, self._position)
        self._position += HEADER.size + length
        self._forget_read()
        return int(channel)

    def _forget_read(self) -> None:
        try:
            del self._buffer[: self._position]
        except MemoryError:
            return  # it is as it was, and tried again
        self._position = 0


class Outbox:
    """Bytes for a non-blocking descriptor: those that wait, and those that were written and may be needed again.

    When it `retains`, what is written is kept until the other side has acknowledged it: so another descriptor can take
    over, and go on where that side's bytes end.

    Attributes:
        size: How many wait.
        held: How many were written and not acknowledged.
        done: How many were written and are not kept.
        retains: Whether it keeps what it writes.
        spool: Takes what is added while there is one; a file, when memory is not enough.
    """

    def __init__(self) -> None:
        self.size = self.held = self.done = 0
        self.retains = False
        self.spool: Optional[Spool] = None
        self._parts: Deque[memoryview] = deque()
        self._written: Deque[memoryview] = deque()

    def put(self, *parts: Union[bytes, memoryview]) -> None:
        """Add bytes."""
        for part in parts:
            if part:
                self.size += len(part)
                if self.spool is None:
                    self._parts.append(memoryview(part))
                else:
                    self.spool.put(part)

    def write(self, fd: int) -> None:
        """Write as much as is taken at once.

        Raises:
            OSError: Nobody reads any more.
        """
        try:
            while self.size:
                if not self._parts:
                    self._fetch()
                batch = [self._parts[i] for i in range(min(len(self._parts), 64))]
                self._advance(os.writev(fd, batch))
        except BlockingIOError:
            pass

    def _fetch(self) -> None:
        assert self.spool is not None
        self._parts.append(memoryview(self.spool.take()))
        if not self.spool.size:
            self.spool.close()
            self.spool = None

    def _advance(self, count: int) -> None:
        self.size -= count
        retain = self._written.append if self.retains else None
        if retain is None:
            self.done += count
        else:
            self.held += count
        while count:
            first = self._parts[0]
            if count < len(first):
                if retain is not None:
                    retain(first[:count])
                self._parts[0] = first[count:]
                return
            count -= len(first)
            self._parts.popleft()
            if retain is not None:
                retain(first)

    def acknowledge(self, total: int) -> None:
        """Let go of what has arrived: `total` bytes, from the first one on.

        Raises:
            FrameError: If so many were not sent.
        """
        count = max(0, total - self.done)
        if count > self.held:
            raise FrameError("{} bytes are acknowledged, of {}".format(total, self.done + self.held))
        if not count:
            return
        self.done = total
        self.held -= count
        while count:
            first = self._written[0]
            if count < len(first):
                self._written[0] = first[count:]
                return
            count -= len(first)
            self._written.popleft()

    def retain_nothing(self) -> None:
        """Let go of what was written, and do not keep it from now on."""
        self.retains = False
        self.done += self.held
        self.held = 0
        self._written.clear()

    def rewind(self, total: int) -> None:
        """Have everything after the first `total` bytes wait again: the descriptor that it was written to is closed.

        Raises:
            FrameError: If not all of it is there.
        """
        if total < self.done:
            raise FrameError("{} bytes have arrived, but {} are not kept any more".format(total, self.done))
        self.acknowledge(total)
        self._parts.extendleft(reversed(self._written))
        self._written.clear()
        self.size += self.held
        self.held = 0

    def clear(self) -> None:
        """Drop everything."""
        self._parts.clear()
        self._written.clear()
        self.size = self.held = 0
        if self.spool is not None:
            self.spool.close()
            self.spool = None
