"""Managers at work that are ended in some way, and what they may not leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import leaks
from sshhosts import procfs

PATIENCE = 60.0  # seconds until the manager is in the middle of its work, or has ended, on a loaded machine


def _born(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


class Victim:
    """A manager at work, with directories of its own for all that it may leave behind.

    Args:
        work: What it is to do: see `victims.py`.
        hosts: Where.
        first: Whether it is process 1 of a container, whose other processes end with it.

    Attributes:
        folder: Where it finds and puts files.
        process: The manager's process.
    """

    def __init__(self, work: str, hosts: Any, *, first: bool = False) -> None:
        self._prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"] if first else []
        # Short: the paths of control sockets are limited.
        self._hosts = hosts
        self._private = Path(tempfile.mkdtemp())
        self.folder = Path(tempfile.mkdtemp())
        self._state = Path(tempfile.mkdtemp())
        self._work = work
        self._marker = f"LAZYCLUSTER_TEST_VICTIM={self._private}"

    def __enter__(self) -> Victim:
        self._ports = set(procfs.listening_ports("self"))
        environment = {
            **os.environ,
            "TMPDIR": str(self._private),
            "XDG_RUNTIME_DIR": str(self._private),
            "XDG_STATE_HOME": str(self._state),
            "LAZYCLUSTER_TEST_VICTIM": str(self._private),
        }
        script = Path(__file__).with_name("victims.py")
        arguments = [
            *self._prefix,
            sys.executable,
            str(script),
            self._work,
            str(self._hosts.config_file),
            str(self.folder),
        ]
        self.process = subprocess.Popen(
            arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        return self

    def tell(self, order: str) -> None:
        """Say what it is to do."""
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        for folder in (self._private, self.folder, self._state):
            subprocess.run(["rm", "-rf", folder], check=True)

    @property
    def pid(self) -> int:
        """The manager's own pid, as seen from here."""
        pid = self.process.pid
        return (
            next(found.pid for found in procfs.descendants(pid) if "victims.py" in found.command)
            if self._prefix
            else pid
        )

    def said(self) -> str:
        """Wait for what it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, f"it ended before it was killed:\n{self.process.communicate()[1]}"
        return line

    def kill(self) -> None:
        """Kill it, and make sure that nothing is left five seconds later, on the hosts and here."""
        self.end(lambda: self.process.send_signal(signal.SIGKILL))

    def end(self, how: Callable[[], Any]) -> tuple[int, str]:
        """End it, and make sure that nothing is left five seconds later; returns its status and its last words."""
        descendants = {found.pid: _born(found.pid) for found in procfs.descendants(self.process.pid)}
        assert any("ssh" in (found.command) for found in procfs.descendants(self.process.pid))
        assert list(self._private.iterdir())
        how()
        _, said = self.process.communicate(timeout=PATIENCE)
        left = leaks.settle(lambda: [*self._left_here(descendants), *self._left_there()])
        assert not left, "\n".join([*left, said])
        return self.process.returncode, said

    def _left_there(self) -> Iterator[str]:
        for host in self._hosts.all:
            yield from host.leftovers()

    def _left_here(self, descendants: dict[int, str]) -> Iterator[str]:
        for pid, born in descendants.items():
            if born and _born(pid) == born:
                yield f"manager: process {procfs.process(pid)}"
        for process in procfs.with_variable(self._marker):
            yield f"manager: process {process}"
        for port in set(procfs.listening_ports("self")) - self._ports:
            yield f"manager: listening port {port}"
        for path in self._private.iterdir():
            yield f"manager: {path}"
