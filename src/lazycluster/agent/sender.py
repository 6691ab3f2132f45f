"""The sending side of a copy, on the host and on the manager."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from .directory_tree import DirectoryTree
from .holes import beginning_checksum, extents, filled_blocks
from .path_expansion import Exclusion
from .stream import (
    ABORT,
    BATCH,
    BATCH_TEXT,
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
    text,
)

DIGEST_SIZE = 16
WANTED, NOT_WANTED, COMPARE, RESUME = 1, 0, 2, 3

_MOST_LEFT_OUT = 100
_FIRST_BATCH = 48
_SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}

#: What is said of a file whose contents cannot be told as they were when it was opened.
SHRANK = "shrank while it was being copied"
REWRITTEN = "was rewritten while it was being copied"
VANISHED = "vanished while its directory was being copied"

# Path, for messages; its name in the directory; size.
_File = Tuple[bytes, bytes, int]
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def what_is(mode: int) -> str:
    """Return what a file of a mode is, in words."""
    return _SPECIAL.get(stat.S_IFMT(mode), "neither file nor directory")


def digest(fd: int) -> bytes:
    """Return the digest of an open file."""
    from hashlib import blake2b

    state = blake2b(digest_size=DIGEST_SIZE)
    for place, block in filled_blocks(fd):
        state.update(place.to_bytes(8, "big"))
        state.update(block)
    return state.digest()


def identity(inode: os.stat_result) -> List[Any]:
    """Return what makes a directory the same one, also across containers of one machine."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = os.uname().nodename
    return [boot, inode.st_dev, inode.st_ino]


class Sender:
    """Sends a file or directory.

    Args:
        stream: Where to.
        find: Returns the source's path, and the name that it goes by if the destination gives none.
        counter: Counts what is done.
        exclude: Patterns of what is left out of a directory; see `path_expansion.Pattern`.
        cwd: What paths in these are relative to, beside the directory.
        env: Variables that may stand in them.
    """

    def __init__(
        self,
        stream: FrameStream,
        find: Callable[[], Tuple[bytes, bytes]],
        counter: ByteCounter,
        exclude: Sequence[bytes] = (),
        cwd: bytes = b"",
        env: Optional[Mapping[str, str]] = None,
    ) -> None:
        self._patterns, self._cwd, self._env = exclude, cwd, env or {}
        self._stream = stream
        self._find = find
        self._counter = counter
        self._answers: Deque[bytes] = deque()
        self._ready: Optional[Dict[str, Any]] = None
        self._done: Optional[Dict[str, Any]] = None
        self._proof: Optional[int] = None
        self._listed = 0
        self._is_folder = False
        # Names lead from the root through real directories only: others may put links in their place meanwhile. One
        # tree to look what there is, one to read it from, since either is somewhere else most of the time.
        self._excluded: Optional[Exclusion] = None
        self._looked: Optional[DirectoryTree] = None
        self._read: Optional[DirectoryTree] = None

    def run(self) -> Dict[str, Any]:
        """Send everything; return what the receiver says of it.

        What of a directory cannot be read is left out: the counter names it.

        Raises:
            CopyError: If a single file cannot be read here, or something cannot be written there.
            StreamClosedError: If the receiver has ended.
        """
        try:
            return self._copy()
        except CopyError as error:
            self._stream.put_json(ABORT, {} if error.remote else error.message_to_send())
            if self._done is None:
                self._stream.skip_until(DONE)
            raise
        finally:
            for tree in (self._looked, self._read):
                if tree is not None:
                    tree.close()

    def _copy(self) -> Dict[str, Any]:
        path, name = self._find()
        source = self._found(path)
        self._is_folder = folder = stat.S_ISDIR(source.st_mode)
        excluded = self._excluded = Exclusion(self._patterns, path, self._cwd, self._env)
        self._stream.put_json(START, {"folder": folder, "name": text(name), "now": time.time_ns()})
        waiting: Deque[List[_File]] = deque()
        for entries, files in self._batches(path, source, folder):
            self._stream.put_json(ENTRIES, entries)
            self._stream.flush()
            waiting.append(files)
            while len(waiting) == WINDOW or (waiting and self._stream.readable()):
                self._answer(waiting.popleft())
        self._stream.put_json(LISTED, self._listed)
        self._counter.total = self._listed
        self._counter.unused = [text(pattern) for pattern in excluded.unused]
        if self._counter.unused:
            self._stream.put_json(UNUSED, self._counter.unused)
        while waiting:
            self._answer(waiting.popleft())
        self._stream.put_json(END, self._counter.left_out)
        while self._done is None:
            self._take()
        return self._done

    def _found(self, path: bytes) -> os.stat_result:
        """Return what is to be sent; a directory is held open."""
        try:
            # A link that is named is followed; those inside a directory are sent as links.
            source = os.stat(path)
            if stat.S_ISDIR(source.st_mode):
                self._looked, self._read = DirectoryTree(path), DirectoryTree(path)
                return os.fstat(self._looked.root)
        except OSError as error:
            if os.path.islink(path) and not os.path.exists(path):
                raise CopyError(path, "a symbolic link to nothing", error.errno) from error
            raise CopyError.of(path, error) from error
        if not stat.S_ISREG(source.st_mode):
            raise CopyError(path, "is {}, not a file or directory".format(what_is(source.st_mode)))
        return source

    # --- what there is -------------------------------------------------------------------------
    def _batches(
        self, path: bytes, source: os.stat_result, folder: bool
    ) -> Iterator[Tuple[List[List[Any]], List[_File]]]:
        entries: List[List[Any]] = []
        files: List[_File] = []
        # The first ones are small, so that the other side has something to do soon.
        most = _FIRST_BATCH
        length = 0
        one = [(_entry(b"", source), os.path.realpath(path), b"")]
        for entry, where, name in self._folder(path, source) if folder else one:
            entries.append(entry)
            if entry[0] == "f":
                files.append((where, name, entry[4]))
                self._listed += entry[4]
            length += len(entry[1]) + (len(entry[3]) if entry[0] == "l" else 0)
            if len(entries) == most or length > BATCH_TEXT:
                yield entries, files
                entries, files, length = [], [], 0
                most = min(BATCH, most * 2)
        if entries:
            yield entries, files

    def _folder(self, root: bytes, inode: os.stat_result) -> Iterator[Tuple[List[Any], bytes, bytes]]:
        while self._ready is None:
            self._take()
        destination = self._ready.get("identity")
        here = identity(inode)[0]
        pending = [(root, b"", inode)]
        while pending:
            path, relative, inode = pending.pop()
            if [here, inode.st_dev, inode.st_ino] == destination:
                if not relative:
                    raise CopyError(path, "is the destination, too: a directory cannot be copied onto itself")
                raise CopyError(path, "is the destination: a directory cannot be copied into itself")
            yield _entry(relative, inode), path, relative
            prefix = relative + b"/" if relative else b""
            try:
                assert self._looked is not None
                directory = self._looked.directory(relative)
                with os.scandir(directory) as found:
                    for child in found:
                        name = prefix + os.fsencode(child.name)
                        where = os.path.join(root, name)
                        seen = self._child(child, name, directory, where)
                        if isinstance(seen, list):
                            yield seen, where, name
                        elif seen is not None:
                            pending.append((where, name, seen))
            except (OSError, CopyError) as error:
                missed = _unreadable(path, error) if isinstance(error, OSError) else error
                if not relative:
                    raise missed from None
                self._miss(missed)

    def _miss(self, error: CopyError, wanted: bool = False) -> None:
        """Go on without a file or directory; the receiver learns of it, and whether it was waiting for it."""
        self._counter.miss(error)
        self._stream.put_json(MISSED, {**error.message_to_send(), "wanted": wanted})

    def _child(
        self, child: "os.DirEntry[str]", name: bytes, directory: int, where: bytes
    ) -> Union[List[Any], os.stat_result, None]:
        """Return an entry, or the inode of a directory; nothing for what has just been removed or cannot be sent."""
        if self._excluded is not None and self._excluded(name):
            return None
        try:
            inode = child.stat(follow_symlinks=False)
            if stat.S_ISDIR(inode.st_mode):
                return inode
            if stat.S_ISREG(inode.st_mode):
                return _entry(name, inode)
            if stat.S_ISLNK(inode.st_mode):
                return ["l", text(name), inode.st_mtime_ns, text(os.readlink(os.path.basename(name), dir_fd=directory))]
        except FileNotFoundError:
            return None
        except OSError as error:
            self._miss(CopyError.of(where, error))
            return None
        if len(self._counter.left_out) < _MOST_LEFT_OUT:
            self._counter.left_out.append("{} is {}".format(text(where), what_is(inode.st_mode)))
        return None

    # --- what is wanted ------------------------------------------------------------------------
    def _take(self) -> None:
        """Read one frame of the receiver."""
        kind = self._stream.header()
        if kind == NEED:
            self._answers.append(self._stream.payload())
            if len(self._answers) > WINDOW:
                raise StreamClosedError("more answers than questions")
        elif kind == READY:
            self._ready = self._stream.message()
        elif kind == PROOF:
            try:
                (self._proof,) = CHECKSUM.unpack(self._stream.payload())
            except struct.error as error:
                raise StreamClosedError("a frame that makes no sense: {}".format(error)) from error
        elif kind == ERROR:
            raise CopyError.received(self._stream.message())
        elif kind == DONE:
            self._done = self._stream.message()
        else:
            raise StreamClosedError("an unexpected frame ({})".format(kind))

    def _answer(self, files: List[_File]) -> None:
        """Send of a batch what the receiver wants."""
        while not self._answers:
            self._take()
        needs = self._answers.popleft()
        at = 0
        for path, name, size in files:
            need = needs[at] if at < len(needs) else NOT_WANTED
            at += 1
            if need == COMPARE:
                theirs = needs[at : at + DIGEST_SIZE]
                at += DIGEST_SIZE
            there = None
            if need == RESUME:
                if at + BEGINNING.size > len(needs):
                    raise StreamClosedError("an answer that is too short")
                there = BEGINNING.unpack_from(needs, at)
                at += BEGINNING.size
            if need == NOT_WANTED:
                self._counter.moved(size)
                self._counter.file(False)
                continue
            try:
                self._open_and_send(path, name, theirs if need == COMPARE else None, there)
            except CopyError as error:
                if error.remote or not self._is_folder:
                    raise
                self._miss(error, wanted=True)

    def _open_and_send(
        self, path: bytes, name: bytes, theirs: Optional[bytes], there: Optional[Tuple[int, int]]
    ) -> None:
        try:
            fd = self._opened(path, name)
            try:
                self._send_file(fd, path, theirs, there)
            finally:
                os.close(fd)
        except OSError as error:
            raise (_unreadable(path, error) if self._is_folder else CopyError.of(path, error)) from error

    def _opened(self, path: bytes, name: bytes) -> int:
        if self._read is None:
            return os.open(path, _READ)
        directory, last = self._read.parent(name)
        return os.open(last, _READ, dir_fd=directory)

    def _send_file(
        self, fd: int, path: bytes, theirs: Optional[bytes], there: Optional[Tuple[int, int]] = None
    ) -> None:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise CopyError(path, "was replaced by something that is not a file while it was being sent")
        same = theirs is not None and digest(fd) == theirs
        if same:
            self._counter.moved(before.st_size)
        else:
            start = 0
            if there is not None:
                start = there[0] if there[0] <= before.st_size and beginning_checksum(fd, there[0]) == there[1] else 0
                self._stream.put(FROM, start.to_bytes(8, "big"))
                self._counter.moved(start)
            left = self._send_content(fd, start, before.st_size)
            self._check(fd, path, before, left)
            self._approve(path)
        summary = SUMMARY.pack(before.st_size, stat.S_IMODE(before.st_mode), before.st_mtime_ns)
        self._stream.put(SAME if same else LAST, summary)
        self._counter.file(not same)

    def _approve(self, path: bytes) -> None:
        """Raise a `CopyError` if a file that was sent is not to take its place."""

    def _send_content(self, fd: int, start: int, end: int) -> int:
        """Send a part of a file; return how much of it could not be read."""
        for hole, data in extents(fd, start, end):
            if hole:
                self._stream.put(HOLE, hole.to_bytes(8, "big"))
                self._counter.moved(hole)
            left = self._send_data(fd, data)
            start += hole + data - left
            if left:
                break
        return end - start

    def _send_data(self, fd: int, left: int) -> int:
        stream = self._stream
        while left:
            room = stream.room(left)
            count = os.readv(fd, [room])
            if not count:
                break
            stream.fill(DATA, count)
            left -= count
            self._counter.moved(count)
            while stream.readable():
                self._take()
        return left

    def _check(self, fd: int, path: bytes, before: os.stat_result, left: int) -> None:
        """Check that what was sent is what the file held when it was opened, also if it has grown since.

        Args:
            fd: The file.
            path: Its path.
            before: Its inode as it was then.
            left: How many of its bytes could not be read.
        """
        more = not before.st_size and bool(os.read(fd, 1))
        after = os.fstat(fd)
        if after.st_size < before.st_size:
            raise CopyError(path, SHRANK)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            if left or beginning_checksum(fd, before.st_size) != self._checksum_there():
                raise CopyError(path, REWRITTEN)
        elif left or more:
            raise CopyError(path, "is generated by the system and has no size: print it with a command")

    def _checksum_there(self) -> int:
        """Return the checksum of what has come of the file that is being sent."""
        self._proof = None
        self._stream.put(PROVE)
        while self._proof is None:
            self._take()
        return self._proof


def _unreadable(path: bytes, error: OSError) -> CopyError:
    """Return the error about what was there when its directory was listed."""
    return CopyError(path, VANISHED, error.errno) if error.errno == errno.ENOENT else CopyError.of(path, error)


def _entry(name: bytes, inode: os.stat_result) -> List[Any]:
    kind = "d" if stat.S_ISDIR(inode.st_mode) else "f"
    return [kind, text(name), inode.st_mtime_ns, stat.S_IMODE(inode.st_mode), inode.st_size]
