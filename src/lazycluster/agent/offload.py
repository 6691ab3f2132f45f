"""Work with files that may take long: done by a forked child, so that the agent goes on answering meanwhile."""

from __future__ import annotations

import json
import os
import signal

from .processes import Pump, become_plain, close_all_but, pipe, send_signal

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict

    from .session import RequestChannel


def aside(channel: RequestChannel, work: Callable[[], Dict[str, Any]]) -> None:
    """Have a child do some work, whose fields are the result of a channel.

    Args:
        channel: The request. If it is abandoned, the child ends at once, wherever it is.
        work: What to do.
    """
    read, write = pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(read)
        os.close(write)
        raise
    if pid == 0:
        _do(work, write)
    os.close(write)
    answer = bytearray()

    def on_end() -> None:
        try:
            fields = json.loads(answer.decode("ascii"))
        except ValueError:
            channel.fail("internal", "the process that was to do it died")
            return
        if "failed" in fields:
            channel.fail(**fields["failed"])
        else:
            channel.result(**fields)

    pump = Pump(channel, read, answer.extend, on_end)
    channel.on_drain = pump.resume
    channel.on_abandon = lambda: send_signal([pid], signal.SIGKILL)
    channel.loop.on_exit(pid, lambda status: None)


def _do(work: Callable[[], Dict[str, Any]], fd: int) -> None:
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
