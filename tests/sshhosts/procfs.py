"""What /proc tells about namespaces and processes, without starting a process to ask."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process as seen from the machine that runs the tests."""

    pid: int
    inner_pid: int
    parent: int
    name: str
    command: str
    state: str
    uid: int

    def __str__(self) -> str:
        zombie = ", zombie" if self.state == "Z" else ""
        return f"{self.command or self.name} (pid {self.inner_pid}, uid {self.uid}{zombie})"


def pids() -> list[int]:
    """All process ids that this process can see."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def process(pid: int) -> Process | None:
    """Describe a process; None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Process(
        pid=pid,
        inner_pid=int(fields.get("NSpid", str(pid)).split()[-1]),
        parent=int(fields["PPid"]),
        name=fields["Name"].strip(),
        command=command.replace(b"\0", b" ").decode(errors="replace").strip()[:300],
        state=fields["State"].split()[0],
        uid=int(fields["Uid"].split()[0]),
    )


def namespace(pid: int | str, kind: str = "pid") -> str:
    """The identity of a namespace of a process; empty when it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def processes_of_namespaces() -> dict[str, list[Process]]:
    """All processes, by the identity of their PID namespace."""
    found: dict[str, list[Process]] = {}
    for pid in pids():
        identity = namespace(pid)
        # A zombie has no namespaces any more: it is its parent that is looked for.
        if identity and (described := process(pid)):
            found.setdefault(identity, []).append(described)
    return found


def descendants(root: int) -> list[Process]:
    """All living descendants of a process."""
    children: dict[int, list[Process]] = {}
    for pid in pids():
        if described := process(pid):
            children.setdefault(described.parent, []).append(described)
    found: list[Process] = []
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.append(child)
            waiting.append(child.pid)
    return found


def with_variable(entry: str) -> Iterator[Process]:
    """Processes that were started with an environment variable, given as NAME=value."""
    wanted = entry.encode()
    for pid in pids():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and (described := process(pid)):
                yield described


def listening_ports(pid: int | str) -> list[int]:
    """TCP ports that listen in the network namespace of a process."""
    ports = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A":
                    ports.add(int(columns[1].rsplit(":", 1)[1], 16))
    return sorted(ports)
