"""What the benchmarks share: hosts, repeated measurement in turns, and the table."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from controlgroups import control_group, move
from sshhosts import Hosts

_AFTERWARDS = 0.3  # seconds


@dataclass(frozen=True)
class Row:
    """One line of the table: our median and a peer's, from the same run.

    Attributes:
        what: What was done.
        ours: Our figure.
        unit: Its unit.
        target: What it should be, in words.
        peer: Who did the same, "" if nobody.
        theirs: The peer's figure.
        met: Whether the target holds; None if there is none.
        note: Anything else to know; why there are no figures, where they are not numbers.
    """

    what: str
    ours: float
    unit: str
    target: str = ""
    peer: str = ""
    theirs: float | None = None
    met: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        theirs = f"{self.theirs:.3g} {self.unit}" if self.theirs is not None else ""
        ratio = f"{self.ours / self.theirs:.2f} x" if self.theirs else ""
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        cells = (f"{self.what:<52}", f"{self.ours:>8.3g} {self.unit:<6}", f"{self.peer:<26}", f"{theirs:>14}")
        return "  ".join((*cells, f"{ratio:>8}", f"{self.target:<22}", verdict, self.note)).rstrip()


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Cost:
    """What some work took.

    Attributes:
        wall: Seconds.
        manager: Processor seconds of this process and all that it has started, but the hosts.
        hosts: Processor seconds of the hosts.
    """

    wall: float
    manager: float
    hosts: float


@contextmanager
def measured(hosts: Hosts) -> Iterator[Callable[[Callable[[], Any]], Cost]]:
    """Give a function that runs some work and returns what it took.

    Raises:
        ControlGroupsUnavailableError: If the processes of the hosts cannot be told from others.
    """
    with control_group("cpuacct", 0) as manager, control_group("cpuacct", 1) as there:
        for host in hosts.all:
            move([host.pid, *(process.pid for process in host.processes(sshd=True))], there)
        move([os.getpid()], manager)  # what it starts from here on is there, too

        def used() -> tuple[float, float, float]:
            seconds = [int((group / "cpuacct.usage").read_text()) / 1e9 for group in (manager, there)]
            return time.perf_counter(), seconds[0], seconds[1]

        def cost(work: Callable[[], Any]) -> Cost:
            before = used()
            work()
            wall = time.perf_counter() - before[0]
            time.sleep(_AFTERWARDS)  # what ends, ends a moment later
            after = used()
            return Cost(wall, after[1] - before[1], after[2] - before[2])

        yield cost


def spread(values: Sequence[float]) -> str:
    """Return the median of some values, and from where to where they go."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def turns(repeat: int, **contenders: Callable[[], Any]) -> dict[str, list[float]]:
    """Run all contenders in turns, so that a noisy moment meets all; returns the seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, work in contenders.items():
            times[name].append(seconds(work))
    return times


def in_turns(repeat: int, **contenders: Callable[[], Any]) -> dict[str, float]:
    """Run all contenders in turns; returns the median seconds of each."""
    return {name: statistics.median(values) for name, values in turns(repeat, **contenders).items()}


@contextmanager
def ssh_hosts(count: int, **options: Any) -> Iterator[Hosts]:
    """Bring up throw-away hosts."""
    with _room_for_neighbours(count), Hosts(count, **options) as hosts:
        yield hosts


@contextmanager
def _room_for_neighbours(count: int) -> Iterator[None]:
    """Have room in the kernel's one table for what all hosts know of each other; real ones have a table each."""
    limits = [Path(f"/proc/sys/net/ipv4/neigh/default/gc_thresh{number}") for number in (1, 2, 3)]
    before = [int(limit.read_text()) for limit in limits]
    try:
        for limit, value in zip(limits, before, strict=True):
            limit.write_text(str(max(value, 2 * count * count)))
        yield
    finally:
        for limit, value in zip(limits, before, strict=True):
            limit.write_text(str(value))


@contextmanager
def slower(hosts: Hosts, share: float) -> Iterator[None]:
    """Let each host use only a share of one processor: so those of one machine do not slow down each other.

    Raises:
        ControlGroupsUnavailableError: If that is not possible here.
    """
    period = 100_000  # microseconds
    with ExitStack() as stack:
        for number, host in enumerate(hosts):
            group = stack.enter_context(control_group("cpu", number))
            (group / "cpu.cfs_period_us").write_text(str(period))
            (group / "cpu.cfs_quota_us").write_text(str(int(share * period)))
            move([host.pid, *(process.pid for process in host.processes(sshd=True))], group)
        yield


@contextmanager
def slow_manager(hosts: Hosts, rate: float) -> Iterator[None]:
    """Limit the link of this machine to all hosts together; between the hosts there is no limit.

    Args:
        hosts: The hosts.
        rate: Bytes a second.
    """
    hosts.switch(["ip", "link", "add", "name", "slow-b", "type", "veth", "peer", "name", "slow-a"])
    hosts.switch(["ip", "link", "set", "dev", "manager", "nomaster"])
    hosts.switch(["ip", "link", "set", "dev", "slow-a", "master", hosts.bridge_of(hosts[0]), "up"])
    hosts.switch(["ip", "link", "set", "dev", "slow-b", "up"])
    wire = hosts.wire(["manager", "slow-b", json.dumps({"delay": 0, "loss": [0, 0], "rate": rate})])
    try:
        yield
    finally:
        wire.communicate()
        hosts.switch(["ip", "link", "set", "dev", "manager", "master", hosts.bridge_of(hosts[0])])
        hosts.switch(["ip", "link", "del", "dev", "slow-a"])


def settings(hosts: Hosts) -> dict[str, str]:
    """Return the connection_kwargs for hosts."""
    return {"config_file": str(hosts.config_file)}
