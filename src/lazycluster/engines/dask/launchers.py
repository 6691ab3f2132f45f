"""The launchers of Dask clusters: what scheduler and workers need beside what the engine's statement says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lazycluster.cluster.engine import Endpoint
from lazycluster.cluster.master_launcher import ServiceMasterLauncher
from lazycluster.cluster.service_spec import ServiceSpec
from lazycluster.cluster.worker_launcher import ServiceWorkerLauncher, Worker
from lazycluster.core import event_loop

from . import scaling
from .engine import DaskEngine

if TYPE_CHECKING:
    from lazycluster.cluster.services import Service
    from lazycluster.cluster.worker_hosts import WorkerHost
    from lazycluster.exceptions import LazyclusterError
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["LocalMasterLauncher", "RoundRobinLauncher"]


class LocalMasterLauncher(ServiceMasterLauncher):
    """Starts the scheduler on the manager, or on the first host of the group with ``network="direct"``.

    Args:
        runtime_group: The group where the workers will be started.
    """

    RESTARTS = 3
    """Number of restarts of a scheduler that dies, within minutes, on the same ports."""

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        self.dask = DaskEngine()
        super().__init__(runtime_group, self.dask)

    def spec(self, at: Endpoint) -> ServiceSpec:
        """Return what the scheduler is."""
        return replace(super().spec(at), restarts=self.RESTARTS)

    async def prepare(self, debug: bool) -> None:
        """Start the process, and get the user's modules ready for it: it unpickles the work for others, too."""
        await super().prepare(debug)
        await self._send_modules()
        await event_loop.in_thread(self.dask.configuration.get)

    async def _send_modules(self) -> None:
        if self.at.on_manager or self._service is None:
            await self.dask.modules.open()
            return
        for error in (await self.dask.modules.share([self._service.place])).values():
            raise error

    async def _renewed(self, service: Service) -> None:
        await super()._renewed(service)
        await self._send_modules()


class RoundRobinLauncher(ServiceWorkerLauncher):
    """Starts Dask workers on the hosts in turn. Each has a nanny, which is supervised in turn.

    Args:
        runtime_group: The group where the workers will be started.
    """

    RESTARTS = 5
    """Number of restarts of a nanny that dies, within minutes. A nanny starts its own worker again as it likes."""

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        self.dask = DaskEngine()
        super().__init__(runtime_group, self.dask)

    def spec(self, at: Endpoint) -> ServiceSpec:
        """Return what a worker is."""
        return replace(super().spec(at), restarts=self.RESTARTS)

    async def handshake(self, workers: Sequence[Worker]) -> Mapping[str, LazyclusterError]:
        """Check the software of the hosts, and send them the user's modules, before anything listens."""
        silent = await super().handshake(workers)
        others = [worker for worker in workers if worker.name not in silent]
        failed = await self.dask.modules.share([worker.place for worker in others])
        await event_loop.in_thread(self.dask.configuration.get)
        return {**silent, **{w.name: failed[w.place.host] for w in others if w.place.host in failed}}

    async def reprovision(self, place: WorkerHost) -> None:
        """Send the user's modules."""
        for error in (await self.dask.modules.share([place])).values():
            raise error

    async def retire(self, workers: Sequence[Worker]) -> dict[str, str]:
        """Have the scheduler retire workers."""
        return await scaling.retire(*scaling.access(self.dask, self.master.port), workers)

    async def choose_to_retire(self, workers: Sequence[Worker], count: int) -> list[Worker]:
        """Return those that have nothing to do, and hold the least; before them those that are not even there."""
        absent = [worker for worker in workers if worker.service.state != "ready"][:count]
        present = [worker for worker in workers if worker not in absent]
        wanted = count - len(absent)
        access = scaling.access(self.dask, self.master.port)
        spared = await scaling.choose_to_retire(*access, present, wanted) if wanted else []
        return [*absent, *(await super().choose_to_retire(present, wanted) if spared is None else spared)]
