"""A Dask cluster: until the workers answer, and work through tunnels or from host to host, both with TLS.

Beside it distributed's own SSHCluster, which connects everything directly, without tunnels, TLS or supervision, and
leaves checking versions to the user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import Row, seconds, settings, spread, ssh_hosts

from lazycluster import RuntimeGroup
from lazycluster.cluster.certificates import make_credentials
from lazycluster.cluster.dask_cluster import DaskCluster

COUNTS = (3, 8, 16)
REPEAT = 5
PAIRS = 7


@contextlib.contextmanager
def lazycluster(hosts: Any, network: Any = "tunnel") -> Iterator[Any]:
    """A client of our cluster; hosts not yet connected."""
    group = RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts), python=sys.executable)
    with group, DaskCluster(group, network=network) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            client.wait_for_workers(len(hosts))
            yield client


direct = partial(lazycluster, network="direct")


@contextlib.contextmanager
def ssh_cluster(hosts: Any) -> Iterator[Any]:
    """A client of distributed's SSHCluster; the scheduler runs on the first host."""
    from distributed import Client, SSHCluster

    options = {"known_hosts": None, "username": hosts[0].user, "client_keys": [str(hosts.key_file)]}
    addresses = [host.address for host in hosts]
    with (
        SSHCluster([addresses[0], *addresses], connect_options=options, remote_python=sys.executable) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(len(hosts))
        yield client


@contextlib.contextmanager
def by_hand(hosts: Any) -> Iterator[Any]:
    """A client of a scheduler and workers with TLS that were started over ssh, each by its own command."""
    from distributed import Client, Security

    made = make_credentials()
    texts = {"ca.pem": made.authority, "cert.pem": made.worker.certificate, "key.pem": made.worker.key}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, text in texts.items():
            (folder / name).write_text(text)
        files = " ".join(
            f"--tls-{what} /tmp/{name}" for what, name in zip(("ca-file", "cert", "key"), texts, strict=True)
        )
        ssh = ["ssh", "-F", hosts.config_file]
        for host in hosts:
            subprocess.run(
                ["scp", "-q", "-F", hosts.config_file, *map(str, folder.iterdir()), f"{host.name}:/tmp/"], check=True
            )

        def run(host: Any, command: str) -> None:
            # With a terminal, so that it ends with its ssh.
            started = subprocess.Popen(
                [*ssh, "-tt", host.name, f"{sys.executable} -m {command} {files} --no-dashboard"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(started.wait)
            stack.callback(started.terminate)

        run(hosts[0], f"distributed.cli.dask_scheduler --protocol tls --host {hosts[0].address} --port 8786")
        scheduler = f"tls://{hosts[0].address}:8786"
        for host in hosts:
            run(host, f"distributed.cli.dask_worker {scheduler} --protocol tls --host {host.address}")
        with Client(scheduler, security=Security(**made.for_role("client")), timeout=60) as client:
            client.wait_for_workers(len(hosts), timeout=60)
            yield client


def _start(contender: Any, hosts: Any) -> float:
    stack = contextlib.ExitStack()

    def work() -> None:
        client = stack.enter_context(contender(hosts))
        assert client.submit(sum, [1, 2]).result() == 3

    with stack:
        return seconds(work)


def _matrix(client: Any) -> None:
    import dask.array as da

    numbers = da.random.random((4000, 4000), chunks=(1000, 1000))
    float((numbers @ numbers.T).sum().compute())


def _shuffle(client: Any) -> None:
    import dask.datasets

    frame = dask.datasets.timeseries(end="2000-01-08", partition_freq="6h")
    frame.shuffle("id", shuffle_method="p2p").x.sum().compute()


def _transfer(client: Any) -> float:
    """Return the seconds that 100 MB take from one worker to another."""
    first, second, *_ = sorted(client.scheduler_info(n_workers=-1)["workers"])
    data = client.submit(os.urandom, 100_000_000, workers=[first], pure=False)
    client.submit(len, data, workers=[first]).result()
    return seconds(lambda: client.submit(len, data, workers=[second], pure=False).result())


def rows() -> Iterator[Row]:
    """Yield the lines of the table."""
    import asyncssh  # noqa: F401  (so that no contender's first start pays for imports)
    import distributed  # noqa: F401

    warnings.simplefilter("ignore")
    logging.getLogger("distributed.deploy.ssh").setLevel(logging.ERROR)  # it passes on all that the hosts print
    for count in COUNTS:
        with ssh_hosts(count) as hosts:
            times: dict[Any, list[float]] = {lazycluster: [], direct: [], ssh_cluster: []}
            for _ in range(REPEAT):
                for contender, measured in times.items():
                    measured.append(_start(contender, hosts))
            ours, straight, theirs = (statistics.median(measured) for measured in times.values())
            what = f"hosts not yet connected until {count} Dask workers answer"
            yield Row(what, ours, "s", "<= 1.2 x", "SSHCluster", theirs, ours <= 1.2 * theirs)
            yield Row(f"{what}, direct", straight, "s", "<= 1.0 x", "SSHCluster", theirs, straight <= theirs)
    yield from works()


def works() -> Iterator[Row]:
    """Yield what work takes on clusters that are there at the same time: in turns, each beside its peers."""
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(ssh_hosts(3))
        contenders: dict[str, Any] = {"tunnel": lazycluster, "direct": direct, "hand": by_hand, "ssh": ssh_cluster}
        clients = {name: stack.enter_context(contender(hosts)) for name, contender in contenders.items()}
        tasks: list[tuple[str, Callable[[Any], None], float]] = [
            ("matrix product 4000 x 4000, 3 hosts", _matrix, 1.15),
            ("dataframe shuffle, 600,000 rows, 3 hosts", _shuffle, 1.05),
        ]
        for what, work, most in tasks:
            times = _in_turns(partial(_timed, work), clients, PAIRS)
            yield _beside(what, times, "tunnel", "ssh", "SSHCluster, no TLS")
            yield _beside(f"{what}, direct with TLS", times, "direct", "ssh", "SSHCluster, no TLS", most)
            yield _beside(f"{what}, direct with TLS", times, "direct", "hand", "workers started by hand, TLS")
        del clients["ssh"]
        times = _in_turns(_transfer, clients, 2 * PAIRS)
        what = "100 MB from worker to worker, direct with TLS"
        yield _beside(what, times, "direct", "tunnel", "tunnels", 0.4)
        yield _beside(what, times, "direct", "hand", "workers started by hand, TLS", 1.1)


def _timed(work: Callable[[Any], None], client: Any) -> float:
    """Return the seconds that some work takes on a cluster."""
    return seconds(partial(work, client))


def _in_turns(work: Callable[[Any], float], clients: dict[str, Any], repeat: int) -> dict[str, list[float]]:
    """Return the seconds of each contender, after one turn that does not count."""
    turns = [{name: work(client) for name, client in clients.items()} for _ in range(repeat + 1)][1:]
    return {name: [turn[name] for turn in turns] for name in clients}


def _beside(
    what: str, times: dict[str, list[float]], ours: str, theirs: str, peer: str, most: float | None = None
) -> Row:
    """Return the line of two contenders: their medians, and the ratios of their turns."""
    ratios = [own / other for own, other in zip(times[ours], times[theirs], strict=True)]
    note = f"ratio in {len(ratios)} pairs: {spread(ratios)}"
    target, met = ("", None) if most is None else (f"<= {most:g} x", statistics.median(ratios) <= most)
    medians = statistics.median(times[ours]), statistics.median(times[theirs])
    return Row(what, medians[0], "s", target, peer, medians[1], met, note)
