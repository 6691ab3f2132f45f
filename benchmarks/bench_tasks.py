"""Commands and functions on a warm host, beside execnet; and what 500 tasks at once cost the manager."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import execnet
from harness import Row, in_turns, settings, ssh_hosts

from lazycluster import Runtime, RuntimeGroup, RuntimeTask

SIZE = 100_000_000


def use_numpy() -> float:
    import numpy

    return float(numpy.arange(10).sum())


def memory() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> list[str]:
    out = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True)
    return [
        line.split()[0] for line in out.stdout.splitlines() if not line.startswith("ps ") and "sshhosts" not in line
    ]


def gateway(hosts: Any) -> Any:
    spec = f"ssh=-F {hosts.config_file} {hosts.names[0]}//python=python3"
    return execnet.makegateway(spec)


def rows() -> Iterator[Row]:
    with ssh_hosts(4) as hosts:
        yield from many(hosts)  # first: what the others take and give back would be in its figure
        with Runtime(hosts.names[0], connection_kwargs=settings(hosts)) as runtime:
            yield from warm(runtime, gateway(hosts))


def warm(runtime: Runtime, remote: Any) -> Iterator[Row]:
    def command() -> None:
        runtime.execute_task(RuntimeTask("true").run_command("true"), execute_async=False)

    def trivial() -> None:
        assert runtime.call(lambda: 1) == 1

    echo = remote.remote_exec("while True:\n    channel.send(channel.receive())")

    def round_trip() -> None:
        echo.send(1)
        assert echo.receive() == 1

    blob = os.urandom(SIZE)

    def large() -> None:
        assert len(runtime.call(lambda data: data, blob)) == SIZE

    def large_execnet() -> None:
        echo.send(blob)
        assert len(echo.receive()) == SIZE

    runtime.call(use_numpy)
    times = in_turns(31, command=command, trivial=trivial, numpy=lambda: runtime.call(use_numpy), execnet=round_trip)
    times = {name: value * 1000 for name, value in times.items()}
    yield Row('warm run_command("true")', times["command"], "ms", "<= 5 ms", met=times["command"] <= 5)
    yield Row(
        "warm call of lambda: 1, process of its own",
        times["trivial"],
        "ms",
        "<= 10 ms",
        "execnet (no new process)",
        times["execnet"],
        times["trivial"] <= 10,
    )
    yield Row("warm call that uses numpy", times["numpy"], "ms", "<= 20 ms", met=times["numpy"] <= 20)
    times = in_turns(3, ours=large, execnet=large_execnet)
    met = times["ours"] <= max(1.2, 0.5 * times["execnet"])
    yield Row("100 MB in and 100 MB out", times["ours"], "s", "<= 1.2 s or 0.5 x", "execnet", times["execnet"], met)
    remote.exit()


def many(hosts: Any) -> Iterator[Row]:
    with RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts)) as group:
        group.execute_task(RuntimeTask("warm").run_command("true"), broadcast=True)
        group.join()
        before, threads = memory(), threading.active_count()
        for number in range(500):
            group.execute_task(RuntimeTask(f"task-{number}").run_command("sleep 3"))
        more, now = memory() - before, threading.active_count()
        beside = sorted(children())
        group.join()
    fits = more < 60 and now <= threads and len([name for name in beside if name == "ssh"]) == len(hosts.names)
    yield Row(
        "500 tasks at once on 4 hosts: memory of the manager",
        more,
        "MB",
        "< 60 MB, no process",
        met=fits,
        note=f"threads {threads} -> {now}; children: {', '.join(beside)}",
    )
