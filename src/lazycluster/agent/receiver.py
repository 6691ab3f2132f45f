"""The receiving side of a copy, on the host and on the manager. It does not trust the other side."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections import deque
from typing import Any, Callable, Deque, List, NamedTuple, Optional, Tuple

from .directory_tree import DirectoryTree, PartFile
from .holes import beginning_checksum
from .partial_files import WORTH_IT, PartialFile, PartialFiles
from .sender import COMPARE, NOT_WANTED, RESUME, WANTED, digest, identity, what_is
from .stream import (
    ABORT,
    BATCH,
    BEGINNING,
    CHECKSUM,
    DATA,
    DONE,
    END,
    ENTRIES,
    ERROR,
    FROM,
    HOLE,
    LAST,
    LISTED,
    MISSED,
    NEED,
    PROOF,
    PROVE,
    READY,
    SAME,
    START,
    SUMMARY,
    UNUSED,
    WINDOW,
    ByteCounter,
    CopyError,
    FrameStream,
    StreamClosedError,
    raw,
    text,
)

_SECOND = 10**9
_Destination = Callable[[bool, bytes], Tuple[bytes, Optional[bytes], bool]]


class _Wanted(NamedTuple):
    name: bytes
    size: int
    mtime: int
    part: Optional[PartialFile]


class Receiver:
    """Receives a file or directory.

    Args:
        stream: Where from.
        destination: Told whether it is a directory, and its name, makes the directory that it goes to. Returns the path
            of that, the name that a file gets in it, and whether the directory was made for this copy.
        counter: Counts what is done.
        parts: What earlier tries have left; takes what this one leaves.
    """

    def __init__(
        self, stream: FrameStream, destination: _Destination, counter: ByteCounter, parts: Optional[PartialFiles] = None
    ) -> None:
        self._stream = stream
        self._destination = destination
        self._counter = counter
        self._parts = parts
        self._tree: Optional[DirectoryTree] = None
        self._file_name: Optional[bytes] = None
        self._made = False
        self._wanted: Deque[_Wanted] = deque()
        self._part: Optional[PartFile] = None
        self._size = 0
        self._clocks_apart = 0

    def run(self) -> bytes:
        """Receive everything; return the path of the file or directory.

        What of a directory cannot be read there is left out: the counter names it.

        Raises:
            CopyError: If something cannot be written here, or a single file cannot be read there. What was there before
                is untouched.
            StreamClosedError: If the sender has ended.
        """
        try:
            try:
                path = self._receive()
                self._stream.put_json(DONE, {"path": text(path)})
            except StreamClosedError:
                self._keep_part()
                raise
            finally:
                self._release()
        except CopyError as error:
            if not error.remote:
                self._stream.put_json(ERROR, error.message_to_send())
                self._stream.skip_until(ABORT)
            self._stream.put_json(DONE, {})
            self._flush()
            raise
        self._flush()
        return path

    def _flush(self) -> None:
        try:
            self._stream.flush()
        except StreamClosedError:
            pass  # what the copy has come to is known here; the next use of the stream tells that it is gone

    def _keep_part(self) -> None:
        if self._part is None or self._parts is None or self._size < WORTH_IT:
            return
        fd, wanted = self._part.given_up(), self._wanted[0]
        if fd >= 0:
            whole = self._tree_there().whole(wanted.name)
            self._parts.put(PartialFile(whole, wanted.size, wanted.mtime, fd, self._size))

    def _release(self) -> None:
        for wanted in self._wanted:
            if wanted.part is not None and self._parts is not None:
                self._parts.put(wanted.part)
        if self._part is not None:
            self._part.discard()
        if self._tree is not None:
            try:
                self._tree.settle()
            except (CopyError, OSError):
                pass  # an error is being told already: without one, they have been settled before
            self._tree.close()

    def _receive(self) -> bytes:
        frames = {
            ENTRIES: self._entries,
            FROM: self._from,
            DATA: self._data,
            HOLE: self._hole,
            PROVE: self._prove,
            LAST: self._last,
            SAME: self._same,
            LISTED: self._listed,
            UNUSED: self._unused,
            MISSED: self._missed,
        }
        stream = self._stream
        while True:
            kind = stream.header()
            if kind in (ABORT, ERROR):  # ERROR: there is not even a sender
                raise CopyError.received(stream.message())
            if kind == END and self._tree is not None:
                left_out = stream.message(list)
                if self._wanted:
                    raise StreamClosedError("it has ended too early")
                self._counter.left_out += [str(line) for line in left_out[:1000]]
                self._tree.settle()
                return self._tree.whole(self._file_name or b"")
            try:
                if kind == START and self._tree is None:
                    self._start()
                elif kind in frames and self._tree is not None:
                    frames[kind]()
                else:
                    raise StreamClosedError("an unexpected frame ({})".format(kind))
            except (TypeError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
                raise StreamClosedError("a frame that makes no sense: {}".format(error)) from error

    # --- the frames ----------------------------------------------------------------------------
    def _start(self) -> None:
        message = self._stream.message()
        self._clocks_apart = time.time_ns() - int(message["now"])
        path, self._file_name, self._made = self._destination(bool(message["folder"]), raw(message["name"]))
        try:
            self._tree = DirectoryTree(path)
        except OSError as error:
            raise CopyError.of(path, error) from error
        self._stream.put_json(READY, {"identity": identity(os.fstat(self._tree.root))})

    def _listed(self) -> None:
        self._counter.total = _within_64_bits(self._stream.message(int))

    def _unused(self) -> None:
        self._counter.unused = [str(pattern) for pattern in self._stream.message(list)]

    def _entries(self) -> None:
        self._between_files()
        answer = bytearray()
        entries = self._stream.message(list)
        # A sender that waits for answers, as it should, has no more than these open.
        if len(entries) > BATCH or len(self._wanted) > WINDOW * BATCH:
            raise StreamClosedError("more files at once than make sense")
        for entry in entries:
            kind, name, mtime = entry[0], raw(entry[1]), _within_64_bits(entry[2])
            if self._file_name is not None:
                # Whatever a single file is called there, it has one name here.
                kind, name = "f", self._file_name
            try:
                self._entry(kind, name, mtime, entry, answer)
            except OSError as error:
                raise CopyError.of(self._tree_there().whole(name), error) from error
        self._stream.put(NEED, bytes(answer))

    def _entry(self, kind: str, name: bytes, mtime: int, entry: List[Any], answer: bytearray) -> None:
        tree = self._tree_there()
        if kind == "f":
            size = int(entry[4])
            need = self._need(name, size, mtime, int(entry[3]))
            if need[0] == NOT_WANTED:
                self._counter.moved(size)
                self._counter.file(False)
            else:
                part = self._parts.take(tree.whole(name), size, mtime) if need[0] == WANTED and self._parts else None
                if part is not None:
                    need = bytes([RESUME]) + BEGINNING.pack(part.done, beginning_checksum(part.fd, part.done) or 0)
                self._wanted.append(_Wanted(name, size, mtime, part))
            answer += need
        elif kind == "l":
            tree.link(name, raw(entry[3]), mtime)
        elif kind != "d":
            raise CopyError(tree.whole(name), "is refused: neither file, directory nor link")
        elif name:
            tree.folder(name, int(entry[3]), mtime)
        elif self._made:
            tree.settle_root(int(entry[3]), mtime)

    def _from(self) -> None:
        self._between_files()
        start, wanted = int.from_bytes(self._stream.payload(), "big"), self._wanted[0]
        part = wanted.part
        if part is None or start not in (0, part.done):
            raise StreamClosedError("an unexpected frame")
        if not start:
            return
        self._wanted[0] = wanted._replace(part=None)
        try:
            directory, last = self._tree_there().parent(wanted.name)
            self._part = PartFile.taken_up(directory, last, part.fd, part.done)
        except OSError as error:
            os.close(part.fd)
            raise self._failed(error) from error
        self._size = part.done
        self._counter.moved(start)

    def _data(self) -> None:
        if self._part is None:
            self._begin()
        part = self._part
        if part is None:
            return
        for piece in self._stream.pieces():
            self._size += len(piece)
            self._counter.moved(len(piece))
            try:
                part.write(piece)
            except OSError as error:
                raise self._failed(error) from error

    def _hole(self) -> None:
        if self._part is None:
            self._begin()
        count = _within_64_bits(int.from_bytes(self._stream.payload(), "big"))
        self._size += count
        if self._part is not None:
            try:
                self._part.skip(count)
            except OSError as error:
                raise self._failed(error) from error
        self._counter.moved(count)

    def _prove(self) -> None:
        """Tell the checksum of what has come of a file, which has changed there meanwhile."""
        if self._part is None:
            self._begin()
        part = self._part
        if part is None:
            return
        try:
            checksum = beginning_checksum(part.fd, self._size) or 0
            os.lseek(part.fd, self._size, os.SEEK_SET)
        except OSError as error:
            raise self._failed(error) from error
        self._stream.put(PROOF, CHECKSUM.pack(checksum))

    def _last(self) -> None:
        size, mode, mtime = SUMMARY.unpack(self._stream.payload())
        if self._part is None:
            self._begin()
        part, name = self._part, self._tree_there().whole(self._wanted[0].name)
        if self._size != size:
            raise CopyError(name, "was damaged on the way: {} bytes instead of {}".format(self._size, size))
        self._approve(mode, mtime)
        if part is not None:
            try:
                part.complete(mode, mtime)
            except OSError as error:
                raise self._failed(error) from error
        self._part = None
        self._wanted.popleft()
        self._counter.file(True)

    def _approve(self, mode: int, mtime: int) -> None:
        """Raise a `CopyError` if a file that is complete is not to take its place."""

    def _same(self) -> None:
        self._between_files()
        size, mode, mtime = SUMMARY.unpack(self._stream.payload())
        self._approve(mode, mtime)
        try:
            directory, last = self._tree_there().parent(self._wanted[0].name)
            fd = _opened(last, directory)
            try:
                os.fchmod(fd, mode & 0o777)
                # This also sets the time of the last change to now: the time when both were known to be equal.
                os.utime(fd, ns=(mtime, mtime))
            finally:
                os.close(fd)
        except OSError as error:
            raise self._failed(error) from error
        self._wanted.popleft()
        self._counter.moved(size)
        self._counter.file(False)

    def _missed(self) -> None:
        """Go on without what cannot be read there; a file of that name that is here stays as it is."""
        message = self._stream.message()
        if message["wanted"]:
            wanted = self._wanted.popleft()
            if wanted.part is not None:
                os.close(wanted.part.fd)
            if self._part is not None:
                self._part.discard()
                self._part = None
        self._counter.miss(CopyError.received(message))

    # --- files ---------------------------------------------------------------------------------
    def _begin(self) -> None:
        wanted = self._wanted[0]
        name = wanted.name
        self._size = 0
        if wanted.part is not None:  # the sender has not taken it up
            self._wanted[0] = wanted._replace(part=None)
            os.close(wanted.part.fd)
        try:
            tree = self._tree_there()
            directory, last = tree.parent(name)
            self._part = PartFile(directory, last, tree.unnamed)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CopyError:
        return CopyError.of(self._tree_there().whole(self._wanted[0].name), error)

    def _between_files(self) -> None:
        if self._part is not None:
            raise StreamClosedError("a frame in the middle of a file")

    def _tree_there(self) -> DirectoryTree:
        if self._tree is None:
            raise StreamClosedError("an unexpected frame")
        return self._tree

    def _need(self, name: bytes, size: int, mtime: int, mode: int) -> bytes:
        """Return whether a file is wanted, and the digest if that depends on it."""
        tree = self._tree_there()
        directory, last = tree.parent(name)
        try:
            there = os.stat(last, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return bytes([WANTED])
        if stat.S_ISLNK(there.st_mode):
            try:
                target = os.stat(last, dir_fd=directory).st_mode
            except OSError:
                target = stat.S_IFREG
            if stat.S_ISREG(target) or stat.S_ISDIR(target):
                return bytes([WANTED])
            raise CopyError(tree.whole(name), "is a link to {}; it is not replaced".format(what_is(target)))
        if stat.S_ISDIR(there.st_mode):
            raise CopyError(tree.whole(name), "is a directory here and a file there", errno.EISDIR)
        if not stat.S_ISREG(there.st_mode):
            raise CopyError(tree.whole(name), "is {}; it is not replaced".format(what_is(there.st_mode)))
        alike = there.st_size == size and self._time_alike(there, mtime)
        if not alike:
            return bytes([WANTED])
        if alike == COMPARE:
            return self._with_digest(directory, last)
        if stat.S_IMODE(there.st_mode) != mode & 0o777 and not _set_mode(last, directory, there, mode & 0o777):
            return bytes([WANTED])
        return bytes([NOT_WANTED])

    def _time_alike(self, there: os.stat_result, mtime: int) -> int:
        """Return 0 if the times differ, COMPARE if they are equal but prove nothing, else 3."""
        if there.st_mtime_ns != mtime:
            # File systems that keep less than nanoseconds.
            coarse = next((unit for unit in (2 * _SECOND, _SECOND, 1000, 100) if there.st_mtime_ns % unit == 0), 1)
            return COMPARE if coarse > 1 and there.st_mtime_ns == mtime - mtime % coarse else 0
        # The copy was made (its change time, in the sender's clock) so soon after the file was last written that it may
        # have been written again in the same tick of its file system's clock.
        tick = 2 * _SECOND if mtime % _SECOND == 0 else _SECOND // 10
        return COMPARE if there.st_ctime_ns - self._clocks_apart - mtime < tick else 3

    def _with_digest(self, directory: int, name: bytes) -> bytes:
        try:
            fd = _opened(name, directory)
        except PermissionError:
            return bytes([WANTED])
        try:
            return bytes([COMPARE]) + digest(fd)
        finally:
            os.close(fd)


def _opened(name: bytes, directory: int) -> int:
    """Open a file for what has to be of this very file: a name may have become a link since it was looked at."""
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)


def _set_mode(name: bytes, directory: int, there: os.stat_result, mode: int) -> bool:
    """Give a file its mode; return whether that was possible, and it is still the file that was looked at."""
    try:
        fd = _opened(name, directory)
    except OSError:  # replaced by a link, removed, or not readable
        return False
    try:
        same = os.path.samestat(os.fstat(fd), there)
        if same:
            os.fchmod(fd, mode)
        return same
    finally:
        os.close(fd)


def _within_64_bits(value: Any) -> int:
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError("{:.20} as a size or time".format(str(number)))
    return number
