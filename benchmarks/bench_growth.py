"""What more hosts cost the manager: time, processor time and memory for connecting, a command, a map, a Dask cluster.

Each number of hosts has a process of its own. ``python benchmarks/bench_growth.py 64`` measures one number.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import Cost, Row, measured, settings, ssh_hosts

from lazycluster import RuntimeGroup, RuntimeTask
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.runtime.reachability import NetworkChoice

COUNTS = (8, 64, 200)
DASK_COUNTS = (8, 64)  # the workers of more hosts take minutes to import distributed on two cores
NETWORKS: tuple[NetworkChoice, ...] = ("tunnel", "direct")
CALLS = 100  # of a map, for each host
REPEAT = 3
MOST_GROWTH = 1.5  # how much more each of the most hosts may cost the manager than each of the fewest


def square(number: int) -> int:
    return number * number


def memory() -> dict[str, float]:
    """Return the megabytes of this process, and of all its children that are ssh."""
    ssh = sum(
        _proportional(path.parent)
        for path in Path("/proc").glob("[0-9]*/comm")
        if _text(path) == "ssh\n" and f"PPid:\t{_own_pid()}\n" in _text(path.with_name("status"))
    )
    return {"self": _proportional(Path("/proc/self")), "ssh": ssh}


def _own_pid() -> str:
    return Path("/proc/self").readlink().name


def _proportional(process: Path) -> float:
    """Return the memory of a process in megabytes, with its share of what it has in common with others."""
    lines = [line for line in _text(process / "smaps_rollup").splitlines() if line.startswith("Pss:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def measure(count: int) -> dict[str, Any]:
    """Return what some hosts cost: for each kind of work wall and processor seconds, and megabytes."""
    found: dict[str, Any] = {}

    def note(what: str, cost: Cost) -> None:
        found[what] = {"wall": cost.wall, "manager": cost.manager}

    with ssh_hosts(count) as hosts, measured(hosts) as cost:
        groups: list[RuntimeGroup] = []
        connect = lambda: groups.append(RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts)))  # noqa: E731
        gc.collect()
        before = memory()
        note("connect", cost(connect))
        gc.collect()
        after = memory()
        found["memory"] = {"self": after["self"] - before["self"], "ssh": after["ssh"]}
        group = groups[0]
        works: dict[str, Callable[[], None]] = {
            "command": lambda: broadcast(group),
            "map": lambda: spread_calls(group, count),
        }
        for what, work in works.items():
            work()  # what is done once only
            note(what, _median([cost(work) for _ in range(REPEAT)]))
        if count in DASK_COUNTS:
            found.update(dask(group, count, cost))
        note("clean-up", cost(group.cleanup))
    return found


def _median(costs: list[Cost]) -> Cost:
    return sorted(costs, key=lambda one: one.manager)[len(costs) // 2]


def broadcast(group: RuntimeGroup) -> None:
    group.execute_task(RuntimeTask("true").run_command("true"), broadcast=True)
    group.join()
    group.clear_tasks()


def spread_calls(group: RuntimeGroup, count: int) -> None:
    assert sum(group.map(square, range(CALLS * count))) > 0


def dask(group: RuntimeGroup, count: int, cost: Callable[[Callable[[], Any]], Cost]) -> dict[str, Any]:
    """Return what the start of a Dask cluster with a worker on each host costs, in each network."""
    found: dict[str, Any] = {}
    for network in NETWORKS:

        def start() -> None:
            cluster = DaskCluster(group, network=network)  # noqa: B023
            try:
                cluster.start(worker_count=count)
                with cluster.get_client() as client:
                    client.wait_for_workers(count)
            finally:
                cluster.cleanup()

        taken = cost(start)
        found[f"Dask, {network}"] = {"wall": taken.wall, "manager": taken.manager}
    return found


def rows() -> Iterator[Row]:
    found: dict[int, dict[str, Any]] = {}
    for count in COUNTS:
        command = [sys.executable, __file__, str(count)]
        found[count] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for what in dict.fromkeys(what for values in found.values() for what in values):
        for kind in next(values[what] for values in found.values() if what in values):
            yield _row(what, kind, {count: values[what][kind] for count, values in found.items() if what in values})


def _row(what: str, kind: str, values: dict[int, float]) -> Row:
    """Return the line of one figure: of the most hosts, beside what it would be if each cost as in the fewest."""
    few, many = min(values), max(values)
    unit = "MB" if what == "memory" else "s"
    note = ", ".join(f"{count}: {value:.3g}" for count, value in values.items())
    linear = values[few] * many / few
    met = None if kind == "wall" or linear <= 0 else values[many] <= MOST_GROWTH * linear
    target = "" if met is None else f"<= {MOST_GROWTH} x"
    return Row(f"{many} hosts: {what}, {kind}", values[many], unit, target, f"linear from {few}", linear, met, note)


if __name__ == "__main__":
    counts = [int(word) for word in sys.argv[1:]]
    print(json.dumps(measure(counts[0]) if len(counts) == 1 else {count: measure(count) for count in counts}))
