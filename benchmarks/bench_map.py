"""Calls spread over hosts, beside execnet, ipyparallel and Dask; a grid search beside joblib's Dask backend."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Row, in_turns, seconds, settings, ssh_hosts

from lazycluster import RuntimeGroup

MANY, CHUNK = 100_000, 100
NAPS, NAP = 1000, 0.01
BOUND = 200_000_000
_RECEIVED = 1  # column of /proc/net/dev


def same(x: int) -> int:
    return x


def nap(_: int) -> None:
    time.sleep(NAP)


def chunk_of(numbers: list[int]) -> list[int]:
    return [same(x) for x in numbers]


def use(data: bytes, index: int) -> int:
    return data[index]


@contextlib.contextmanager
def grouped(hosts: Any, count: int) -> Iterator[RuntimeGroup]:
    names = list(hosts.names)[:count]
    with RuntimeGroup(hosts=names, connection_kwargs=settings(hosts), python=sys.executable) as group:
        yield group


def rows() -> Iterator[Row]:
    warnings.simplefilter("ignore")
    with ssh_hosts(8) as hosts:
        yield from one_host(hosts)
        yield from bound_object(hosts)
        yield from naps(hosts)
        yield from many(hosts)
    with ssh_hosts(3) as hosts:
        yield from grid_search(hosts)


# --- one host, beside execnet ------------------------------------------------------------------------------
def one_host(hosts: Any) -> Iterator[Row]:
    import execnet

    remote = execnet.makegateway(f"ssh=-F {hosts.config_file} {hosts.names[0]}//python={sys.executable}")
    echo = remote.remote_exec("while True:\n    channel.send(channel.receive())")

    def round_trip() -> None:
        echo.send(1)
        assert echo.receive() == 1

    def pipelined() -> None:
        for number in range(1000):
            echo.send(number)
        for _ in range(1000):
            echo.receive()

    with grouped(hosts, 1) as group, group.executor() as executor:

        def submitted() -> None:
            for future in [executor.submit(same, number) for number in range(1000)]:
                future.result()

        def mapped(count: int) -> None:
            assert list(group.map(same, range(count))) == list(range(count))

        mapped(1000)
        submitted()
        times = in_turns(101, ours=lambda: mapped(1), submit=lambda: executor.submit(same, 1).result(), peer=round_trip)
        ours, submit, peer = (times[name] * 1000 for name in ("ours", "submit", "peer"))
        met = ours <= 1.2 * peer + 0.5
        what = "one warm call through group.map"
        yield Row(what, ours, "ms", "<= 1.2 x + 0.5 ms", "execnet round trip", peer, met, f"submit: {submit:.2f} ms")
        times = in_turns(9, ours=lambda: mapped(1000), submit=submitted, peer=pipelined)
        ours, submit, peer = (times[name] * 1000 for name in ("ours", "submit", "peer"))
        what = "1000 trivial calls on one host, chunks of 1"
        yield Row(what, ours, "ms", "<= 1.5 x", "execnet", peer, ours <= 1.5 * peer, f"1000 submits: {submit:.0f} ms")
    remote.exit()


# --- many hosts --------------------------------------------------------------------------------------------
def naps(hosts: Any) -> Iterator[Row]:
    with grouped(hosts, 8) as group, group.executor(workers_per_host=4) as executor:
        list(executor.map(nap, range(200)))
        took = in_turns(5, ours=lambda: list(executor.map(nap, range(NAPS))))["ours"]
    ideal = NAPS * NAP / 32
    yield Row(
        "1000 calls that sleep 10 ms, 8 hosts x 4 workers: ideal time / ours",
        100 * ideal / took,
        "%",
        ">= 90 %",
        met=ideal / took >= 0.9,
    )


def bound_object(hosts: Any) -> Iterator[Row]:
    data = os.urandom(BOUND)
    with grouped(hosts, 2) as group:
        list(group.map(same, range(10)))
        before = [_received(host) for host in list(hosts)[:2]]
        start = time.perf_counter()
        assert list(group.map(functools.partial(use, data), range(50))) == list(data[:50])
        took = time.perf_counter() - start
        sent = max((_received(host) - was) / 1e6 for host, was in zip(list(hosts)[:2], before, strict=True))
    yield Row("partial(f, 200 MB) over 50 items, 2 hosts: most bytes to a host", sent, "MB", "< 260 MB", met=sent < 260)
    yield Row("the same: time", took, "s")


def _received(host: Any) -> int:
    lines = Path(f"/proc/{host.pid}/net/dev").read_text().splitlines()[2:]
    return sum(int(line.replace(":", " ").split()[_RECEIVED]) for line in lines if not line.strip().startswith("lo:"))


def many(hosts: Any) -> Iterator[Row]:
    with grouped(hosts, 4) as group:

        def ours() -> None:
            assert sum(group.map(same, range(MANY), chunksize=CHUNK)) == sum(range(MANY))

        ours()
        took = in_turns(5, ours=ours)["ours"]
    rate = MANY / took / 1000
    what = f"{MANY:,} trivial calls in chunks of {CHUNK}, 4 hosts"
    for peer, contender, times in (
        ("ipyparallel", ipyparallel_on, 3),
        ("Dask, client.map", dask_on, 1),
        ("Dask, client.map of chunks made by hand", dask_on_chunks, 3),
    ):
        with contender(hosts) as run:
            run(range(MANY // 10))
            theirs = MANY / min(seconds(lambda: run(range(MANY))) for _ in range(times)) / 1000
        yield Row(what, rate, "k/s", ">= 2 x", peer, theirs, rate >= 2 * theirs)


@contextlib.contextmanager
def ipyparallel_on(hosts: Any) -> Iterator[Any]:
    import ipyparallel

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        where = [f"--ipython-dir={folder}", f"--profile-dir={folder}", "--log-level=ERROR"]
        address = hosts.manager_address
        argv = [sys.executable, "-m", "ipyparallel.controller", f"--ip={address}", f"--location={address}", *where]
        stack.enter_context(_running(argv))
        file = Path(folder, "security", "ipcontroller-engine.json")
        while not file.exists() or not file.read_text().rstrip().endswith("}"):
            time.sleep(0.05)
        for host in list(hosts)[:4]:
            host.path("~/engine.json").write_text(file.read_text())
            argv = [sys.executable, "-m", "ipyparallel.engine", f"--file={host.home}/engine.json", "--log-level=ERROR"]
            for _ in range(2):
                stack.enter_context(_running(host.inside(argv, user="root")))
        client = stack.enter_context(ipyparallel.Client(str(file.with_name("ipcontroller-client.json")), timeout=60))
        client.wait_for_engines(8, timeout=60)
        view = client.load_balanced_view()
        function = lambda x: x  # noqa: E731
        function.__module__ = "__main__"  # else the engines would import this file

        def run(numbers: range) -> None:
            assert sum(view.map_sync(function, numbers, chunksize=CHUNK)) == sum(numbers)

        yield run


@contextlib.contextmanager
def _running(argv: list[str]) -> Iterator[None]:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def dask_client(hosts: Any, count: int) -> Iterator[Any]:
    from distributed import Client, SSHCluster

    logging.getLogger("distributed.deploy.ssh").setLevel(logging.ERROR)
    options = {"known_hosts": None, "username": hosts[0].user, "client_keys": [str(hosts.key_file)]}
    addresses = [host.address for host in list(hosts)[:count]]
    with (
        SSHCluster([addresses[0], *addresses], connect_options=options, remote_python=sys.executable) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(count)
        yield client


@contextlib.contextmanager
def dask_on(hosts: Any) -> Iterator[Any]:
    with dask_client(hosts, 4) as client:

        def run(numbers: range) -> None:
            assert sum(client.gather(client.map(lambda x: x, numbers, batch_size=CHUNK, pure=False))) == sum(numbers)

        yield run


@contextlib.contextmanager
def dask_on_chunks(hosts: Any) -> Iterator[Any]:
    with dask_client(hosts, 4) as client:

        def run(numbers: range) -> None:
            chunks = [list(numbers[start : start + CHUNK]) for start in range(0, len(numbers), CHUNK)]
            results = client.gather(client.map(lambda chunk: list(chunk), chunks, pure=False))
            assert sum(map(sum, results)) == sum(numbers)

        yield run


# --- joblib --------------------------------------------------------------------------------------------------
def grid_search(hosts: Any) -> Iterator[Row]:
    import joblib
    from sklearn.datasets import make_classification
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    features, labels = make_classification(1500, 40, random_state=0)

    def search() -> None:
        GridSearchCV(SVC(), {"C": [0.1, 1, 10, 100], "gamma": [0.01, 0.1]}, cv=3).fit(features, labels)

    with grouped(hosts, 3) as group, dask_client(hosts, 3):

        def ours() -> None:
            with joblib.parallel_config("lazycluster", group=group):
                search()

        def dask() -> None:
            with joblib.parallel_config("dask"):
                search()

        ours()
        dask()
        times = in_turns(5, ours=ours, dask=dask)
    met = times["ours"] <= 1.1 * times["dask"]
    what = "joblib: grid search of an SVC, 24 fits, 3 hosts"
    yield Row(what, times["ours"], "s", "<= 1.1 x", "joblib's Dask backend", times["dask"], met)
