"""A child process of the manager, watched by the event loop: no thread, no polling."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from lazycluster import _forks

_TAIL = 16 * 1024
_PIPE_SIZE = 1024 * 1024


class ErrorTail:
    """The end of what a process prints to standard error, read as it comes.

    Args:
        fd: The read end of its pipe, which is this object's from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._seen = bytearray()
        self._loop = asyncio.get_running_loop()
        _forks.not_for_children(fd)
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    @property
    def text(self) -> str:
        """The end of what it has printed so far."""
        return self._seen.decode("utf-8", "replace")

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return False
        self._seen += data
        del self._seen[:-_TAIL]
        if not data:
            self._let_go()
        return bool(data)

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


class WatchedProcess:
    """A child whose end and whose error output the loop waits for.

    It is in a session of its own: a Ctrl-C in the terminal is for the manager, which ends its children in order.

    Attributes:
        pid: Its process id.
        exited: Is done with its exit status when it has ended and its error output has been read.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
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
        _forks.not_for_children(*(pipe.fileno() for pipe in (self._popen.stdin, self._popen.stdout)))
        self.pid = self._popen.pid
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._errors = ErrorTail(os.dup(self._popen.stderr.fileno()))
        self._popen.stderr.close()
        self._pidfd = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else -1
        if self._pidfd >= 0:
            self._loop.add_reader(self._pidfd, self._ended)
        else:
            self._loop.call_later(0.05, self._poll)

    def take_streams(self) -> tuple[int, int]:
        """Return the descriptors of its output and its input; from now on they are the caller's to close."""
        assert self._popen.stdin and self._popen.stdout
        streams = os.dup(self._popen.stdout.fileno()), os.dup(self._popen.stdin.fileno())
        _forks.not_for_children(*streams)
        for stream in streams:
            with contextlib.suppress(OSError, AttributeError):  # no Linux, or the user's limit for pipes is used up
                fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self._close_streams()
        return streams

    @property
    def errors(self) -> str:
        """The end of what it printed to standard error."""
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

    def _poll(self) -> None:
        if self._popen.poll() is None:
            self._loop.call_later(0.05, self._poll)
        else:
            self._ended()

    def _ended(self) -> None:
        status = self._popen.wait()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._errors.close()
        self._close_streams()
        if not self.exited.done():
            self.exited.set_result(status)
