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
        _forks.not_for_children(
            *(pipe.fileno() for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr))
        )
        self.pid = self._popen.pid
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._errors = bytearray()
        self._stderr = self._popen.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._loop.add_reader(self._stderr.fileno(), self._read_errors)
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
        return self._errors.decode("utf-8", "replace")

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

    def _read_errors(self) -> None:
        try:
            data = os.read(self._stderr.fileno(), 65536)
        except BlockingIOError:
            return
        if data:
            self._errors += data
            del self._errors[:-_TAIL]
        else:
            self._close_errors()

    def _close_errors(self) -> None:
        if not self._stderr.closed:
            self._loop.remove_reader(self._stderr.fileno())
            self._stderr.close()

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
        if not self._stderr.closed:
            # What it said last may still be in the pipe; a grandchild (a ProxyCommand) may hold the other end.
            with contextlib.suppress(BlockingIOError):
                while data := os.read(self._stderr.fileno(), 65536):
                    self._errors += data
            self._close_errors()
        self._close_streams()
        if not self.exited.done():
            self.exited.set_result(status)
