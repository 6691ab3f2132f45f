"""Copies of files, beside `scp` and `tar | ssh tar`, which use a connection that is already there, as we do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from harness import Row, in_turns, settings, slow_manager, spread, ssh_hosts, turns

from lazycluster import RuntimeGroup
from lazycluster.core import event_loop
from lazycluster.ssh.ssh_connection import SshConnection
from lazycluster.ssh.transfer import get, send

HOSTS = 8
PAIRS = 11
BIG = 400_000_000
EACH = 100_000_000
LARGE, LINK = 500_000_000, 50e6  # bytes, bytes a second
FILES, FILE_SIZE = 2000, 4096


@contextlib.contextmanager
def masters(hosts: Any, folder: Path) -> Iterator[list[str]]:
    """Give ssh and scp connections that are open already; returns their options."""
    options = ["-F", str(hosts.config_file), "-o", f"ControlPath={folder}/%n", "-o", "LogLevel=ERROR"]
    for name in hosts.names:
        subprocess.run(["ssh", *options, "-MNf", name], check=True)
    try:
        yield options
    finally:
        for name in hosts.names:
            subprocess.run(["ssh", *options, "-O", "exit", name], check=True, capture_output=True)


@contextlib.contextmanager
def connections(hosts: Any) -> Iterator[list[SshConnection]]:
    made = [SshConnection(name, settings(hosts)) for name in hosts.names]

    async def all_of(works: list[Awaitable[None]]) -> None:
        await asyncio.gather(*works)

    event_loop.run(all_of([connection.open() for connection in made]))
    try:
        yield made
    finally:
        event_loop.run(all_of([connection.close() for connection in made]))


def rows() -> Iterator[Row]:
    # In memory, as the hosts' homes are: disks are not what is measured.
    folder = Path(tempfile.mkdtemp(prefix="lb-", dir="/dev/shm"))
    try:
        with ssh_hosts(HOSTS) as hosts, masters(hosts, folder) as options, connections(hosts) as made:
            yield from big_file(folder, hosts, options, made[0])
            yield from to_many(folder, hosts, options, made)
            yield from small_files(folder, hosts, options, made[0])
        yield from from_host_to_host(folder)
    finally:
        shutil.rmtree(folder)


def make_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    return path


def clear(*paths: Path) -> None:
    """Remove what was copied: it would not be sent again."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def ours(work: Callable[..., Awaitable[Any]], paths: list[Path], *calls: tuple[Any, ...]) -> Callable[[], None]:
    async def all_of() -> None:
        await asyncio.gather(*(work(*call, cwd="", env={}) for call in calls))

    def run() -> None:
        clear(*paths)
        event_loop.run(all_of())

    return run


def theirs(paths: list[Path], *commands: str) -> Callable[[], None]:
    def run() -> None:
        clear(*paths)
        processes = [subprocess.Popen(["bash", "-c", f"set -o pipefail; {command}"]) for command in commands]
        assert [process.wait() for process in processes] == [0] * len(commands)

    return run


def big_file(folder: Path, hosts: Any, options: list[str], connection: SshConnection) -> Iterator[Row]:
    source = make_file(folder / "big", BIG)
    there, back = hosts[0].path("~/big"), folder / "back"
    scp = f"scp -q {' '.join(options)}"
    name = hosts.names[0]
    times = turns(
        PAIRS,
        send=ours(send, [there], (connection, source, "big")),
        scp_to=theirs([there], f"{scp} {source} {name}:big"),
        get=ours(get, [back], (connection, "big", back)),
        scp_from=theirs([back], f"{scp} {name}:big {back}"),
    )
    clear(source, back, there)
    for what, mine, peer in (
        ("one big file to a host", "send", "scp_to"),
        ("one big file from a host", "get", "scp_from"),
    ):
        ratios = [theirs / ours for ours, theirs in zip(times[mine], times[peer], strict=True)]
        rate, scp_rate = (BIG / 1e6 / statistics.median(times[which]) for which in (mine, peer))
        met = statistics.median(ratios) >= 0.95
        note = f"ratio in {PAIRS} pairs: {spread(ratios)}"
        yield Row(what, rate, "MB/s", ">= 0.95 x", "scp, warm connection", scp_rate, met, note)


def to_many(folder: Path, hosts: Any, options: list[str], made: list[SshConnection]) -> Iterator[Row]:
    source = make_file(folder / "each", EACH)
    there = [host.path("~/each") for host in hosts]
    times = in_turns(
        5,
        ours=ours(send, there, *((connection, source, "each") for connection in made)),
        scp=theirs(there, *(f"scp -q {' '.join(options)} {source} {name}:each" for name in hosts.names)),
    )
    clear(source, *there)
    yield Row(
        f"{EACH // 10**6} MB to {HOSTS} hosts at once", times["ours"], "s", "<= 1 x", f"{HOSTS} scp, warm",
        times["scp"], times["ours"] <= times["scp"],
    )  # fmt: skip


def from_host_to_host(folder: Path) -> Iterator[Row]:
    """A file that leaves the manager once, through a link that is slower than those between the hosts."""
    source = make_file(folder / "large", LARGE)
    with (
        ssh_hosts(HOSTS) as hosts,
        RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts)) as group,
        slow_manager(hosts, LINK),
    ):
        there = [host.path("~/large") for host in hosts]
        first = group.get_runtime(hosts.names[0])

        def one() -> None:
            clear(*there)
            first.send_file(source, "~/large", execute_async=False)

        def all_of_them() -> None:
            clear(*there)
            group.send_file(source, "~/large", execute_async=False, network="direct")

        times = in_turns(3, all=all_of_them, one=one)
        clear(source, *there)
    yield Row(
        f"{LARGE // 10**6} MB to {HOSTS} hosts, {LINK / 1e6:g} MB/s to them", times["all"], "s", "<= 2 x",
        "to one of them", times["one"], times["all"] <= 2 * times["one"],
    )  # fmt: skip


def small_files(folder: Path, hosts: Any, options: list[str], connection: SshConnection) -> Iterator[Row]:
    source, there, back = folder / "many", hosts[0].path("~/many"), folder / "back"
    for number in range(FILES):
        path = source / f"folder{number % 20}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(FILE_SIZE))
    ssh = f"ssh {' '.join(options)} {hosts.names[0]}"
    times = in_turns(
        9,
        send=ours(send, [there], (connection, source, "many")),
        again=ours(send, [], (connection, source, "many")),
        tar_to=theirs([there], f"tar -C {folder} -c many | {ssh} tar -x"),
        get=ours(get, [back], (connection, "many", back)),
        tar_from=theirs([back], f"mkdir {back}; {ssh} tar -c many | tar -C {back} -x"),
    )
    for what, mine, peer in (("to", "send", "tar_to"), ("from", "get", "tar_from")):
        yield Row(
            f"{FILES} files of {FILE_SIZE} bytes {what} a host", times[mine], "s", "<= 1.3 x", "tar | ssh tar, warm",
            times[peer], times[mine] <= 1.3 * times[peer],
        )  # fmt: skip
    yield Row(f"{FILES} files that are there unchanged", times["again"], "s")
