"""The tunnels of a cluster on 64 hosts with a worker each: 64 x 63 from host to host, one per worker to the manager."""

from __future__ import annotations

import time
from collections.abc import Iterator

from harness import Row, settings, ssh_hosts

from lazycluster import RuntimeGroup
from lazycluster.cluster.network import Listener, Network, Reach
from lazycluster.cluster.worker_hosts import places_of
from lazycluster.core import event_loop

COUNT = 64
FIRST_PORT = 25100


def rows() -> Iterator[Row]:
    with ssh_hosts(COUNT) as hosts:
        start = time.perf_counter()
        with RuntimeGroup(hosts=list(hosts.names), connection_kwargs=settings(hosts)) as group:
            yield Row(f"connect {COUNT} hosts", time.perf_counter() - start, "s")
            places = places_of(group)
            listeners = [Listener(place, FIRST_PORT + i, Reach.ALL) for i, place in enumerate(places)]
            network = Network()
            start = time.perf_counter()
            failed = event_loop.run(network.open(listeners, places))
            took = time.perf_counter() - start
            assert not failed, failed
            yield Row(f"open the {COUNT * COUNT} tunnels of {COUNT} workers", took, "s")
            start = time.perf_counter()
            event_loop.run(network.close())
            yield Row("close them", time.perf_counter() - start, "s")
