"""What a test may not leave behind on the machine that it runs on."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sshhosts import LIVE, procfs

#: Clean-up is promised within five seconds.
PATIENCE = 5.0

#: Threads that live as long as the process that first needed them: the library's event loop, and those of distributed.
LASTING_THREADS = ("IO loop", "Profile", "Dask-", "TCP-Executor", "asyncio_", "AsyncProcess")

_LASTING_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@dataclass
class Manager:
    """The state of the manager at one moment: processes, threads, ports, temporary files that tests may have made.

    Attributes:
        folder: Directory that all temporary files of this run are in.
        marker: NAME=value of the environment that all processes of this run carry.
        thorough: Look for processes that are no children any more, and for ports, too.
        own_network: The network namespace is this run's own, so its ports are.
    """

    folder: Path
    marker: str
    thorough: bool = True
    own_network: bool = False
    before: set[str] = field(default_factory=set)

    def remember(self) -> Manager:
        """Take the present state as what was there before."""
        self.before = set(self._present())
        return self

    def leftovers(self) -> list[str]:
        """What is there beyond what was remembered."""
        present = self._present()
        return [present[key] for key in sorted(present.keys() - self.before)]

    def _present(self) -> dict[str, str]:
        found = {f"thread {t.ident}": f"manager: thread {t.name}" for t in threading.enumerate() if _is_brief(t)}
        for process in self._processes():
            found[f"process {process.pid}"] = f"manager: process {process}"
        for name in os.listdir(self.folder):
            found[f"file {name}"] = f"manager: {self.folder / name}"
        if self.thorough and self.own_network:
            for port in procfs.listening_ports("self"):
                found[f"port {port}"] = f"manager: listening port {port}"
        return found

    def _processes(self) -> list[procfs.Process]:
        own = os.getpid()
        supervisors = {pool.supervisor_pid for pool in LIVE}
        children: list[procfs.Process] = []
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
                    if int(pid) not in supervisors and (found := procfs.process(int(pid))):
                        children.append(found)
        if self.thorough:
            children += [found for found in procfs.with_variable(self.marker) if found.pid != own]
        return [found for found in children if not any(name in found.command for name in _LASTING_PROCESSES)]


def _is_brief(thread: threading.Thread) -> bool:
    lasting = thread.name == "lazycluster" or thread.name.startswith(LASTING_THREADS)
    return not lasting and thread is not threading.main_thread()


def running(text: str) -> list[procfs.Process]:
    """Processes of this test run, not of others beside it, that have a text in their command."""
    run = "LAZYCLUSTER_TEST_RUN=" + os.environ["LAZYCLUSTER_TEST_RUN"]
    return [found for found in procfs.with_variable(run) if text in found.command]


def settle(leftovers: Callable[[], list[str]]) -> list[str]:
    """Wait until nothing is left; returns what is, after the promised time."""
    deadline = time.monotonic() + PATIENCE
    while found := leftovers():
        if time.monotonic() > deadline:
            return found
        time.sleep(0.02)
    return []


def remove(folder: Path) -> None:
    """Empty a directory."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
