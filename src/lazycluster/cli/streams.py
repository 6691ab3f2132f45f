"""Standard streams of a command on many hosts: its output line by line, gathered or as JSON, and one input for all."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import json
import os
import stat
import sys
import tempfile
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lazycluster.core import event_loop, interruptible
from lazycluster.exceptions import LazyclusterError, one_line, printable
from lazycluster.ssh.terminal import is_asking, when_answered

from .console import OutputGoneError, errors, host_style, lines_of, output
from .fanout import HostOutcome
from .options import fold

if TYPE_CHECKING:
    from lazycluster.ssh.channel import Channel
    from lazycluster.ssh.connection import Connection

__all__ = ["Printer", "SharedInput", "printer"]

T = TypeVar("T")

_QUEUED = 4 * 1024 * 1024  # bytes; then the hosts are not listened to until they are printed
_LONGEST_LINE = 64 * 1024
_KEPT = 64 * 1024 * 1024  # bytes of a host's output that are kept for the end
_PART = 256 * 1024
_AHEAD = 64 * 1024 * 1024  # bytes that are read before the slowest host has taken them


def printer(kind: str, hosts: Sequence[str], label: bool) -> Printer:
    """Return the printer for ``lines``, ``gather`` or ``json``."""
    if kind == "json":
        return _JsonPrinter()
    return _Gathered() if kind == "gather" else _Lines(hosts, label)


class Printer(abc.ABC):
    """Takes output on the loop's thread, and prints it on the main thread, which Ctrl-C and SIGPIPE reach."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Any, bytes]] = deque()
        self._size = 0
        self._closed = False
        self._held = 0
        self._change = interruptible.Condition()
        self._connections: set[Connection] = set()

    # --- on the loop's thread ------------------------------------------------------------------
    @abc.abstractmethod
    def output(self, host: str, data: bytes) -> None:
        """Take what a command wrote to its standard output."""

    @abc.abstractmethod
    def errors(self, host: str, data: bytes) -> None:
        """Take what a command wrote to its standard error."""

    @abc.abstractmethod
    def done(self, outcome: HostOutcome) -> None:
        """Take the end of a host's work."""

    def put(self, stream: Any, data: bytes) -> None:
        """Print something on the main thread. While too much is not yet printed, the hosts are held back.

        Behind an open question nothing is printed, unless it is very much.
        """
        if is_asking() and self._held < _QUEUED:
            self._held += len(data)
            when_answered(lambda: self._put(stream, data))
        else:
            self._put(stream, data)

    def _put(self, stream: Any, data: bytes) -> None:
        with self._change:
            if self._closed:
                return
            self._queue.append((stream, data))
            self._size += len(data)
            full = self._size >= _QUEUED
            self._change.notify_all()
        if full:
            self._steer_soon()

    @contextlib.contextmanager
    def reading(self, connection: Connection) -> Iterator[None]:
        """Hold a host back while too much is not yet printed. The loop goes on, so that no host takes us for dead."""
        self._connections.add(connection)
        self._steer()
        try:
            yield
        finally:
            self._connections.discard(connection)
            connection.hold(False)

    def _steer(self) -> None:
        full = self._size >= _QUEUED and not self._closed
        for connection in self._connections:
            connection.hold(full)

    def _steer_soon(self) -> None:
        event_loop.get_loop().call_soon_threadsafe(self._steer)

    # --- on the main thread --------------------------------------------------------------------
    def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and print what comes meanwhile.

        Raises:
            OutputGoneError: If nobody reads it any more; the work was ended.
            KeyboardInterrupt: Likewise.
        """
        future = event_loop.submit(work)
        future.add_done_callback(lambda _: self._wake())
        try:
            while self._print_some(future):
                pass
        except BaseException as error:
            with self._change:
                self._closed = True
            self._steer_soon()
            future.cancel()
            future.wait(30)
            if isinstance(error, BrokenPipeError):
                raise OutputGoneError from None
            raise
        return future.result()

    def _wake(self) -> None:
        with self._change:
            self._change.notify_all()

    def _print_some(self, future: concurrent.futures.Future[Any]) -> bool:
        with self._change:
            self._change.wait_for(lambda: self._queue or future.done())
            items, full = list(self._queue), self._size >= _QUEUED
            self._queue.clear()
            self._size = 0
        if full:
            self._steer_soon()
        for stream, data in items:
            stream.buffer.write(data)
        for stream in {id(stream): stream for stream, _ in items}.values():
            stream.flush()
        return bool(items) or not future.done()

    def finish(self, outcomes: Sequence[HostOutcome]) -> None:  # noqa: B027  (what comes at once needs none)
        """Print what is left for the end."""


def _told(outcome: HostOutcome) -> str:
    """Return the error of a host whose work failed, else nothing."""
    if outcome.error:
        return outcome.error
    if outcome.status > 128:
        return f"ended by signal {outcome.status - 128}"
    return f"exit status {outcome.status}" if outcome.status else ""


def _say(outcome: HostOutcome) -> None:
    told = _told(outcome)
    if told:
        out = errors()
        first, *rest = lines_of(told)
        out.print(f"[bold red]{outcome.host}:[/]", end=" ", soft_wrap=True)
        out.print(first, markup=False, soft_wrap=True, style="red" if outcome.error else None)
        for line in rest:
            out.print(line, markup=False, soft_wrap=True, style="cyan" if "Next step:" in line else None)


def _encoded(text: str, stream: Any) -> bytes:
    """Return the bytes of a text, encoded as the stream itself would write it."""
    return text.encode(stream.encoding, "backslashreplace")


class _Lines(Printer):
    """Each line as it comes, with its host."""

    def __init__(self, hosts: Sequence[str], label: bool) -> None:
        super().__init__()
        self._label = label
        self._width = max(map(len, hosts), default=0)
        self._partial: dict[tuple[str, str], bytes] = {}
        self._labels: dict[tuple[str, str], bytes] = {}

    def output(self, host: str, data: bytes) -> None:
        self._take(host, "stdout", data)

    def errors(self, host: str, data: bytes) -> None:
        self._take(host, "stderr", data)

    def _take(self, host: str, name: str, data: bytes) -> None:
        *lines, rest = (self._partial.get((host, name), b"") + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines.append(rest)
            rest = b""
        self._partial[host, name] = rest
        if lines:
            label = self._label_of(host, name)
            self.put(getattr(sys, name), b"".join(label + line + b"\n" for line in lines))

    def _label_of(self, host: str, name: str) -> bytes:
        if not self._label:
            return b""
        if (host, name) not in self._labels:
            console = output() if name == "stdout" else errors()
            text = f"{host}: "
            if console.is_terminal:
                # The ends of the names stand below each other; a pipe gets them without spaces.
                with console.capture() as styled:
                    console.print(host.rjust(self._width), style=host_style(host), end=": ", markup=False)
                text = styled.get()
            self._labels[host, name] = _encoded(text, getattr(sys, name))
        return self._labels[host, name]

    def done(self, outcome: HostOutcome) -> None:
        for name in ("stdout", "stderr"):
            if rest := self._partial.pop((outcome.host, name), b""):
                self.put(getattr(sys, name), self._label_of(outcome.host, name) + rest + b"\n")
        if told := _told(outcome):
            label = self._label_of(outcome.host, "stderr") or _encoded(f"{outcome.host}: ", sys.stderr)
            lines = _encoded(printable(told), sys.stderr).split(b"\n")
            self.put(sys.stderr, b"".join(label + line + b"\n" for line in lines))


class _Kept(Printer):
    """Keeps the output until the end; of a host that prints very much, the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[str, str], bytearray] = {}
        self._cut: set[str] = set()

    def output(self, host: str, data: bytes) -> None:
        self._keep(host, "stdout", data)

    def errors(self, host: str, data: bytes) -> None:
        self._keep(host, "stderr", data)

    def _keep(self, host: str, name: str, data: bytes) -> None:
        kept = self._kept.setdefault((host, name), bytearray())
        room = _KEPT - len(kept)
        kept += data[:room]
        if len(data) > room:
            self._cut.add(host)

    def done(self, outcome: HostOutcome) -> None:
        pass

    def _of(self, host: str, name: str) -> bytes:
        return bytes(self._kept.get((host, name), b""))


class _Gathered(_Kept):
    """The output of each host at the end; hosts that printed the same together."""

    def finish(self, outcomes: Sequence[HostOutcome]) -> None:
        groups: dict[tuple[bytes, str], list[str]] = {}
        for outcome in outcomes:
            text = self._of(outcome.host, "stdout")
            if outcome.host in self._cut:
                text += f"\n[more than {_KEPT // 1024**2} MB: the rest is left out]\n".encode()
            if text or not _told(outcome):
                groups.setdefault((text, _told(outcome) if outcome.kind == "done" else ""), []).append(outcome.host)
        console = output()
        for (text, told), hosts in groups.items():
            names = (
                fold(hosts)
                + (f" ({len(hosts)} hosts)" if len(hosts) > 1 else "")
                + (f": {one_line(told)}" if told else "")
            )
            line = "--" if console.options.ascii_only else "──"
            console.print(f"{line} {names}", style="bold", markup=False, soft_wrap=True)
            sys.stdout.flush()
            sys.stdout.buffer.write(text if text.endswith(b"\n") or not text else text + b"\n")
            sys.stdout.buffer.flush()
        shown = {host for hosts in groups.values() for host in hosts}
        for outcome in outcomes:
            if outcome.host not in shown or outcome.kind != "done":
                _say(outcome)


class _JsonPrinter(_Kept):
    """One document at the end."""

    def finish(self, outcomes: Sequence[HostOutcome]) -> None:
        document = [
            {
                "host": outcome.host,
                "status": outcome.status,
                "state": outcome.kind,
                "error": outcome.error or None,
                "stdout": self._of(outcome.host, "stdout").decode("utf-8", "replace"),
                "stderr": self._of(outcome.host, "stderr").decode("utf-8", "replace"),
                "truncated": outcome.host in self._cut,
                "seconds": round(outcome.seconds, 3),
            }
            for outcome in outcomes
        ]
        sys.stdout.write(json.dumps(document, indent=2) + "\n")


# --- input ---------------------------------------------------------------------------------------
class SharedInput:
    """Standard input for many hosts, kept on disk: each host gets it from the start, as fast as it takes it."""

    def __init__(self) -> None:
        self._source = sys.stdin.fileno()
        self._regular = stat.S_ISREG(os.fstat(self._source).st_mode)
        self._start = os.lseek(self._source, 0, os.SEEK_CUR) if self._regular else 0
        self._file = None if self._regular else tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._size = 0
        self._over = self._regular
        self.error: OSError | None = None
        self._places: dict[int, int] = {}
        self._changed = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None

    async def feed(self, channel: Channel) -> None:
        """Send all of it to a command, and the end."""
        if self._reading is None and not self._regular:
            self._reading = asyncio.ensure_future(self._read())
        fd = self._source if self._file is None else self._file.fileno()
        self._places[id(channel)] = 0
        try:
            while data := await self._part(fd, self._places[id(channel)]):
                await channel.send(data)
                self._places[id(channel)] += len(data)
                await self._tell()
            await channel.send_end()
        finally:
            self._places.pop(id(channel), None)
            await self._tell()

    async def _part(self, fd: int, place: int) -> bytes:
        async with self._changed:
            await self._changed.wait_for(lambda: self._over or self._size > place)
        if self.error is not None:
            raise LazyclusterError(f"cannot pass on standard input: {self.error}") from None
        return os.pread(fd, _PART, self._start + place)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _read(self) -> None:
        assert self._file is not None
        try:
            while data := await event_loop.in_thread(os.read, self._source, _PART):
                self._file.write(data)
                self._file.flush()
                self._size += len(data)
                async with self._changed:
                    self._changed.notify_all()
                    await self._changed.wait_for(lambda: self._size - min(self._places.values(), default=0) < _AHEAD)
        except OSError as error:  # the temporary directory is full, say
            self.error = error
        self._over = True
        await self._tell()

    def close(self) -> None:
        """Close it."""
        if self._reading is not None:
            self._reading.cancel()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it could not write is told as its error
                self._file.close()
