"""Copies of files and directories between the manager and a host.

The work is done by the same code on both sides (`lazycluster.agent`), over streams of their own, so that a large copy
does not stand in the way of the agent's messages. On the manager a copy takes a thread while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazycluster.agent.files import destination, source
from lazycluster.agent.partial_files import PartialFiles
from lazycluster.agent.receiver import Receiver
from lazycluster.agent.sender import REWRITTEN, SHRANK, Sender
from lazycluster.agent.stream import REQUEST, ByteCounter, CopyError, FrameStream, StreamClosedError, raw
from lazycluster.exceptions import ConnectionLostError, LazyclusterError, NoAnswerError, printable

from .connection import Connection
from .extra_sessions import SessionError, SessionRefusedError

__all__ = ["TransferError", "TransferResult", "copy_as_asked", "get", "local_source", "send"]

#: Copies at once, on all connections together: more do not make it faster.
AT_ONCE = 8

#: The same on one connection: sshd limits its sessions.
_AT_ONCE_PER_HOST = 2

#: How long sshd may take to let go of a session that has ended, in seconds.
_LETTING_GO = 3.0

#: How long a cancelled copy is waited for, in seconds.
_PATIENCE = 10.0

_OTHERS_SHOWN = 10
#: For how long nothing at all may come of a host while it is waited for: it says every five seconds that it is busy.
_SILENCE_LIMIT = 60.0

#: For how long it may say that and do nothing else, in seconds: e.g. look through a file of terabytes.
_BUSY_LIMIT = 3600.0
_LOOK_EVERY = 1.0

Progress = Callable[[int, "int | None", int], object]

_HINTS = {
    errno.EACCES: "check the permissions of the path and of the directories above it, for the user that copies",
    errno.EPERM: "check who owns the path, and what the file system allows",
    errno.ENOSPC: "free some space there, or choose another destination; what was there before is unchanged",
    errno.EDQUOT: "free some space there, or choose another destination; what was there before is unchanged",
    errno.ENOTDIR: "remove or rename what is in the way, or choose another destination",
    errno.EISDIR: "remove or rename what is in the way, or choose another destination",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EROFS: "choose a destination that can be written to",
}


class TransferError(LazyclusterError, OSError):
    """A file or directory could not be copied. What was at the destination is unchanged, or completely replaced.

    If it is some files of a directory that could not be read, e.g. since they vanished, all others were copied.

    Attributes:
        host: The host that was copied to or from.
        side: Where it failed: ``manager``, or the host.
        path: The path that it is about, as it is called on that side.
        errno: The number of the system's error there, or None.
        strerror: What is wrong.
        hint: The next step.
        others: What else of the directory was not copied, a line each with the reason; of very many the first.
    """

    others: Sequence[str] = ()

    def __init__(
        self,
        host: str,
        side: str,
        path: str,
        errno: int | None,
        strerror: str,
        hint: str = "",
        others: Sequence[str] = (),
    ) -> None:
        LazyclusterError.__init__(self, host, side, path, errno, strerror, hint)
        self.host = host
        self.side = side
        self.path = path
        self.errno = errno
        self.strerror = strerror
        self.hint = hint
        if others:
            self.others = tuple(others)

    def __str__(self) -> str:
        where = "the manager" if self.side == "manager" else self.side
        lines = [f"{self.host}: cannot copy: {_shown(self.path)} on {where}: {printable(str(self.strerror))}"]
        lines += [f"  nor {other}" for other in self.others[:_OTHERS_SHOWN]]
        if len(self.others) > _OTHERS_SHOWN:
            lines.append(f"  nor {len(self.others) - _OTHERS_SHOWN} others")
        if self.hint:
            lines.append(f"  Next step: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.host, self.side, self.path, self.errno, self.strerror, self.hint, self.others)


def _shown(path: str) -> str:
    # Names may hold anything: what a terminal cannot show is shown escaped.
    path = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return path if path.isprintable() else repr(path)


@dataclass(frozen=True)
class TransferResult:
    """Result of a copy.

    Attributes:
        path: The path of the file or directory on the receiving side.
        files: How many files the copy consists of.
        bytes: Their bytes.
        sent: How many of the files were sent.
        skipped: How many of them were there already, unchanged.
        seconds: How long it took.
        left_out: What is neither file, directory nor link, with its kind: it is not copied.
        unused: Those of the patterns in `exclude` that left nothing out.
    """

    path: str
    files: int
    bytes: int
    sent: int
    skipped: int
    seconds: float
    left_out: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


async def send(
    connection: Connection,
    local_path: str | os.PathLike[str],
    remote_path: str | os.PathLike[str] | None = None,
    *,
    cwd: str,
    env: Mapping[str, str],
    progress: Progress | None = None,
    exclude: Sequence[str] = (),
) -> TransferResult:
    """Copy a file or directory to a host, with permissions, times and symbolic links. Unchanged files are not sent.

    Args:
        connection: The host.
        local_path: File or directory; `~` and variables are expanded. A link is followed, one in a directory is kept.
        remote_path: Where to; None: the same name in `cwd`. A file goes into a directory that exists, or if this ends
            with a slash. A directory is merged into one that exists; with a slash at the end it goes into it.
        cwd: Directory on the host that a relative `remote_path` starts at; made if it does not exist.
        env: Variables that may stand in `remote_path`, beside those of the host.
        progress: Called from another thread with the bytes done, the bytes in all (None while they are not known) and
            the files done.
        exclude: What to leave out of a directory: patterns of names, or with a slash in it of paths, below the
            directory or from the current one: ``*.pyc``, ``data/raw``, ``./data``.

    Returns:
        What was done.

    Raises:
        ValueError: If `local_path` is empty.
        TransferError: If something cannot be read or written.
        ConnectionLostError: If the connection has ended.
    """
    local = _local(local_path, "local_path")
    request = {"op": "send", "path": _remote(remote_path), "cwd": cwd, "env": dict(env)}
    here = os.getcwdb()

    def copy(stream: FrameStream, counter: ByteCounter) -> str:
        patterns = [os.fsencode(name) for name in exclude]
        sender = Sender(stream, lambda: source(local, here, {}), counter, patterns, here)
        return str(sender.run().get("path", ""))

    return await _Copy(connection, request, copy, os.fspath(local_path), progress, exclude).run()


async def get(
    connection: Connection,
    remote_path: str | os.PathLike[str],
    local_path: str | os.PathLike[str] | None = None,
    *,
    cwd: str,
    env: Mapping[str, str],
    progress: Progress | None = None,
    exclude: Sequence[str] = (),
) -> TransferResult:
    """Copy a file or directory from a host: `send` in the other direction.

    Args:
        connection: The host.
        remote_path: File or directory on the host.
        local_path: Where to; None: the same name in the current directory. See `send`.
        cwd: Directory on the host that a relative `remote_path` starts at.
        env: Variables that may stand in `remote_path`, beside those of the host.
        progress: See `send`.
        exclude: See `send`; paths are those of the host, from `cwd` there.

    Returns:
        What was done.

    Raises:
        ValueError: If `remote_path` is empty.
        TransferError: If something cannot be read or written.
        ConnectionLostError: If the connection has ended.
    """
    remote = _remote(remote_path)
    if not remote:
        raise ValueError("remote_path is empty: name the file or directory on the host")
    local = None if local_path is None else _local(local_path, "local_path")
    request = {"op": "get", "path": remote, "cwd": cwd, "env": dict(env), "exclude": list(exclude)}
    here = os.getcwdb()
    asked = os.path.basename(raw(remote).rstrip(b"/"))

    def place(folder: bool, name: bytes) -> tuple[bytes, bytes | None, bool]:
        # The host chooses a name only where the path that was asked for has none.
        plain = asked not in (b"", b".", b"..") and b"$" not in asked and not asked.startswith(b"~")
        return destination(local, here, {}, folder, asked if plain else name, chosen=not plain and name != asked)

    def copy(stream: FrameStream, counter: ByteCounter) -> str:
        return os.fsdecode(Receiver(stream, place, counter, parts).run())

    parts = PartialFiles()
    try:
        return await _Copy(connection, request, copy, remote, progress, exclude).run()
    finally:
        parts.close()


async def copy_as_asked(
    connection: Connection,
    request: dict[str, Any],
    copy: Callable[[FrameStream, ByteCounter], str],
    path: str,
    progress: Progress | None = None,
) -> TransferResult:
    """Have a process on the host do something about files, however many are at work already.

    Args:
        connection: The host.
        request: What it is asked for.
        copy: Does this side's part, in a thread of its own; returns the path on the receiving side. It is called again
            if the process has ended before it said anything.
        path: What is copied, for messages.
        progress: See `send`.

    Raises:
        TransferError, ConnectionLostError: See `send`.
    """
    return await _Copy(connection, request, copy, path, progress, (), is_limited=False).run()


def local_source(local_path: str | os.PathLike[str]) -> Callable[[], tuple[bytes, bytes]]:
    """Return what finds a file or directory on this machine: its path, and its name.

    Raises:
        ValueError: If the path is empty.
    """
    local, here = _local(local_path, "local_path"), os.getcwdb()
    return lambda: source(local, here, {})


def _local(path: str | os.PathLike[str], name: str) -> bytes:
    if not os.fspath(path):
        raise ValueError(f"{name} is empty: name a file or directory")
    if "\0" in os.fspath(path):
        raise ValueError(f"{name} contains a null character: {path!r}")
    return os.fsencode(path)


def _remote(path: str | os.PathLike[str] | None) -> str | None:
    if path is not None and "\0" in os.fspath(path):
        raise ValueError(f"remote_path contains a null character: {path!r}")
    return None if path is None else os.fspath(path)


_pools: weakref.WeakKeyDictionary[Connection, _StreamPool] = weakref.WeakKeyDictionary()
_limits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


@dataclass
class _Copy:
    """One copy, from the side of the event loop."""

    connection: Connection
    request: dict[str, Any] = field(repr=False)  # may hold a key
    copy: Callable[[FrameStream, ByteCounter], str]
    path: str
    progress: Progress | None
    exclude: Sequence[str]
    is_limited: bool = True

    async def run(self) -> TransferResult:
        self.connection.check()
        pool = _pools.get(self.connection)
        if pool is None:
            pool = _pools[self.connection] = _StreamPool(self.connection)
        limit: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
        if self.is_limited:
            limit = _limits.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE))
        began = time.monotonic()
        while True:
            # Of a link that is silent already nothing is counted when it drops as well.
            interruptions = self.connection.interruptions if self.connection.state == "open" else -1
            attempted = asyncio.get_running_loop().time()
            try:
                async with pool.slots, limit:
                    work = await self._attempt(pool)
                break
            except (StreamClosedError, ConnectionLostError, NoAnswerError) as error:
                # When a link that has dropped is back, the copy goes on with the files that are not there yet.
                await self.connection.wait_until_it_answers()
                if self.connection.interruptions == interruptions:
                    explained = self._explained(error, self.connection.problem_since(attempted))
                    raise explained from explained.__cause__
        counter = work.counter
        return TransferResult(
            work.path, counter.files, counter.bytes, counter.sent, counter.skipped, time.monotonic() - began,
            tuple(counter.left_out), tuple(pattern for pattern in self.exclude if pattern in counter.unused),
        )  # fmt: skip

    async def _attempt(self, pool: _StreamPool) -> CopyAttempt:
        while True:
            self.connection.check()
            sock, used = await pool.take(self.connection)
            work = CopyAttempt(self, sock)
            try:
                await work.run()
            finally:
                if work.ended.is_set():  # else a thread that cannot be ended still has it
                    pool.give_back(sock, work.usable)
            if work.error is None and work.counter.missed:
                raise self._incomplete(work.counter)
            if work.error is None:
                return work
            if not isinstance(work.error, StreamClosedError):
                explained = self._explained(work.error)
                raise explained from explained.__cause__  # it says all that the other one does
            if not used or work.answered:
                raise work.error
            # The process on the host had ended while it was idle.

    def _explained(self, error: BaseException, problem: str = "") -> BaseException:
        host = self.connection.host
        if isinstance(error, CopyError):
            side = host if error.remote else "manager"
            path = os.fsdecode(error.path)
            return TransferError(host, side, path, error.errno, error.message, self._hint(error))
        if isinstance(error, SessionError):
            return TransferError(host, host, self.path, None, error.detail, error.hint)
        if isinstance(error, StreamClosedError):
            self.connection.check()
            return TransferError(
                host, host, self.path, None,
                problem or f"the process that copies files on the host has ended: {error}",
                "what was there before is unchanged; copy it again",
            )  # fmt: skip
        return error

    def _incomplete(self, counter: ByteCounter) -> TransferError:
        """Return the error about the files of a directory that could not be sent; the others have arrived."""
        first, *more = counter.missed
        others = [f"{_shown(os.fsdecode(error.path))}: {printable(error.message)}" for error in more]
        if counter.missed_count > len(counter.missed):
            others.append(f"{counter.missed_count - len(counter.missed)} more")
        hint = "the other files of the directory have arrived; copy it again for these, or exclude them"
        path = os.fsdecode(first.path)
        host = self.connection.host
        side = host if first.remote else "manager"
        return TransferError(host, side, path, first.errno, first.message, hint, others)

    def _hint(self, error: CopyError) -> str:
        if error.message in (SHRANK, REWRITTEN):
            return "copy it again when nothing else writes to it; a file that only grows can be copied at any time"
        if error.errno == errno.ENOENT:
            there = printable(str(self.request["cwd"] or "the home directory"))
            start = f"{there} there" if error.remote else "the current directory here"
            return f"check the path; relative ones start at {start}"
        return _HINTS.get(error.errno or 0, "")


class CopyAttempt:
    """One attempt at a copy, in a thread of its own."""

    def __init__(self, copy: _Copy, sock: socket.socket) -> None:
        self._copy = copy
        self._sock = sock
        self.ended = asyncio.Event()
        self._stream: FrameStream | None = None
        self._loop = asyncio.get_running_loop()
        self.counter = ByteCounter(copy.progress)
        self.error: BaseException | None = None
        self.path = ""
        self.answered = False
        self.usable = False

    async def run(self) -> None:
        """Have it done; a cancelled one is ended and cleaned up on both sides before this returns."""
        thread = threading.Thread(target=self._work, name=f"copy {self._copy.connection.host}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # there are too many, or no memory for its stack
            self.ended.set()
            text = f"no thread can be started for the copy: {error}"
            raise TransferError(self._copy.connection.host, "manager", self._copy.path, None, text) from None
        try:
            await self._watch()
        except (asyncio.CancelledError, NoAnswerError):
            _hang_up(self._sock)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.ended.wait(), _PATIENCE)
            self.usable = False
            raise

    async def _watch(self) -> None:
        """Wait for the end, as long as the host does its part of it.

        Raises:
            NoAnswerError: If it does not.
        """
        connection, sign, moved = self._copy.connection, -1, -1
        silent = idle = 0.0
        while not self.ended.is_set():
            began = self._loop.time()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.ended.wait(), _LOOK_EVERY)
            passed = min(self._loop.time() - began, 2 * _LOOK_EVERY)  # else it was this process that slept
            stream, before = self._stream, (sign, moved)
            if stream is None:
                continue
            sign, moved = stream.moved + _unread(self._sock), stream.moved - stream.signs
            waits = stream.waits and connection.state == "open"
            silent = silent + passed if waits and sign == before[0] else 0.0
            idle = idle + passed if waits and moved == before[1] else 0.0
            for passed, limit in ((silent, _SILENCE_LIMIT), (idle, _BUSY_LIMIT)):
                if passed >= limit:
                    raise NoAnswerError(connection.host, f"the process there to go on with {self._copy.path}", limit)

    def _work(self) -> None:
        try:
            stream = self._stream = FrameStream(self._sock.fileno(), self._sock.fileno())
            try:
                stream.put_json(REQUEST, self._copy.request)
                self.path = self._copy.copy(stream, self.counter)
                self.counter.finish()
                self.usable = True
            except CopyError as error:
                self.usable = True
                self.error = error
            finally:
                self.answered = stream.received
        except BaseException as error:  # noqa: BLE001  (raised where the copy is waited for)
            self.error = error
        with contextlib.suppress(RuntimeError):  # the event loop has been closed
            self._loop.call_soon_threadsafe(self.ended.set)


def _unread(sock: socket.socket) -> int:
    """Return how many bytes have come that were not read yet."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))[0])
    except OSError:
        return 0


# --- streams --------------------------------------------------------------------------------------
class _StreamPool:
    """The streams of one connection that wait for the next copy."""

    def __init__(self, connection: Connection) -> None:
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._opening = asyncio.Lock()
        self._returned = asyncio.Event()
        self._last_closed = -_LETTING_GO
        self.slots = asyncio.Semaphore(_AT_ONCE_PER_HOST)
        connection.at_close.append(self.close)
        connection.on_lost.append(lambda _: self.close())

    async def take(self, connection: Connection) -> tuple[socket.socket, bool]:
        """Return a stream, and whether it has been used before."""
        # One at a time: so who is refused knows whether another copy here has what could be waited for.
        async with self._opening:
            while True:
                sock = self._take_idle()
                if sock is not None:
                    return sock, True
                try:
                    sock = await connection.open_copy_stream()
                except (LazyclusterError, SessionRefusedError):
                    connection.check()
                    if not await self._session_may_come():
                        raise
                else:
                    self._busy.add(sock)
                    return sock, False

    def _take_idle(self) -> socket.socket | None:
        while self._idle:
            sock = self._idle.pop()
            # It says nothing while it is idle: what can be read is its end.
            waiting = select.poll()
            waiting.register(sock, select.POLLIN)
            if not waiting.poll(0):
                self._busy.add(sock)
                return sock
            sock.close()
            self._last_closed = time.monotonic()
        return None

    async def _session_may_come(self) -> bool:
        """Wait while the host may still grant one though it has just refused it; return whether it may."""
        if self._idle:
            return True  # another copy has given its own back meanwhile
        if self._busy:
            # It allows fewer sessions than we would like.
            self._returned.clear()
            await self._returned.wait()
            return True
        if time.monotonic() - self._last_closed < _LETTING_GO:
            # It may not have noticed yet that one has ended, and does not say when it has.
            await asyncio.sleep(0.05)
            return True
        return False

    def give_back(self, sock: socket.socket, usable: bool) -> None:
        """Keep a stream for the next copy, or close it."""
        if sock in self._busy and usable:
            self._idle.append(sock)
        else:
            sock.close()
            self._last_closed = time.monotonic()
        self._busy.discard(sock)
        self._returned.set()

    def close(self) -> None:
        """Close the idle streams; those in use end, and are closed by who uses them."""
        while self._idle:
            self._idle.pop().close()
        for sock in self._busy:
            _hang_up(sock)
        self._busy.clear()
        self._returned.set()


def _hang_up(sock: socket.socket) -> None:
    """End a stream that a thread may be using; the descriptor stays."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
