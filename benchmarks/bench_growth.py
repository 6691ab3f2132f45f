"""What more hosts cost the manager: time, processor time and memory of connections, commands, probes, maps, clusters.

Each number of hosts has a process of its own. ``python benchmarks/bench_growth.py 64`` measures one number.

The switch of the hosts passes the question who has an address on to all of them. For 200 hosts on one machine that is
about two seconds of a first probe; real hosts have a processor each. So that probe is measured once more with a switch
that answers itself, as the networks of clouds do.

Dask is measured where the memory suffices, which for 200 hosts on a machine with 24 GB it does in an environment
without NumPy (``pip install '.[dask]'; pip uninstall numpy``): distributed imports that where it is. What Dask's
workers do while they have nothing to do, 4 % of a core for each, is turned down: all hosts share one machine.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import distributed  # noqa: F401  (whose defaults come with it)
from harness import Cost, Row, measured, settings, ssh_hosts

from lazycluster import RuntimeGroup, RuntimeTask
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.core import event_loop
from lazycluster.runtime.reachability import NetworkChoice, ProbedHost, probe

COUNTS = (8, 64, 200)
WORKER_MEMORY = 105.0  # megabytes of a host with a Dask worker, its nanny and our agent
NUMPY_MEMORY = 20.0  # more, in three processes
QUIET = {
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.tick.cycle": "5s",
    "distributed.admin.tick.interval": "2s",
    "distributed.worker.memory.monitor-interval": "10s",
    "distributed.worker.profile.cycle": "100s",
    "distributed.worker.profile.enabled": False,
    "distributed.worker.profile.interval": "10s",
}
NETWORKS: tuple[NetworkChoice, ...] = ("tunnel", "direct")
PROBED_PORT = 25100
CALLS = 100  # of a map, for each host
REPEAT = 3
PROBE_LIMIT = 5.0  # seconds
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

        def connect() -> None:
            groups.append(RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts)))

        gc.collect()
        before = memory()
        note("connect", cost(connect))
        gc.collect()
        after = memory()
        found["memory"] = {"self": after["self"] - before["self"], "ssh": after["ssh"]}
        group = groups[0]
        note("probe, the first", cost(lambda: probe_all(group)))
        note("probe, later", _median([cost(lambda: probe_all(group)) for _ in range(REPEAT)]))
        works: dict[str, Callable[[], None]] = {
            "command": lambda: broadcast(group),
            "map": lambda: spread_calls(group, count),
        }
        for what, work in works.items():
            work()  # what is done once only
            note(what, _median([cost(work) for _ in range(REPEAT)]))
        note("clean-up", cost(group.cleanup))
        if has_room_for_workers(count):
            connect()  # anew: the processes of the map have gone
            found.update(start_dask(groups[1], count, cost))
            groups[1].cleanup()
    with ssh_hosts(count, flooding=False) as hosts, measured(hosts) as cost:
        group = RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts))
        note("probe, the first, no flooding", cost(lambda: probe_all(group)))
        group.cleanup()
    return found


def _median(costs: list[Cost]) -> Cost:
    return sorted(costs, key=lambda one: one.manager)[len(costs) // 2]


def probe_all(group: RuntimeGroup) -> None:
    """Find out whether all hosts reach each other, on one port."""
    hosts = [ProbedHost(one.host, one._connection, (PROBED_PORT,)) for one in group.runtimes]
    assert event_loop.run(probe(hosts)).is_proven


def broadcast(group: RuntimeGroup) -> None:
    group.execute_task(RuntimeTask("true").run_command("true"), broadcast=True)
    group.join()
    group.clear_tasks()


def spread_calls(group: RuntimeGroup, count: int) -> None:
    assert sum(group.map(square, range(CALLS * count))) > 0


def has_room_for_workers(count: int) -> bool:
    """Tell whether there is memory for a Dask worker on each host."""
    lines = _text(Path("/proc/meminfo")).splitlines()
    available = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:"))
    has_numpy = importlib.util.find_spec("numpy") is not None
    return available > count * (WORKER_MEMORY + NUMPY_MEMORY * has_numpy)


def start_dask(group: RuntimeGroup, count: int, cost: Callable[[Callable[[], Any]], Cost]) -> dict[str, Any]:
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

        with dask.config.set(QUIET):
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
    met, target = None, ""
    if kind == "wall" and what.startswith("probe"):
        met, target = values[many] <= PROBE_LIMIT, f"<= {PROBE_LIMIT:.0f} s"
    elif kind != "wall" and linear > 0:
        met, target = values[many] <= MOST_GROWTH * linear, f"<= {MOST_GROWTH} x"
    return Row(f"{many} hosts: {what}, {kind}", values[many], unit, target, f"linear from {few}", linear, met, note)


if __name__ == "__main__":
    counts = [int(word) for word in sys.argv[1:]]
    print(json.dumps(measure(counts[0]) if len(counts) == 1 else {count: measure(count) for count in counts}))
