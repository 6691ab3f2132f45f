"""The workers of a Hyperopt cluster, and what becomes of the trials of those that have gone."""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lazycluster.cluster.engine import Endpoint
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.service_spec import ServiceSpec
from lazycluster.cluster.services import Service
from lazycluster.cluster.worker_launcher import ServiceWorkerLauncher, Worker
from lazycluster.core import event_loop
from lazycluster.core.words import counted

from .database import database
from .engine import HyperoptEngine
from .leases import LeaseKeeper
from .objectives import send_local_modules
from .programs import compat, trials

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["RoundRobinLauncher"]

logger = logging.getLogger("lazycluster")

_TOLD = 5  # workers whose end is told
_CONNECTIONS = 6  # to the database, of each worker: two processes, each of which looks after its server, too
_OTHER_CONNECTIONS = 8  # of the manager


class RoundRobinLauncher(ServiceWorkerLauncher):
    """Starts Hyperopt workers on the hosts in turn, each of them supervised.

    Args:
        runtime_group: The group where the workers will be started.
        dbname: The name of the database.
        poll_interval: Seconds between two looks of an idle worker for a trial, at most.

    Raises:
        ValueError: If the name is empty, or the interval is not a positive number.
    """

    RESTARTS = 10
    """Number of restarts of a worker that dies, within minutes. An objective does not make it die."""

    def __init__(self, runtime_group: RuntimeGroup, dbname: str, poll_interval: float) -> None:
        self.hyperopt = HyperoptEngine(dbname=dbname, poll_interval=poll_interval)
        super().__init__(runtime_group, self.hyperopt)
        self._threads: list[threading.Thread] = []
        self._master: int | None = None
        self._leases: LeaseKeeper | None = None

    def spec(self, at: Endpoint) -> ServiceSpec:
        """Return what a worker is."""
        return replace(super().spec(at), restarts=self.RESTARTS)

    def check_ports(self, count: int, ports: Sequence[int]) -> None:
        """Refuse to start more workers than the database could serve: they would be started first."""
        _check_descriptors(count + len(self.workers))
        super().check_ports(count, ports)

    def start(
        self, worker_count: int, master_port: int, ports: list[int] | None = None, debug: bool = True
    ) -> list[int]:
        """Start workers in the group.

        Args:
            worker_count: How many.
            master_port: The port of the database.
            ports: Without use: workers listen on no port.
            debug: Whether the output of the workers is printed as it comes.

        Returns:
            `ports`, as they were given.

        Raises:
            ClusterError: If a worker does not start; the message has its output.
        """
        self._master = master_port
        left = super().start(worker_count, master_port, list(ports or []), debug)
        send_local_modules()
        self._say_what_is_left(master_port)
        if self._leases is None:
            self._leases = LeaseKeeper(self.hyperopt, master_port)
        return left

    async def scale(self, count: int, master_port: int, ports: list[int]) -> None:
        """Start workers, or have some leave; see `ServiceWorkerLauncher.scale`."""
        try:
            await super().scale(count, master_port, ports)
        finally:
            await event_loop.in_thread(self._say_what_is_left, master_port)

    async def leave(self, workers: Sequence[Worker]) -> None:
        """End workers, and put what they work on back into the queue."""
        await super().leave(workers)
        if (port := self._master) is not None:
            for worker in workers:
                await event_loop.in_thread(self._gone, worker.name, port)

    # --- workers that have gone for good -------------------------------------------------------
    def changed(self, service: Service) -> None:
        """Put the trial of a worker that is not started again back into the queue. For the event loop's thread."""
        port = self._master
        worker = next((one for one in [*self.workers, *self._prepared] if one.service is service), None)
        if port is not None and worker is not None:
            if service.state == "failed":
                self._in_thread(lambda: self._gone(worker.name, port))
            elif service.state == "ready" and worker in self.workers:
                self._in_thread(lambda: self._say_what_is_left(port))

    def _in_thread(self, work: Callable[[], None]) -> None:
        """Do something that waits for the database."""

        def run() -> None:
            from pymongo.errors import PyMongoError

            try:
                work()
            except PyMongoError as error:
                logger.error("the database could not be told that a worker has ended: %s", compat.unreachable(error))

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=run, name="lazycluster-put-back", daemon=True))
        self._threads[-1].start()

    def _gone(self, name: str, port: int) -> None:
        with database(self.hyperopt.access, port) as found:
            number = compat.patient(lambda: trials.put_back(found.jobs, name, f"the worker {name} has gone"))
        if number:
            logger.warning("%s has ended; %d of its trials are put back into the queue", name, number)
        self._say_what_is_left(port)

    def _say_what_is_left(self, port: int) -> None:
        """Tell searches that wait for a result if there is nobody left who could give them one."""
        gone = [worker for worker in self.workers if worker.service.state in ("failed", "ended")]
        problem = None
        if self.workers and len(gone) == len(self.workers):
            causes = [f"{one.name}: {getattr(one.service.error, 'problem', 'it has ended')}" for one in gone[:_TOLD]]
            more = [f"and {len(gone) - _TOLD} more"] if len(gone) > _TOLD else []
            problem = (
                f"no worker is left that could evaluate trials ({'; '.join([*causes, *more])})\n  Next step: end this "
                "cluster, start one on the same dbpath with hosts that can be reached, and call fmin with the same "
                "exp_key: the trials are kept"
            )
            logger.error("%s", problem)
        with database(self.hyperopt.access, port) as found:
            compat.patient(lambda: compat.tell_problem(found, problem))

    def cleanup(self) -> None:
        """End the workers. Doing it again does nothing."""
        self._master = None  # what ends from now on ends because it is to
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if self._leases is not None:
            self._leases.stop()
            self._leases = None
        super().cleanup()


def _check_descriptors(count: int) -> None:
    """Refuse more workers than the database could serve, which would close their connections.

    Raises:
        ClusterError: If so.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = count * _CONNECTIONS + _OTHER_CONNECTIONS
    if limit != resource.RLIM_INFINITY and needed > limit - limit // 3:
        raise ClusterError(
            f"{counted(count, 'worker')} have up to {needed} connections to the database, and a process on this "
            f"machine may have only {limit} open files\n"
            f"  Next step: start fewer, or allow more before you start Python: ulimit -n {max(1024, 2 * needed)}"
        )
