"""A file on its way through many hosts: each one passes on what has come so far while the rest is still coming.

The manager sends the file to the first host. Each host is a sender and a receiver of copies (see `stream`), towards the
next one and the one before, over TLS. With each host the manager has a stream of its own besides:

    manager   REQUEST    who takes part, what the file is, certificate and key of this host
    host      LISTENING  the next one may connect
    manager   NEXT       who comes before and after; for the first host a copy follows, as from any sender
    host      CAME       how many bytes have come
    host      CHECK      the checksum of the whole file, from all hosts but the first: the one before may have lied
    manager   VERDICT    whether it is that of the manager's own file
    host      REPORT     what came of it

What fails is told to the manager, which sends the file itself to whoever does not get it from another host.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import socket
import ssl
import threading
import time
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from .holes import extents
from .partial_files import PartialFiles
from .receiver import Receiver
from .secure_stream import SecureStream, TlsCredentials, check, notice_cuts
from .sender import COMPARE, DIGEST_SIZE, NOT_WANTED, RESUME, digest
from .stream import (
    ABORT,
    BEGINNING,
    CAME,
    CHECK,
    DATA,
    DONE,
    END,
    ENTRIES,
    ERROR,
    FROM,
    HOLE,
    LAST,
    LISTED,
    LISTENING,
    NEED,
    NEXT,
    READY,
    REPORT,
    SAME,
    START,
    SUMMARY,
    VERDICT,
    ByteCounter,
    CopyError,
    FrameStream,
    StreamClosedError,
)

_MEET_LIMIT = 15.0  # seconds for the host before to connect, and for a handshake
_PORT_LIMIT = 4.0  # seconds for a port to be free
_HANDSHAKE_LIMIT = 5.0  # seconds for one who has begun to say who it is
_MOST_SILENT = 16  # connections of those who say nothing
_TELL_EVERY = 0.25  # seconds between two words to the manager about what has come
_BLOCK = 1024 * 1024
_ENDED = "the copy has ended before the file was complete"
OTHER_FILE = "is not the file that the manager has described"
OTHER_CONTENTS = "differs from the manager's file"


class FileFacts(NamedTuple):
    """The manager's statement about its file: neighbours may not say anything else."""

    name: str
    size: int
    mtime: int
    mode: int


class GrowingFile:
    """A file that is being received, for threads that read it at the same time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._fd = -1
        self._size = 0
        self._complete = False
        self._aborted: Optional[CopyError] = None
        self._lost = False

    def begin(self, fd: int) -> None:
        """Have it read from this file, which is opened once more: its position is not that of who writes it."""
        with self._changed:
            self.close()
            self._fd = _opened_again(fd)
            self._changed.notify_all()

    def grew(self, size: int) -> None:
        """Let so many bytes be read."""
        with self._changed:
            self._size = size
            self._changed.notify_all()

    def complete(self) -> None:
        """Note that all has come."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def abort(self, error: CopyError) -> None:
        """Note that nobody will get the whole, and why."""
        with self._changed:
            self._aborted = error
            self._changed.notify_all()

    def lose(self) -> None:
        """Note that no more comes to this host."""
        with self._changed:
            self._lost = not self._complete
            self._changed.notify_all()

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def is_lost(self) -> bool:
        """True if no more comes to this host, though not all has come."""
        return self._lost

    def wait(self, position: int) -> Tuple[int, int]:
        """Wait until there is more than this.

        Returns:
            A descriptor to read from, and how many bytes can be read; no more than `position` if that is all.

        Raises:
            CopyError: Nobody will get the whole.
            StreamClosedError: No more comes to this host.
        """
        with self._changed:
            while not self._complete and (self._fd < 0 or self._size <= position):
                if self._aborted is not None:
                    raise self._aborted
                if self._lost:
                    raise StreamClosedError(_ENDED)
                self._changed.wait()
            return self._fd, self._size

    def wait_for_all(self) -> int:
        """Wait until it is complete; return a descriptor to read from. Raises what `wait` does."""
        position = 0
        while not self._complete:
            position = self.wait(position)[1]
        return self._fd


def _opened_again(fd: int) -> int:
    return os.open("/proc/self/fd/{}".format(fd), os.O_RDONLY | os.O_CLOEXEC)


class _Reader(threading.Thread):
    """A thread that reads a file while it comes.

    Attributes:
        error: What has ended it; None if nothing has gone wrong.
    """

    def __init__(self, file: GrowingFile) -> None:
        super().__init__(daemon=True)
        self.file = file
        self.error: Optional[BaseException] = None

    def run(self) -> None:
        """Do the work; what goes wrong is in `error`."""
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001  (told by the thread that waits for this one)
            self.error = error

    def work(self) -> None:
        """Read."""
        raise NotImplementedError


class _Checksum(_Reader):
    """Computes the checksum of the whole file."""

    def __init__(self, file: GrowingFile) -> None:
        super().__init__(file)
        self.value = ""

    def work(self) -> None:
        """Read all of it."""
        state, block, position = hashlib.sha256(), memoryview(bytearray(_BLOCK)), 0
        while True:
            fd, size = self.file.wait(position)
            if size <= position:
                self.value = state.hexdigest()
                return
            count = os.preadv(fd, [block[: size - position]], position)
            if not count:
                raise StreamClosedError(_ENDED)
            state.update(block[:count])
            position += count


class _Forward(_Reader):
    """Sends the file to the next host while it comes.

    Args:
        file: The file.
        facts: What it is.
        credentials: Who this host is.
        is_given_up: See `SecureStream`.
        address: Where the next host listens.
        port: The port there.
        party: Who it is.
    """

    def __init__(
        self,
        file: GrowingFile,
        facts: FileFacts,
        credentials: TlsCredentials,
        is_given_up: Callable[[], bool],
        address: str,
        port: int,
        party: str,
    ) -> None:
        super().__init__(file)
        self._is_given_up = is_given_up
        self._facts, self._credentials = facts, credentials
        self._address, self._port, self._party = address, port, party

    def work(self) -> None:
        """Connect, and send."""
        with socket.create_connection((self._address, self._port), timeout=_MEET_LIMIT) as plain:
            notice_cuts(plain)
            with self._credentials.context(server=False).wrap_socket(plain) as connection:
                check(connection, self._party)
                self._send(SecureStream(connection, self._is_given_up))

    def _send(self, stream: FrameStream) -> None:
        facts = self._facts
        stream.put_json(START, {"folder": False, "name": facts.name, "now": time.time_ns()})
        stream.put_json(ENTRIES, [["f", facts.name, facts.mtime, facts.mode, facts.size]])
        try:
            self._answer(stream, READY)
            needs = self._answer(stream, NEED)
            stream.put_json(LISTED, facts.size)
            if needs[:1] != bytes([NOT_WANTED]):
                self._send_file(stream, needs)
            stream.put_json(END, [])
            self._answer(stream, DONE)
        except CopyError as error:
            stream.put_json(ABORT, {} if error.remote else error.message_to_send())
            stream.skip_until(DONE)
            raise

    def _answer(self, stream: FrameStream, kind: int) -> bytes:
        found = stream.header()
        if found == ERROR:
            raise CopyError.received(stream.message())
        if found != kind:
            raise StreamClosedError("an unexpected frame ({})".format(found))
        return stream.payload()

    def _send_file(self, stream: FrameStream, needs: bytes) -> None:
        kind, rest = needs[0], needs[1:]
        if kind == COMPARE and self._is_same(rest[:DIGEST_SIZE]):
            stream.put(SAME, self._summary())
            return
        position = 0
        if kind == RESUME:
            position = self._agreed(*BEGINNING.unpack(rest[: BEGINNING.size]))
            stream.put(FROM, position.to_bytes(8, "big"))
        while True:
            fd, size = self.file.wait(position)
            if size <= position:
                break
            for hole, data in extents(fd, position, size):
                if hole:
                    stream.put(HOLE, hole.to_bytes(8, "big"))
                self._send_data(stream, fd, position + hole, data)
                position += hole + data
        stream.put(LAST, self._summary())

    def _send_data(self, stream: FrameStream, fd: int, position: int, left: int) -> None:
        while left:
            room = stream.room(left)
            count = os.preadv(fd, [room], position)
            if not count:
                raise StreamClosedError(_ENDED)
            stream.fill(DATA, count)
            position += count
            left -= count
            if stream.readable():  # that something is wrong there
                self._answer(stream, NEED)

    def _is_same(self, theirs: bytes) -> bool:
        fd = _opened_again(self.file.wait_for_all())
        try:
            return digest(fd) == theirs
        finally:
            os.close(fd)

    def _agreed(self, count: int, checksum: int) -> int:
        """Return where to go on: behind what is there, if it is the beginning of the file."""
        position, found = 0, 0
        while position < count <= self._facts.size:
            fd, size = self.file.wait(position)
            data = os.pread(fd, min(_BLOCK, size - position, count - position), position)
            if not data:
                return 0
            found = zlib.crc32(data, found)
            position += len(data)
        return count if (position, found) == (count, checksum) else 0

    def _summary(self) -> bytes:
        facts = self._facts
        return SUMMARY.pack(facts.size, facts.mode, facts.mtime)


class _DirectReceiver(Receiver):
    """Receives the file, and lets others read it at once.

    Args:
        stream: Where from.
        party: The host's part in the copy.
        destination: See `Receiver`.
        counter: Counts what is done.
        parts: What earlier tries have left.
    """

    def __init__(
        self, stream: FrameStream, party: "Party", destination: Any, counter: ByteCounter, parts: Optional[PartialFiles]
    ) -> None:
        super().__init__(stream, destination, counter, parts)
        self._party = party
        self._told = 0.0

    def _start(self) -> None:
        super()._start()
        self._clocks_apart = self._party.clocks_apart  # to the manager's, whose file it is

    def _entry(self, kind: str, name: bytes, mtime: int, entry: Any, answer: bytearray) -> None:
        facts = self._party.facts
        if (kind, mtime, entry[3], entry[4]) != ("f", facts.mtime, facts.mode, facts.size):
            raise CopyError(self._tree_there().whole(name), OTHER_FILE)
        super()._entry(kind, name, mtime, entry, answer)
        if answer[0] in (NOT_WANTED, COMPARE):
            directory, last = self._tree_there().parent(name)
            fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                self._party.file.begin(fd)
            finally:
                os.close(fd)
        if answer[0] == NOT_WANTED:
            self._party.file.grew(facts.size)
            self._party.file.complete()

    def _from(self) -> None:
        super()._from()
        self._share()

    def _hole(self) -> None:
        super()._hole()
        self._share()

    def _data(self) -> None:
        super()._data()
        self._share()
        if time.monotonic() >= self._told + _TELL_EVERY:
            self._told = time.monotonic()
            self._party.tell_came(self._size)

    def _share(self) -> None:
        if self._part is not None:
            if self._party.shared is not self._part:
                self._party.shared = self._part
                self._party.file.begin(self._part.fd)
                self._party.begin_checksum()
            self._party.file.grew(self._size)

    def _approve(self, mode: int, mtime: int) -> None:
        facts = self._party.facts
        path = self._tree_there().whole(self._wanted[0].name)
        if self._part is None:  # the one that was there is the same
            self._party.file.grew(facts.size)
        elif self._size != facts.size:
            raise CopyError(path, OTHER_FILE)
        if (mode, mtime) != (facts.mode, facts.mtime):
            raise CopyError(path, OTHER_FILE)
        self._party.file.complete()
        self._party.have_it_checked(path)


class Party:
    """One host's part in a copy.

    Args:
        stream: The stream from the manager.
        request: What it has asked for.
        destination: Makes the directory for a file of a name; see `Receiver`.
        parts: What earlier tries have left.

    Attributes:
        facts: What the file is.
        file: The file, for those who read it while it comes.
        shared: What of the receiver is read there.
        clocks_apart: Nanoseconds by which this host's clock is before the manager's.
    """

    def __init__(
        self,
        stream: FrameStream,
        request: Dict[str, Any],
        destination: Callable[[bytes], Any],
        parts: Optional[PartialFiles],
    ) -> None:
        self.facts = FileFacts(*request["file"])
        self.file = GrowingFile()
        self.shared: Any = None
        self.clocks_apart = time.time_ns() - int(request["now"])
        self._stream, self._destination, self._parts = stream, destination, parts
        self._request = request
        self._credentials = TlsCredentials(request["credentials"])
        self._is_first = False
        self._checksum: Optional[_Checksum] = None
        self._previous = ""
        self._only_forwards = False  # this host has the file, or never will

    def run(self) -> None:
        """Do it, and report.

        Raises:
            StreamClosedError: The manager has ended.
        """
        report: Dict[str, Any] = {"path": "", "sent": False, "error": None, "remote": False, "lost": "", "next": ""}
        forward: Optional[_Forward] = None
        try:
            listener = self._listener()
        except OSError as error:
            self._stream.put_json(ERROR, CopyError(b"a port for it", str(error), error.errno).message_to_send())
            self._stream.put_json(DONE, {})
            self._stream.flush()
            return
        with listener:
            self._stream.put_json(LISTENING, {})
            if self._stream.header() != NEXT:
                raise StreamClosedError("an unexpected frame")
            place = self._stream.message()
            self._previous, self._is_first = str(place["previous"] or ""), place["previous"] is None
            try:
                if place["next"] is not None:
                    forward = _Forward(self.file, self.facts, self._credentials, self._is_over, *place["next"])
                    forward.start()
                self._take(listener, report)
            finally:
                self._stream.busy = True  # also after the last frame of a copy
                self.file.lose()
                self._only_forwards = True
                for reader in (forward, self._checksum):
                    if reader is not None:
                        reader.join()
                self.file.close()
        failed = None if forward is None else forward.error
        if failed is not None and not getattr(failed, "remote", False):  # else the next one tells what is wrong there
            report["next"] = str(failed) or type(failed).__name__
        self._stream.put_json(REPORT, report)
        self._stream.flush()

    def _listener(self) -> socket.socket:
        """Return what listens; the process of the copy before, which has the port, may be about to end."""
        deadline = time.monotonic() + _PORT_LIMIT
        while True:
            try:
                return self._bound()
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _bound(self) -> socket.socket:
        address = self._request["address"]
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, self._request["port"]))
            listener.listen(4)
        except OSError:
            listener.close()
            raise
        return listener

    def _take(self, listener: socket.socket, report: Dict[str, Any]) -> None:
        counter = ByteCounter()
        try:
            if self._is_first:
                path = self._receive(self._stream, counter)
            else:
                with self._accepted(listener) as connection:
                    listener.close()
                    path = self._receive(SecureStream(connection, self._is_manager_gone), counter)
            report["path"], report["sent"] = os.fsdecode(path), bool(counter.sent)
        except CopyError as error:
            if error.remote:
                self.file.abort(error)
            report["error"], report["remote"] = error.message_to_send(), error.remote
        except (StreamClosedError, OSError) as error:
            if self._is_first:
                raise
            report["lost"] = str(error) or type(error).__name__

    def _is_manager_gone(self) -> bool:
        """Tell if the manager has hung up: it says nothing while something comes from the host before."""
        return not self._is_first and self._stream.readable_or_ended()

    def _is_over(self) -> bool:
        """Tell if nobody waits for what is forwarded."""
        return self.file.is_lost or (self._only_forwards and self._stream.readable_or_ended())

    def _receive(self, stream: FrameStream, counter: ByteCounter) -> bytes:
        return _DirectReceiver(stream, self, lambda _, name: self._destination(name), counter, self._parts).run()

    def _accepted(self, listener: socket.socket) -> ssl.SSLSocket:
        """Return the connection of the host before; whoever else connects is sent away."""
        context, deadline = self._credentials.context(server=True), time.monotonic() + _MEET_LIMIT
        silent: List[socket.socket] = []  # who connects says something first; somebody else may never do that
        listener.setblocking(False)
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise socket.timeout("timed out")
                for ready in select.select([listener, *silent], [], [], left)[0]:
                    if ready is listener:
                        try:
                            silent.append(listener.accept()[0])
                        except BlockingIOError:  # it is gone again
                            continue
                        if len(silent) > _MOST_SILENT:
                            silent.pop(0).close()
                        continue
                    if ready not in silent:
                        continue
                    silent.remove(ready)
                    connection = self._shaken_hands(context, ready)
                    if connection is not None:
                        return connection
        finally:
            for plain in silent:
                plain.close()

    def _shaken_hands(self, context: ssl.SSLContext, plain: socket.socket) -> Optional[ssl.SSLSocket]:
        """Return the connection if it is that of the host before; else it is closed."""
        found = plain
        try:
            plain.settimeout(_HANDSHAKE_LIMIT)
            notice_cuts(plain)
            found = connection = context.wrap_socket(plain, server_side=True)
            check(connection, self._previous)
            return connection
        except OSError:
            found.close()
            return None

    def tell_came(self, size: int) -> None:
        """Tell the manager how much has come; the first host's knows."""
        if not self._is_first:
            self._stream.put_json(CAME, size)
            self._stream.flush()

    def begin_checksum(self) -> None:
        """Compute the checksum of what comes, unless that is done already, or the file comes from the manager."""
        if self._checksum is None and not self._is_first:
            self._checksum = _Checksum(self.file)
            self._checksum.start()

    def have_it_checked(self, path: bytes) -> None:
        """Have the manager compare the file with its own: nobody else says what it is.

        Raises:
            CopyError: It is another one.
        """
        if self._is_first:
            return  # it came from the manager, which compares what it sends
        self.begin_checksum()
        assert self._checksum is not None
        self._checksum.join()
        if self._checksum.error is not None:
            raise CopyError(path, "cannot be read again: {}".format(self._checksum.error))
        self._stream.put_json(CHECK, self._checksum.value)
        self._stream.flush()
        if self._stream.header() != VERDICT:
            raise StreamClosedError("an unexpected frame")
        if not self._stream.message()["same"]:
            raise CopyError(path, OTHER_CONTENTS)
