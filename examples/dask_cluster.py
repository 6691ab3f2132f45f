"""A Dask cluster on the hosts that are named on the command line, or on this machine if there is none.

Usage: python examples/dask_cluster.py [host ...]

The hosts need an SSH server, and Python with dask of the same versions as here.
"""

from __future__ import annotations

import socket
import sys

from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.runtimes import LocalRuntime


def main(hosts: list[str]) -> None:
    """Start a cluster, use it, and end it."""
    group = RuntimeGroup(hosts=hosts) if hosts else RuntimeGroup([LocalRuntime()])
    with group, DaskCluster(group) as cluster:
        cluster.start()
        print(f"dashboard: {cluster.dashboard_link}")
        client = cluster.get_client()

        squares = client.map(lambda x: x * x, range(1000))
        print(f"sum of squares: {client.submit(sum, squares).result()}")
        for address, name in client.run(socket.gethostname).items():
            print(f"{address} is on {name}")
        client.close()


if __name__ == "__main__":
    main(sys.argv[1:])
