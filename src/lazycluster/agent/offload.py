"""Work that may take long, done by a forked child, so that the agent goes on answering meanwhile."""

from __future__ import annotations

import json
import os
import signal

from .processes import become_plain, close_all_but, pipe, send_signal

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict

    from .loop import Loop
    from .session import RequestChannel

    Fields = Dict[str, Any]


class ForkedWork:
    """A child of the agent that does some work and tells what came out.

    Args:
        loop: The reactor.
        work: What to do; returns what JSON can hold.
        on_answer: Is called with that; if it failed, with `failed`, the arguments of `RequestChannel.fail`.

    Attributes:
        pid: The child.

    Raises:
        OSError: There can be no such child.
    """

    def __init__(self, loop: Loop, work: Callable[[], Fields], on_answer: Callable[[Fields], Any]) -> None:
        self._loop, self._on_answer = loop, on_answer
        self._answer = bytearray()
        self._fd, write = pipe()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(self._fd)
            os.close(write)
            raise
        if self.pid == 0:
            _do(work, write)
        os.close(write)
        loop.add_reader(self._fd, self._readable)
        loop.on_exit(self.pid, lambda status: None)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 256 * 1024)
        except BlockingIOError:
            return
        if data:
            self._answer += data
            return
        self._close()
        try:
            fields = json.loads(self._answer.decode("ascii"))
        except ValueError:
            fields = {"failed": {"error": "internal", "message": "the process that was to do it died"}}
        self._on_answer(fields)

    def _close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def kill(self) -> None:
        """End the child at once, wherever it is; there is no answer then."""
        if self._fd >= 0:
            self._close()
            send_signal([self.pid], signal.SIGKILL)


def offload(channel: RequestChannel, work: Callable[[], Fields]) -> None:
    """Have a child do some work, whose fields are the result of a request; if that is abandoned, the child ends."""

    def answered(fields: Fields) -> None:
        if "failed" in fields:
            channel.fail(**fields["failed"])
        else:
            channel.result(**fields)

    channel.on_abandon = ForkedWork(channel.loop, work, answered).kill


def _do(work: Callable[[], Fields], fd: int) -> None:
    """Do it, say what came out, and end."""
    try:
        become_plain()
        os.setsid()
        close_all_but([fd])
        try:
            fields = work()
        except OSError as error:
            where = ": {}".format(error.filename) if error.filename else ""
            fields = {"failed": {"error": "os", "message": str(error.strerror) + where, "errno": error.errno}}
        except Exception as error:  # noqa: BLE001  (it is told to the manager, who raises it)
            fields = {"failed": {"error": "internal", "message": "{}: {}".format(type(error).__name__, error)}}
        data = memoryview(json.dumps(fields).encode("ascii"))
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os._exit(0)
