"""A Dask cluster: until the workers answer, and work through tunnels with TLS, beside distributed's own SSHCluster.

SSHCluster connects everything directly, without tunnels, TLS or supervision, and leaves checking versions to the user.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from harness import Row, seconds, settings, ssh_hosts

from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster

COUNTS = (3, 8, 16)
REPEAT = 3


@contextlib.contextmanager
def lazycluster(hosts: Any) -> Iterator[Any]:
    """A client of our cluster; hosts not yet connected."""
    group = RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts), python=sys.executable)
    with group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            client.wait_for_workers(len(hosts))
            yield client


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


def rows() -> Iterator[Row]:
    """Yield the lines of the table."""
    import asyncssh  # noqa: F401  (so that no contender's first start pays for imports)
    import distributed  # noqa: F401

    warnings.simplefilter("ignore")
    logging.getLogger("distributed.deploy.ssh").setLevel(logging.ERROR)  # it passes on all that the hosts print
    for count in COUNTS:
        with ssh_hosts(count) as hosts:
            times: dict[Any, list[float]] = {lazycluster: [], ssh_cluster: []}
            for _ in range(REPEAT):
                for contender, measured in times.items():
                    measured.append(_start(contender, hosts))
            ours, theirs = (statistics.median(measured) for measured in times.values())
            what = f"hosts not yet connected until {count} Dask workers answer"
            yield Row(what, ours, "s", "<= 1.2 x", "SSHCluster", theirs, ours <= 1.2 * theirs)
    with ssh_hosts(3) as hosts:
        for what, work in (("matrix product 4000 x 4000", _matrix), ("dataframe shuffle, 600,000 rows", _shuffle)):
            figures = []
            for contender in (lazycluster, ssh_cluster):
                with contender(hosts) as client:
                    work(client)
                    figures.append(statistics.median(seconds(partial(work, client)) for _ in range(REPEAT)))
            yield Row(f"{what}, 3 hosts", figures[0], "s", "", "SSHCluster", figures[1])
