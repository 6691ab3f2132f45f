"""The frames in which files travel, over a pair of blocking descriptors. Used on the host and on the manager.

A copy has a sender and a receiver; the manager asks for it and is one of the two:

    manager   REQUEST                 which copy
    sender    START                   file or directory, its name
    receiver  READY                   the destination exists
    sender    ENTRIES                 a batch of what there is: directories, links, files with size and time
    receiver  NEED                    per file of the batch: wanted, not wanted, only if its digest differs, or from
                                      where on, with the checksum of what is there
    sender    FROM? (DATA | HOLE)* LAST | SAME
                                      the wanted files in their order; FROM says from where on, if that was asked; HOLE
                                      how many bytes are none; LAST carries the size of the whole
    sender    PROVE                   ahead of LAST: the file has changed meanwhile, so what has come is to be compared
    receiver  PROOF                   the checksum of that
    sender    MISSED                  instead of LAST, also after DATA: a file of a directory cannot be sent, others can
    sender    LISTED, UNUSED?, END    all is listed (sizes are known), with what was of no use for that; all is sent
    receiver  DONE                    the last frame of every copy
    receiver  ERROR, sender ABORT     what fails is told by a frame, ABORT follows an ERROR, DONE an ABORT

What comes is what was sent: ssh, or TLS, sees to that. So no checksum is computed but where files may differ.

Several batches are under way at once, so nothing waits for a round trip per file. The frames towards the sender are
small enough to fit into the buffers of a pipe together, so the two never wait for each other.

The process on the host says BUSY every few seconds, whatever it is busy with (a digest of a large file, a slow disk):
so the manager can tell it from one that does nothing any more.
"""

from __future__ import annotations

import _thread
import fcntl
import json
import os
import select
import struct
import time
from typing import Any, Callable, Dict, Iterator, List, Optional

(
    REQUEST, START, READY, ENTRIES, NEED, DATA, LAST, SAME, LISTED, END, DONE, ERROR, ABORT, FROM, BUSY, UNUSED, MISSED,
    HOLE, PROVE, PROOF,
) = range(1, 21)  # fmt: skip
# Of a file that goes from host to host; see `direct_copy`.
LISTENING, NEXT, CAME, CHECK, VERDICT, REPORT = range(32, 38)

#: How many entries a batch has, and how many batches may be unanswered: the answers must fit into 64 KiB.
BATCH = 768
WINDOW = 4
#: How many characters the names of a batch may have together before it is sent.
BATCH_TEXT = 512 * 1024

#: What LAST carries: size, mode, modification time in nanoseconds.
SUMMARY = struct.Struct("!QIq")

#: What PROOF carries: a checksum, the CRC-32.
CHECKSUM = struct.Struct("!I")

#: What says how much of a file is there: the bytes, and their checksum.
BEGINNING = struct.Struct("!QI")

_LAST_FRAMES = frozenset((END, DONE, ABORT, REPORT))  # after which a process on the host only waits for the manager
_HEADER = struct.Struct("!BI")
_OUT = 256 * 1024
_IN = 1024 * 1024
_PIPE = 1024 * 1024
_F_SETPIPE_SZ = 1031
_SMALL = 64 * 1024
_LARGEST = 8 * 1024 * 1024  # a batch whose names are all escaped
_UNDER_WAY = 256 * 1024 * 1024  # bytes that buffers between the two sides may hold, and much more
_REPORT_EVERY = 0.1
_BUSY_EVERY = 5.0  # seconds
_MOST_MISSED = 100


class StreamClosedError(Exception):
    """The other side has ended, or says what makes no sense: nothing more can be told to it."""

    @classmethod
    def of(cls, error: OSError) -> "StreamClosedError":
        """Return the error of the system about a stream: which one an end gives is a matter of a moment."""
        ended = isinstance(error, (BrokenPipeError, ConnectionResetError))
        return cls("it has ended" if ended else error.strerror)


class CopyError(Exception):
    """A file cannot be copied.

    Attributes:
        path: The whole path of what it is about.
        errno: The number of the system's error, or None.
        message: What is wrong.
        remote: It was the other side that found it.
    """

    def __init__(self, path: bytes, message: str, errno: Optional[int] = None, remote: bool = False) -> None:
        self.path = path
        self.message = message
        self.errno = errno
        self.remote = remote
        super().__init__("{}: {}".format(text(path), message))

    @classmethod
    def of(cls, path: bytes, error: OSError) -> "CopyError":
        """Return the error of the system about a path."""
        return cls(path, error.strerror or str(error), error.errno)

    @classmethod
    def received(cls, message: Dict[str, Any]) -> "CopyError":
        """Return the error that the other side has told."""
        number = message.get("errno")
        path = raw(str(message.get("path", "")))[:8192]
        return cls(path, str(message.get("message"))[:2000], number if isinstance(number, int) else None, remote=True)

    def message_to_send(self) -> Dict[str, Any]:
        """Return what the other side is told."""
        return {"path": text(self.path), "message": self.message, "errno": self.errno}


def text(path: bytes) -> str:
    """Return a path as text from which `raw` gets it back, whatever its encoding and the locale are."""
    return path.decode("utf-8", "surrogateescape")


def raw(path: str) -> bytes:
    """Return the path of a text."""
    return str.encode(path, "utf-8", "surrogateescape")


class ByteCounter:
    """Counts of what a copy has done so far.

    Attributes:
        files: Files that are dealt with.
        bytes: Their bytes, whether they had to be sent or not.
        total: The bytes of all files, None until all are listed.
        sent: Files that were sent.
        skipped: Files that were there already.
        left_out: Names of what is neither file, directory nor link, and why.
        unused: Patterns that left nothing out.
        missed: What of a directory could not be sent, though the rest was; of very many only the first.
        missed_count: How many that are.
    """

    def __init__(self, report: Optional[Callable[[int, Optional[int], int], object]] = None) -> None:
        self.files = self.bytes = self.sent = self.skipped = 0
        self.total: Optional[int] = None
        self.left_out: List[str] = []
        self.unused: List[str] = []
        self.missed: List[CopyError] = []
        self.missed_count = 0
        self._report = report
        self._next = 0.0

    def moved(self, count: int) -> None:
        """Count bytes."""
        self.bytes += count
        if self._report is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + _REPORT_EVERY
            self._report(self.bytes, self.total, self.files)

    def file(self, sent: bool) -> None:
        """Count a file that is done."""
        self.files += 1
        self.sent += sent
        self.skipped += not sent

    def miss(self, error: CopyError) -> None:
        """Count what could not be sent."""
        self.missed_count += 1
        if len(self.missed) < _MOST_MISSED:
            self.missed.append(error)

    def finish(self) -> None:
        """Report the end."""
        if self._report is not None:
            self._report(self.bytes, self.bytes, self.files)


class FrameStream:
    """Frames over blocking descriptors; both ways have one buffer, which is all the memory that a copy takes.

    Args:
        incoming: Descriptor to read from.
        outgoing: Descriptor to write to; may be the same.

    Attributes:
        received: Whether anything has come.
        moved: How many bytes have come or gone.
        signs: How many of them only said that the other side is busy.
        waits: Whether it waits at present for the other side to take or send something.
        busy: Whether the other side is told every few seconds that this process lives; see `tell_busy`.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._poll = select.poll()
        self._poll.register(incoming, select.POLLIN)
        self._in = memoryview(bytearray(_IN))
        self._start = self._end = self._unread = 0
        self._out = memoryview(bytearray(_OUT))
        self._filled = 0
        self.received = self.waits = self.busy = self._tells = False
        self.moved = self.signs = 0
        self._writing = _thread.allocate_lock()
        for fd in (incoming, outgoing):
            os.set_blocking(fd, True)
            try:
                # Most sshd's give pipes: in larger ones both sides are woken less often.
                fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE)
            except OSError:
                pass  # no pipe, or no such thing here: it works without

    # --- signs of life -------------------------------------------------------------------------
    def tell_busy(self) -> None:
        """From now on, say BUSY from time to time while `busy` is set, which the last frames of a copy end."""
        self._tells = True
        _thread.start_new_thread(self._tell_busy, ())

    def tell_nothing(self) -> None:
        """Say it no more: the descriptors may be closed now."""
        self.busy = self._tells = False  # without the lock: the thread may have it as long as nobody reads

    def _tell_busy(self) -> None:
        try:
            while self._tells:
                time.sleep(_BUSY_EVERY)
                if self.busy:
                    with self._writing:
                        if self.busy:
                            os.write(self._outgoing, _HEADER.pack(BUSY, 0))
        except OSError:
            pass  # the other side has ended, as the copy will notice

    # --- writing -------------------------------------------------------------------------------
    def put(self, kind: int, payload: bytes = b"") -> None:
        """Write a frame, at the latest before the next read that has to wait."""
        if kind in _LAST_FRAMES:
            self.busy = False
        if self._filled + _HEADER.size + len(payload) > _OUT:
            self.flush()
        if _HEADER.size + len(payload) > _OUT:
            self._write(memoryview(_HEADER.pack(kind, len(payload)) + payload))
            return
        _HEADER.pack_into(self._out, self._filled, kind, len(payload))
        start = self._filled + _HEADER.size
        self._filled = start + len(payload)
        self._out[start : self._filled] = payload

    def put_json(self, kind: int, message: Any) -> None:
        """Write a frame with a message."""
        self.put(kind, json.dumps(message, separators=(",", ":")).encode("ascii"))

    def room(self, wanted: int) -> memoryview:
        """Return where to put the payload of the next frame: at most `wanted` bytes, which `fill` then sends."""
        if _OUT - self._filled - _HEADER.size < min(wanted, _SMALL):
            self.flush()
        start = self._filled + _HEADER.size
        return self._out[start : start + wanted]

    def fill(self, kind: int, length: int) -> None:
        """Send what was put into `room`."""
        _HEADER.pack_into(self._out, self._filled, kind, length)
        self._filled += _HEADER.size + length

    def flush(self) -> None:
        """Write what is waiting."""
        filled, self._filled = self._filled, 0
        if filled:
            self._write(self._out[:filled])

    def _write(self, data: memoryview) -> None:
        self.waits = True
        try:
            with self._writing:
                while data:
                    count = self._transmit(data)
                    self.moved += count
                    data = data[count:]
        except OSError as error:
            raise StreamClosedError.of(error) from error
        finally:
            self.waits = False

    def _transmit(self, data: memoryview) -> int:
        """Write some of the data, at least a byte; return how much."""
        return os.write(self._outgoing, data)

    def _receive(self, place: memoryview) -> int:
        """Read into a place what there is, at least a byte; return how much, 0 at the end."""
        return os.readv(self._incoming, [place])

    # --- reading -------------------------------------------------------------------------------
    def readable(self) -> bool:
        """Return whether there is something to read that says more than that the other side lives."""
        while True:
            while not self._unread and self._end - self._start >= _HEADER.size and self._in[self._start] == BUSY:
                self._skip_sign()
            if self._start < self._end:
                return True
            if not self._has_more():
                return False
            self._read()

    def readable_or_ended(self) -> bool:
        """Return whether something has come that was not read, be it the end."""
        return self._start < self._end or bool(self._poll.poll(0))

    def wait(self, seconds: float) -> None:
        """Wait until there is something to read, for so long at most."""
        self._poll.poll(seconds * 1000)

    def _has_more(self) -> bool:
        """Return whether reading would not have to wait."""
        return bool(self._poll.poll(0))

    def header(self) -> int:
        """Wait for a frame; return its kind. What was not read of the frame before is skipped."""
        if self._unread:
            for _ in self.pieces():
                pass
        while True:
            while self._end - self._start < _HEADER.size:
                self._read()
            if self._in[self._start] != BUSY:
                break
            self._skip_sign()
        kind: int
        kind, self._unread = _HEADER.unpack_from(self._in, self._start)
        self._start += _HEADER.size
        return kind

    def _skip_sign(self) -> None:
        self._start += _HEADER.size
        self.signs += _HEADER.size

    def pieces(self) -> Iterator[memoryview]:
        """Return the payload piece by piece, as it comes; each is valid until the next is asked for."""
        while self._unread:
            if self._start == self._end:
                self._read()
            start, self._start = self._start, min(self._end, self._start + self._unread)
            self._unread -= self._start - start
            yield self._in[start : self._start]

    def payload(self) -> bytes:
        """Return the payload."""
        if self._unread > _LARGEST:
            raise StreamClosedError("a frame of {} bytes makes no sense".format(self._unread))
        return b"".join(bytes(piece) for piece in self.pieces())

    def message(self, kind: type = dict) -> Any:
        """Return the payload as a message of the kind that is expected."""
        try:
            message = json.loads(self.payload().decode("ascii"))
        except (ValueError, RecursionError) as error:
            raise StreamClosedError("a frame that makes no sense: {}".format(error)) from error
        if not isinstance(message, kind):
            raise StreamClosedError("a frame that makes no sense: {} expected".format(kind.__name__))
        return message

    def skip_until(self, wanted: int) -> None:
        """Forget all frames up to one of a kind, and that one: they were under way when the other side was told."""
        left = _UNDER_WAY
        while self.header() != wanted:
            left -= self._unread + _HEADER.size
            if left < 0:
                raise StreamClosedError("the other side goes on sending though it was told to stop")

    def _read(self) -> None:
        self.flush()
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _IN:
            rest = bytes(self._in[self._start : self._end])
            self._start, self._end = 0, len(rest)
            self._in[: len(rest)] = rest
        self.waits = True
        try:
            count = self._receive(self._in[self._end :])
        except OSError as error:
            raise StreamClosedError.of(error) from error
        finally:
            self.waits = False
        if not count:
            raise StreamClosedError("it has ended")
        self.received = True
        self.moved += count
        self._end += count
