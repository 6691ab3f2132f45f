"""A flow of Prefect on the hosts: prefect_flow.py CONFIG_FILE HOST[,HOST...]; prints JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from prefect import flow, task
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from prefect_dask import DaskTaskRunner

CONFIG, HOSTS = sys.argv[1], sys.argv[2]
GROUP = {"connection_kwargs": {"config_file": CONFIG}, "python": sys.executable}


@task
def where(number: int) -> tuple[int, str]:
    return number * number, os.uname().nodename


@flow
def squares() -> list[tuple[int, str]]:
    return [future.result() for future in where.map(range(6))]


def on_hosts(**options: Any) -> Any:
    """The factory that the documentation shows. Prefect sends it along, to hosts that have no lazycluster."""
    from lazycluster.cluster.dask_cluster import ssh_cluster

    cluster = ssh_cluster(HOSTS, group=GROUP, nthreads=1, **options)
    url = PREFECT_API_URL.value()
    cluster.runtime_group.expose_port_to_runtimes(int(url.split(":")[2].split("/")[0]))
    return cluster


def main() -> None:
    """Run the flow in each of the ways."""
    from lazycluster.cluster.dask_cluster import DaskCluster

    found = {}
    with prefect_test_harness(server_startup_timeout=120):
        runner = DaskTaskRunner(cluster_class=on_hosts, adapt_kwargs={"minimum": 2, "maximum": 2})
        found["cluster_class"] = squares.with_options(task_runner=runner)()
        with on_hosts() as cluster:
            secured = {"security": cluster.security}
            runner = DaskTaskRunner(address=cluster.scheduler_address, client_kwargs=secured)
            found["address"] = squares.with_options(task_runner=runner)()
            path = cluster.write_connection_file("cluster.json")
            with DaskCluster.connect(path) as client:
                address, secured = client.scheduler.address, {"security": client.security}
            runner = DaskTaskRunner(address=address, client_kwargs=secured)
            found["connection file"] = squares.with_options(task_runner=runner)()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
