"""The workers that a cluster has: who they are, and how some or all of them leave."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lazycluster.core import event_loop
from lazycluster.ssh.tunnels import Tunnel

from .contracts import WorkerLauncher
from .exceptions import ClusterError
from .health import Watch
from .network import Network, PortSupply
from .services import Service, stop_all
from .worker_hosts import WorkerHost

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["ENDED", "Staff", "Worker"]

T = TypeVar("T")

ENDED = "the cluster was ended meanwhile"
"""What those are told who start or change something that another thread ends."""


@dataclass
class Worker:
    """A worker that is to be, or is there.

    Attributes:
        name: Its name, unique in the cluster.
        place: Where it runs.
        siblings: How many workers the cluster has on this host.
        service: Its process.
        ports: Its ports, by what they are for.
    """

    name: str
    place: WorkerHost
    siblings: int
    service: Service
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def has_gone(self) -> bool:
        """Whether its process has ended for good."""
        return self.service.state in ("ended", "failed")


class Staff(WorkerLauncher):
    """The part of a launcher that knows the workers, and ends them."""

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        super().__init__(runtime_group)
        self.network = Network()
        self.network.on_lost = self._port_lost
        self.watch: Watch | None = None
        self.workers: list[Worker] = []
        self._prepared: list[Worker] = []
        self._numbers: dict[str, int] = {}
        self._supplies: list[PortSupply] = []
        self._at_work: set[asyncio.Task[Any]] = set()

    # --- what an engine states -----------------------------------------------------------------
    async def dismiss(self, workers: Sequence[Worker]) -> dict[str, str]:
        """Have workers hand over what they hold to those that stay; returns by name why some must not leave."""
        return {}

    async def expendable(self, workers: Sequence[Worker], count: int) -> list[Worker]:
        """Return as many of some workers as are to leave: those that are missed the least."""
        restarting = [worker for worker in workers if worker.service.state != "ready"]
        others = [worker for worker in reversed(workers) if worker not in restarting]
        return [*restarting, *others][:count]

    # --- shared --------------------------------------------------------------------------------
    @property
    def services(self) -> list[Service]:
        """The services of the workers."""
        return [worker.service for worker in [*self.workers, *self._prepared]]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something with the workers, from a user's thread; `cleanup` puts an end to it.

        Raises:
            ClusterError: If that happened.
        """
        try:
            return event_loop.run(self._tracked(work))
        except concurrent.futures.CancelledError:
            raise ClusterError(ENDED) from None

    async def _tracked(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._at_work.add(task)
        try:
            return await work
        finally:
            self._at_work.discard(task)

    def _per_host(self) -> Counter[str]:
        return Counter(worker.place.host for worker in self.workers)

    def _port_lost(self, tunnel: Tunnel) -> None:
        """End the workers behind a port that somebody else has taken: they would go on talking to him, in vain."""
        ours = tunnel.direction == "from_runtime"
        port, owner = (tunnel.local_port, "the manager") if ours else (tunnel.remote_port, tunnel.host)
        role = "by which it was reached" if ours else "by which it reached the rest of the cluster"
        problem = (
            f"port {port} of {owner}, {role}, could not be opened again after the link to {tunnel.host} was "
            "interrupted: another program listens there now, or the sshd forbids it"
        )
        hint = f"find that program on {owner} (ss -ltnp), end it, and start another worker with scale()"
        for worker in [*self.workers, *self._prepared]:
            if worker.place.network == tunnel.network and (not ours or port in worker.ports.values()):
                worker.service.give_up(problem, hint)

    # --- leaving -------------------------------------------------------------------------------
    async def forget_gone(self) -> None:
        """Let go of what belonged to workers whose processes have ended for good."""
        await self._let_go([worker for worker in self.workers if worker.has_gone])

    async def leave(self, workers: Sequence[Worker]) -> None:
        """End workers once they have handed over what they hold.

        Raises:
            ClusterError: If some cannot; those stay, the others have left.
        """
        refused = await self.dismiss(workers) if workers else {}
        await self._let_go([worker for worker in workers if worker.name not in refused])
        if refused:
            raise ClusterError("\n".join(["not all workers could leave:", *(f"  {why}" for why in refused.values())]))

    async def _let_go(self, workers: Sequence[Worker]) -> None:
        self.workers = [worker for worker in self.workers if worker not in workers]
        for worker in workers:
            listed = self._ports_per_host.get(worker.place.host, [])
            listed[:] = [port for port in listed if port not in worker.ports.values()]
            if not listed:
                self._ports_per_host.pop(worker.place.host, None)
            self._tunnelled.difference_update((worker.place.host, port) for port in worker.ports.values())
        await self._clear(workers)
        self._supplies = [supply for supply in self._supplies if supply.in_use]

    async def _clear(self, workers: Sequence[Worker]) -> None:
        """End the processes of workers, and free their ports."""
        await stop_all([worker.service for worker in workers])
        for worker in workers:
            for port in worker.ports.values():
                await self.network.close(port)
            for supply in self._supplies:
                supply.release(worker.ports.values())

    # --- the end -------------------------------------------------------------------------------
    async def _drop_prepared(self) -> None:
        dropped, self._prepared = self._prepared, []
        await self._clear(dropped)

    async def _stop(self) -> None:
        work = set(self._at_work)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        services = self.services
        try:
            await stop_all(services)
        finally:  # also if Ctrl-C puts an end to the waiting: they were told
            self.workers, self._prepared = [], []
            await self.network.close()
            for supply in self._supplies:
                supply.release()
            self._supplies.clear()

    def cleanup(self) -> None:
        """End the workers. Doing it again does nothing."""
        event_loop.run(self._stop())
        self._numbers.clear()
        super().cleanup()
