"""The agent's connection to a zygote, and the program by which an interpreter becomes one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import struct
from collections import deque

from . import descriptors
from .processes import send_signal, start_time

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Deque, Dict, Iterable, List, Optional, Tuple

    from .loop import Loop

    Report = Callable[[Dict[str, Any]], Any]

# What its children run, each after those that it needs; and what only workers of pools run.
_MODULES = (
    "ownership",
    "bytecode",
    "descriptors",
    "localmodules",
    "filenames",
    "interpreters",
    "limits",
    "call_process",
)
_POOL_MODULES = ("pool_protocol", "pool_worker")
HEAD = struct.Struct("!I")
_LOOK_EVERY = 0.1  # seconds

STUB = """
import sys, os
sys.version_info >= (3, 8) or sys.exit("Python %d.%d is too old: 3.8 or newer is needed" % sys.version_info[:2])
import json
def read(n):
    data = b""
    while len(data) < n:
        part = os.read(0, n - len(data))
        part or os._exit(0)
        data += part
    return data
sources = json.loads(read(int(read(10))))
space = {"__name__": "lazycluster.agent.zygote"}
exec(compile(sources[0]["zygote"], "<lazycluster zygote>", "exec"), space)
space["main"](*sources[1:])
"""


def program() -> bytes:
    """Return the text of the modules that an interpreter needs to become a zygote, as the stub reads it."""
    data = json.dumps([texts(names) for names in (("zygote",), _MODULES, _POOL_MODULES)]).encode("ascii")
    return b"%10d%s" % (len(data), data)


def texts(names: Iterable[str]) -> Dict[str, str]:
    """Return the texts of some modules of this package."""
    found = {}
    for name in names:
        spec: Any = importlib.util.find_spec("{}.{}".format(__package__, name))
        found[name] = spec.loader.get_source(spec.name)
    return found


class ZygoteLink:
    """The connection to one zygote.

    Args:
        loop: The reactor.
        control: Our end of its socket.
        on_message: Is called with each message that does not belong to a call.
        on_end: Is called when it has ended.
    """

    def __init__(self, loop: "Loop", control: socket.socket, on_message: Report, on_end: Callable[[], Any]) -> None:
        self.pid = 0
        self.reports: Dict[int, Report] = {}  # number of a call -> who wants to know of its process
        self.ended = False
        self._pids: Dict[int, int] = {}  # of those calls
        self._loop, self._control = loop, control
        self._on_message, self._on_end = on_message, on_end
        self._received = bytearray()
        self._queue: Deque[Tuple[bytes, List[int]]] = deque()
        self._retired = False
        control.setblocking(False)
        loop.add_reader(control.fileno(), self._readable)

    # --- to the zygote -------------------------------------------------------------------------
    def tell(self, message: Dict[str, Any], fds: Iterable[int] = ()) -> None:
        """Send a message and descriptors; ours are closed when they have been sent."""
        handed = list(fds)
        message["fds"] = len(handed)
        data = json.dumps(message).encode("ascii")
        self.write(HEAD.pack(len(data)) + data, handed)

    def write(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send bytes as they are."""
        self._queue.append((data, list(fds)))
        self._flush()

    def _flush(self) -> None:
        try:
            while self._queue and not self.ended:
                data, fds = self._queue[0]
                count = descriptors.send(self._control, fds, data)
                for fd in fds:
                    os.close(fd)
                self._queue.popleft()
                if count < len(data):
                    self._queue.appendleft((data[count:], []))
        except BlockingIOError:
            pass
        except OSError:
            self._lost()
            return
        if not self.ended:
            self._loop.watch_writer(self._control.fileno(), self._flush if self._queue else None)

    # --- from the zygote -----------------------------------------------------------------------
    def _readable(self) -> None:
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        self._received += data
        while len(self._received) >= HEAD.size:
            end = HEAD.size + HEAD.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            message = json.loads(bytes(self._received[HEAD.size : end]))
            del self._received[:end]
            self._dispatch(message)

    def _dispatch(self, message: Dict[str, Any]) -> None:
        if "id" not in message:
            self._on_message(message)
            return
        report = self.reports.get(message["id"])
        if "status" in message:
            self.reports.pop(message["id"], None)
            self._pids.pop(message["id"], None)
        if report is not None:
            report(message)
        if message["id"] in self.reports:
            self._pids[message["id"]] = message["pid"]
        if self._retired and not self.reports:
            self.close()

    def _lost(self) -> None:
        if not self.ended:
            self.close()
            self._on_end()
            reports, self.reports = self.reports, {}
            for number, report in reports.items():
                pid = self._pids.get(number, 0)
                self._await_end(pid, start_time(pid) if pid else None, report)

    def _await_end(self, pid: int, started: Optional[int], report: Report) -> None:
        """Have a process that it has forked go on without it; what its status is, nobody learns."""
        if started is not None and start_time(pid) == started:
            self._loop.call_later(_LOOK_EVERY, lambda: self._await_end(pid, started, report))
        else:
            report({"status": None})

    # --- the end -------------------------------------------------------------------------------
    def retire(self) -> None:
        """End it when the calls that it has forked are over."""
        self._retired = True
        if not self.reports:
            self.close()

    def close(self) -> None:
        """End it now."""
        if not self.ended:
            self._loop.watch_writer(self._control.fileno(), None)
            self.ended = True
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            for _, fds in self._queue:
                for fd in fds:
                    os.close(fd)
            self._queue.clear()

    def kill(self) -> None:
        """End it even if it does not listen."""
        if self.pid and not self.ended:
            send_signal([self.pid], signal.SIGKILL)
        self.close()
