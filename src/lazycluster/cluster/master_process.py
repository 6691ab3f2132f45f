"""The master of a cluster, a child of the keeper, with the interface of `subprocess.Popen`."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from types import TracebackType

from lazycluster.core import interruptible


class MasterProcess:
    """A running master. Has the interface of `subprocess.Popen`, though the process is a child of the keeper.

    Attributes:
        args: The program and its arguments.
        pid: Its process id.
        returncode: Its exit status, negative for a signal; None while it runs.
    """

    stdin = stdout = stderr = None

    def __init__(self, args: Sequence[str], pid: int, send: Callable[[str], None]) -> None:
        self.args = list(args)
        self.pid = pid
        self.returncode: int | None = None
        self._send = send
        self._ended = interruptible.Event()

    def ended(self, status: int | None) -> None:
        """Note that it has ended; called by whoever watches it."""
        if not self._ended.is_set():
            self.returncode = -1 if status is None else status
            self._ended.set()

    def poll(self) -> int | None:
        """Return its exit status, None if it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit status.

        Raises:
            subprocess.TimeoutExpired: If it still runs after `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send it a signal. Does nothing after its end."""
        if self.returncode is None:
            self._send(signal.Signals(sig).name.removeprefix("SIG"))

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> MasterProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.wait()

    def __repr__(self) -> str:
        return f"<MasterProcess pid {self.pid} returncode {self.returncode}>"
