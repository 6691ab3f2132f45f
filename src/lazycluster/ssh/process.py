"""A child process of the manager, watched by the event loop: no thread, no polling."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence

from lazycluster.core import forks, unix

_TAIL = 16 * 1024
_NO_LOG, _CLOSED = -1, -2  # instead of a descriptor
# The last word of an ssh whose link has ended is not in its log.
_LAST_LINE = re.compile(
    rb"(?:^|\n)((?:Connection to \S+ closed by remote host\.|(?:Read from|Write to) remote host \S+: [^\n]*)\s*)$"
)
_LOGGED_IN = re.compile(rb"^Authenticated to ", re.MULTILINE)
_POLL_EVERY = 0.05  # seconds, where the system does not say that something happens


class ErrorTail:
    """The end of what a process prints to standard error, read as it comes.

    Args:
        fd: The read end of its pipe, which is this object's from now on.

    Attributes:
        seen: The end of what it has printed so far.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.seen = bytearray()
        self._loop = asyncio.get_running_loop()
        forks.close_in_children(fd)
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    @property
    def text(self) -> str:
        """`seen`, as text."""
        return self.seen.decode("utf-8", "replace")

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return False
        self.seen += data
        del self.seen[:-_TAIL]
        if not data:
            self._let_go()
        return bool(data)

    def forget(self) -> None:
        """Forget what it has printed until now."""
        if self._fd >= 0:
            self._read()
        self.seen.clear()

    def close(self) -> None:
        """Take what is there, and wait for no more: a grandchild (a ProxyCommand) may hold the other end."""
        while self._fd >= 0 and self._read():
            pass
        self._let_go()

    def _let_go(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


def _reader_of_named_pipe(path: str) -> int:
    os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


class WatchedProcess:
    """A child whose end and whose error output the loop waits for.

    It is in a session of its own: a Ctrl-C in the terminal is for the manager, which ends its children in order.

    Args:
        argv: Its command line.
        env: Further variables of its environment.
        log: If it is an ssh with a log of its own: the path of a named pipe, which is made for that.

    Attributes:
        pid: Its process id.
        exited: Is done with its exit status when it has ended and its error output has been read.
        is_logged_in: Whether its log says that it has logged in. From then on `heard` begins anew.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None, log: str | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self.is_logged_in = False
        self._log_text = bytearray()
        self._log_fd = _NO_LOG if log is None else _reader_of_named_pipe(log)
        try:
            self._start(argv, env)
        except BaseException:
            if self._log_fd >= 0:
                os.close(self._log_fd)
            raise

    def _start(self, argv: Sequence[str], env: Mapping[str, str] | None) -> None:
        self._popen = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            bufsize=0,
        )
        assert self._popen.stdin and self._popen.stdout and self._popen.stderr
        forks.close_in_children(*(pipe.fileno() for pipe in (self._popen.stdin, self._popen.stdout)))
        self.pid = self._popen.pid
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._errors = ErrorTail(os.dup(self._popen.stderr.fileno()))
        self._popen.stderr.close()
        if self._log_fd >= 0:
            forks.close_in_children(self._log_fd)
            self._listen_to_log()
        self._pidfd = unix.process_descriptor(self.pid)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._ended)
        else:
            self._loop.call_later(_POLL_EVERY, self._poll)

    def take_streams(self) -> tuple[int, int]:
        """Return the descriptors of its output and its input; from now on they are the caller's to close."""
        assert self._popen.stdin and self._popen.stdout
        streams = os.dup(self._popen.stdout.fileno()), os.dup(self._popen.stdin.fileno())
        forks.close_in_children(*streams)
        for stream in streams:
            unix.enlarge_pipe(stream)
        self._close_streams()
        return streams

    @property
    def errors(self) -> str:
        """The end of what it said: in its log, or on standard error if it has none."""
        if self._log_fd == _NO_LOG:
            return self.heard
        last = _LAST_LINE.search(self._errors.seen) if self.is_logged_in else None
        return (self._log_text + (last.group(1) if last else b"")).decode("utf-8", "replace")

    @property
    def heard(self) -> str:
        """The end of what came from standard error if it has a log: it only passes that on."""
        return self._errors.text

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def end(self, patience: float = 1.0) -> None:
        """Wait for its end for `patience` seconds, then terminate it, then kill it."""
        for number in (0, signal.SIGTERM, signal.SIGKILL):
            if number:
                self.signal(number)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.exited), patience)
            if self.exited.done():
                return

    def _close_streams(self) -> None:
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None and not stream.closed:
                stream.close()

    def _listen_to_log(self) -> None:
        if self._log_fd >= 0:
            self._loop.add_reader(self._log_fd, self._read_log)

    def _read_log(self) -> None:
        try:
            data = os.read(self._log_fd, 65536)
        except BlockingIOError:
            return
        if not data:  # whoever has written to it has ended; some systems say the same before anybody has opened it
            self._loop.remove_reader(self._log_fd)
            if not self._log_text:
                self._loop.call_later(_POLL_EVERY, self._listen_to_log)
            return
        self._log_text += data
        if not self.is_logged_in and _LOGGED_IN.search(self._log_text):
            self.is_logged_in = True
            if b"Transferred: " not in self._log_text:  # else it is over already, and this holds all that came
                self._errors.forget()  # the banner, which came before
        del self._log_text[:-_TAIL]

    def _close_log(self) -> None:
        if self._log_fd >= 0:
            self._read_log()
            self._loop.remove_reader(self._log_fd)
            os.close(self._log_fd)
            self._log_fd = _CLOSED

    def _poll(self) -> None:
        if self._popen.poll() is None:
            self._loop.call_later(_POLL_EVERY, self._poll)
        else:
            self._ended()

    def _ended(self) -> None:
        status = self._popen.wait()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._close_log()
        self._errors.close()
        self._close_streams()
        if not self.exited.done():
            self.exited.set_result(status)
