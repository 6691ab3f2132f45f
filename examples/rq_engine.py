"""An engine of your own: Redis on this machine, and RQ workers (https://python-rq.org) on the hosts.

`pip install rq` here and on the hosts, `redis-server` here. "An engine of your own" in the documentation explains it.
"""

from __future__ import annotations

import operator
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import redis
import rq

from lazycluster import RuntimeGroup
from lazycluster.engine import Endpoint, Engine, EngineCluster, Option, ServiceSpec

_CONFIGURATION = """\
bind {address}
port {port}
requirepass {password}
save ""
dir {folder}
"""


class RQ(Engine):
    """Redis holds the queue; workers take jobs from it."""

    name, cluster = "rq", "RQCluster"
    packages = same_versions = ("rq", "redis")
    master_needs = ("redis-server",)
    options = (Option("--queue", "queue", "The name of the queue (default).", "NAME", default="default"),)
    summary = "Start a cluster of RQ workers."

    def __init__(self, queue: str = "default") -> None:
        self.queue = queue
        self.password = secrets.token_urlsafe(24)

    def master(self, at: Endpoint) -> ServiceSpec:
        """Redis: its password stands in a file that only this user can read, and that goes when it ends."""
        settings = {"address": at.address, "port": at.port, "password": self.password, "folder": at.scratch}
        return ServiceSpec(
            "redis",
            command=("redis-server", f"{at.scratch}/redis.conf"),
            files={"redis.conf": _CONFIGURATION.format(**settings)},
            ready="Ready to accept connections",
            port_taken="Address already in use",
            restarts=3,
            at_restart="jobs that were not done are lost",
        )

    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        """A worker of RQ: the address of Redis, with the password, is in its environment only."""
        return ServiceSpec(
            "rq-worker",
            command=(at.python, "-m", "rq.cli", "worker", self.queue),
            secrets={"RQ_REDIS_URL": f"redis://:{self.password}@{master.address}:{master.port}"},
            ready="Listening on",
            restarts=10,
        )

    def connection(self, master: Endpoint) -> dict[str, Any]:
        """What another process needs: it stands in the connection file."""
        return {"port": master.port, "password": self.password, "queue": self.queue}

    @classmethod
    def client(cls, connection: Mapping[str, Any]) -> rq.Queue:
        """The queue, for `RQCluster.connect`."""
        server = redis.Redis(Endpoint.address, connection["port"], password=connection["password"])
        return rq.Queue(connection["queue"], connection=server)


class RQCluster(EngineCluster):
    """A cluster of RQ workers."""

    engine_class = RQ
    DEFAULT_MASTER_PORT = 16379


def main(hosts: list[str]) -> None:
    """Multiply on the hosts."""
    with RuntimeGroup(hosts=hosts) as group, RQCluster(group) as cluster:
        cluster.start()
        cluster.write_connection_file("rq.json")
        queue = RQCluster.connect("rq.json")
        job = queue.enqueue(operator.mul, 6, 7)
        print(job.latest_result(timeout=30).return_value)
        queue.connection.close()


if __name__ == "__main__":
    main(sys.argv[1:])
