"""What a Dask cluster is made of: its settings, and how its scheduler and its workers are started."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.certificates import Credentials, make_credentials
from lazycluster.cluster.local_modules import LocalModules
from lazycluster.cluster.master_launcher import ServiceMasterLauncher
from lazycluster.cluster.network import PortUse, Reach
from lazycluster.cluster.programs import Program, Source
from lazycluster.cluster.sent.messages import LOOPBACK, MARKER, versions
from lazycluster.cluster.versions import CheckVersions, Software
from lazycluster.cluster.worker_launcher import ServiceWorkerLauncher, Worker
from lazycluster.core import event_loop
from lazycluster.utils import Environment

from . import scaling
from .configuration import configuration
from .programs import common
from .programs.worker import BEFORE_START

if TYPE_CHECKING:
    from lazycluster.cluster.worker_hosts import WorkerHost
    from lazycluster.exceptions import LazyclusterError
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["SOFTWARE", "CheckVersions", "DaskSettings", "LocalMasterLauncher", "RoundRobinLauncher"]

_SHARED = ("cluster.sent", "agent.filenames", "agent.localmodules", "agent.oom", "agent.ownership")
# What Dask itself wants to be the same everywhere, since it sends pickles and its own messages.
SOFTWARE = Software("DaskCluster", "dask", ("dask", "distributed"), ("dask", "distributed", "cloudpickle"))


def _source(module: str) -> Source:
    return Source.of(f"lazycluster.engines.dask.programs.{module}", "lazycluster_dask", _SHARED)


@dataclass
class DaskSettings:
    """What the parts of one cluster have in common.

    Attributes:
        nthreads: Threads per worker; None: the host's cores, divided by its workers.
        memory_limit: Memory per worker, as distributed takes it; ``auto``: the host's, divided by its workers.
        resources: Abstract resources of each worker.
        local_directory: Where workers write what does not fit in memory; None: a directory that is removed at the end.
        worker_options: Further options of `distributed.Nanny`.
        scheduler_options: Further options of `distributed.Scheduler`.
        check_versions: What happens if a host's software does not match.
        secure: Whether connections are encrypted and authenticated.
        modules: The user's own modules on the hosts.
    """

    nthreads: int | None = None
    memory_limit: str | int | float | None = "auto"
    resources: Mapping[str, float] | None = None
    local_directory: str | None = None
    worker_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    check_versions: CheckVersions = "error"
    secure: bool = True
    modules: LocalModules = field(default_factory=LocalModules, repr=False)
    prefix: str = field(default_factory=lambda: secrets.token_urlsafe(18), repr=False)
    _credentials: Credentials | None = field(default=None, repr=False)
    _configuration: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def credentials(self) -> Credentials:
        """The certificates of the cluster, made when they are first needed."""
        if self._credentials is None:
            self._credentials = make_credentials()
        return self._credentials

    @property
    def configuration(self) -> dict[str, Any]:
        """The manager's Dask configuration, as it is when it is first needed; importing Dask takes a second."""
        if self._configuration is None:
            self._configuration = configuration()
        return self._configuration

    async def read_configuration(self) -> None:
        """Have it read without keeping the event loop waiting."""
        await event_loop.in_thread(lambda: self.configuration)

    @property
    def protocol(self) -> str:
        """How addresses begin."""
        return "tls" if self.secure else "tcp"

    def security(self, role: str) -> dict[str, Any]:
        """Return the arguments of `distributed.Security` for a role."""
        return self.credentials.for_role(role) if self.secure else {"require_encryption": False}

    def address(self, port: int) -> str:
        """Return the address of a port."""
        return f"{self.protocol}://{LOOPBACK}:{port}"

    def access(self, port: int) -> tuple[str, dict[str, Any]]:
        """Return the scheduler's address, and how one connects to it; not before distributed was imported."""
        from .programs.tls import MemorySecurity

        return self.address(port), MemorySecurity(**self.security("client")).get_connection_args("client")

    def forget(self) -> None:
        """Forget the secrets; a cluster that is started anew has others."""
        self._credentials = None
        self._configuration = None
        self.prefix = secrets.token_urlsafe(18)


class LocalMasterLauncher(ServiceMasterLauncher):
    """Starts the scheduler on the manager.

    Args:
        runtime_group: The group where the workers will be started.
    """

    extra_ports = ("dashboard",)
    RESTARTS = 3
    """How often a scheduler that dies is started again within minutes, on the same ports."""

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        super().__init__(runtime_group)
        self.dask = DaskSettings()

    def program(self) -> Program:
        """The program of the scheduler."""
        return Program(
            "dask-scheduler",
            source=_source("scheduler"),
            marker=MARKER,
            restarts=self.RESTARTS,
            at_restart="what it knew is gone: computations that were running are lost, submit them again",
        )

    async def prepare(self, debug: bool) -> None:
        """Start the process, and get the user's modules ready for it: it unpickles the work for others, too."""
        await super().prepare(debug)
        await self.dask.modules.open()
        await self.dask.read_configuration()

    def settings(self, ports: Mapping[str, int]) -> dict[str, Any]:
        """What the scheduler is told."""
        return {
            "modules": self.dask.modules.directory,
            "ports": dict(ports),
            "prefix": self.dask.prefix,
            "protocol": self.dask.protocol,
            "security": self.dask.security("scheduler"),
            "options": dict(self.dask.scheduler_options),
            "configuration": self.dask.configuration,
        }


class RoundRobinLauncher(ServiceWorkerLauncher):
    """Starts Dask workers on the hosts in turn. Each has a nanny, which is supervised in turn.

    Args:
        runtime_group: The group where the workers will be started.
    """

    port_uses = (
        PortUse("worker", Reach.EVERYBODY),
        PortUse("nanny", Reach.MANAGER),
        PortUse("dashboard", Reach.MANAGER),
    )
    RESTARTS = 5
    """How often a nanny that dies is started again within minutes. A nanny starts its own worker again as it likes."""

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        super().__init__(runtime_group)
        self.dask = DaskSettings()
        self._master = 0

    def program(self, place: WorkerHost) -> Program:
        """The program of a worker."""
        source = _source("worker")
        return Program(
            "dask-worker", source=source, env=BEFORE_START, marker=MARKER, restarts=self.RESTARTS, patience=5.0
        )

    async def handshake(self, workers: Sequence[Worker]) -> Mapping[str, LazyclusterError]:
        """Check the software of the hosts, before anything listens."""
        silent = await SOFTWARE.check_workers(workers, self.dask.check_versions, versions(common.PACKAGES))
        others = [worker for worker in workers if worker.name not in silent]
        failed = await self.dask.modules.share([worker.place for worker in others])
        await self.dask.read_configuration()
        return {**silent, **{w.name: failed[w.place.host] for w in others if w.place.host in failed}}

    async def reprovision(self, place: WorkerHost) -> None:
        """Send the user's modules."""
        for error in (await self.dask.modules.share([place])).values():
            raise error

    async def retire(self, workers: Sequence[Worker]) -> dict[str, str]:
        """Have the scheduler retire workers."""
        return await scaling.retire(*self.dask.access(self._master), workers)

    async def choose_to_retire(self, workers: Sequence[Worker], count: int) -> list[Worker]:
        """Return those that have nothing to do, and hold the least; before them those that are not even there."""
        absent = [worker for worker in workers if worker.service.state != "ready"][:count]
        present = [worker for worker in workers if worker not in absent]
        wanted = count - len(absent)
        spared = await scaling.choose_to_retire(*self.dask.access(self._master), present, wanted) if wanted else []
        return [*absent, *(await super().choose_to_retire(present, wanted) if spared is None else spared)]

    def settings(self, worker: Worker, master_port: int) -> dict[str, Any]:
        """What a worker is told."""
        dask, self._master = self.dask, master_port
        return {
            "ports": worker.ports,
            "scheduler": dask.address(master_port),
            "prefix": dask.prefix,
            "protocol": dask.protocol,
            "security": dask.security("worker"),
            "name": worker.name,
            "siblings": worker.siblings,
            # Tasks that share a GPU share its memory: as elsewhere in Dask's world, there is one at a time.
            "nthreads": dask.nthreads or (1 if self.gpus else None),
            "memory_limit": dask.memory_limit,
            "resources": dict(dask.resources) if dask.resources else {"GPU": self.gpus.count} if self.gpus else None,
            "local_directory": dask.local_directory,
            "trust_group": Environment.trust_group,
            "modules": dask.modules.directory_on(worker.place.host),
            "options": dict(dask.worker_options),
            "configuration": dask.configuration,
        }
