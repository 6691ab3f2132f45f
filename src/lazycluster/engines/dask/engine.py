"""The statement of Dask: the scheduler and the workers, what they are told, and what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.client_modules import ClientModules
from lazycluster.cluster.engine import NETWORK_OPTION, Endpoint, Engine, Option
from lazycluster.cluster.local_modules import LocalModules
from lazycluster.cluster.network import Port, Reach
from lazycluster.cluster.sent.messages import MARKER
from lazycluster.cluster.service_spec import ServiceSpec, Source
from lazycluster.core import event_loop
from lazycluster.utils import Environment

from .access import ClusterAccess
from .configuration import KeptConfiguration, check_size
from .options import preloaded_modules
from .programs import common
from .programs.worker import BEFORE_START

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess

_SHARED = ("cluster.sent", "agent.filenames", "agent.localmodules", "agent.oom", "agent.ownership", "agent.zygote")


def _program(name: str, module: str, **options: Any) -> ServiceSpec:
    source = Source.of(f"lazycluster.engines.dask.programs.{module}", "lazycluster_dask", _SHARED)
    return ServiceSpec(name, source=source, marker=MARKER, **options)


class DaskEngine(Engine):
    """Statement of one Dask cluster; for its arguments see `DaskCluster`.

    Attributes:
        access: Certificates and addresses.
        modules: The user's own modules on the hosts.
        client_modules: Those of clients in this process: the same, unless the cluster is in another one.
    """

    name, cluster, module, extra = "dask", "DaskCluster", "lazycluster.cluster.dask_cluster", "dask"
    packages, manager_packages = ("dask", "distributed"), ("cryptography",)
    same_versions, told_versions = common.SAME_PACKAGES, common.PACKAGES
    master_name, sent = "scheduler", True
    master_ports = (Port("master"), Port("dashboard", Reach.MANAGER))
    worker_ports = (Port("worker"), Port("nanny", Reach.MASTER), Port("dashboard", Reach.MANAGER))
    direct = "encrypted"
    options = (
        Option("--threads", "nthreads", "Threads per worker (all cores).", "N", "count"),
        Option("--memory-limit", "memory_limit", "Memory of each: '4 GiB'.", "SIZE", "text", "auto", True, check_size),
        Option("--dashboard-port", "dashboard_port", "Port of the dashboard on this machine (any).", "PORT", "port"),
        Option("--preload", "preload", "Modules that workers import first, with commas between.", "MODULES"),
        Option("--gpus-per-worker", "gpus_per_worker", "One worker for every so many GPUs.", "N", "count"),
        NETWORK_OPTION,
    )  # fmt: skip
    help = """Start a Dask cluster: the scheduler here, the workers on the hosts.

    All of it goes through the ssh connections, encrypted and authenticated. The dashboard's address is a secret.
    With --network direct the hosts reach each other at their own addresses, and the scheduler is on the first one.

    \b
    Examples:
      lazycluster start dask -w 'node[1-4]'
      lazycluster start dask -w @all --workers 8 --connection-file cluster.json
    then, in Python:
      from lazycluster.cluster.dask_cluster import DaskCluster
      client = DaskCluster.connect("cluster.json")
    """

    def __init__(
        self,
        nthreads: int | None = None,
        memory_limit: str | int | float | None = "auto",
        resources: Mapping[str, float] | None = None,
        local_directory: str | None = None,
        worker_options: Mapping[str, Any] | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        self.nthreads, self.memory_limit, self.resources = nthreads, memory_limit, resources
        self.local_directory, self.preload = local_directory, list(preload)
        self._early = {common.EARLY_IMPORTS: " ".join(preloaded_modules(self.preload))}
        self.worker_options, self.scheduler_options = dict(worker_options or {}), dict(scheduler_options or {})
        self.access, self.modules = ClusterAccess(), LocalModules()
        self.client_modules: LocalModules | ClientModules = self.modules
        self.configuration = KeptConfiguration()
        self._idle_since: float | None = None

    def is_busy(self, master: Endpoint) -> bool:
        """Return True if the scheduler has tasks, or has had some since it was asked before."""
        from .scaling import idle_since

        before, self._idle_since = self._idle_since, event_loop.run(idle_since(self, master.port))
        return self._idle_since is None or self._idle_since != before

    def valid_until(self) -> float | None:
        """Return when the certificates expire, in seconds since 1970."""
        return self.access.valid_until()

    def adopt(self, connection: Mapping[str, Any], process: BackgroundProcess) -> None:
        """Take over what a client needs, and have this process's modules sent by the cluster's."""
        self.access.adopt(connection)
        self.client_modules = ClientModules(process)

    def forget(self) -> None:
        """Forget the secrets; a cluster that is started anew has others."""
        self.access.forget()
        self.configuration, self._idle_since = KeptConfiguration(), None

    def encrypts(self) -> bool:
        """Return True unless launchers of the user's own start something that knows of no certificates."""
        return self.access.secure

    def needed_here(self) -> tuple[str, ...]:
        """Return the packages that the manager must have."""
        return super().needed_here() if self.access.secure else self.packages

    def master(self, at: Endpoint) -> ServiceSpec:
        """Return what the scheduler is."""
        lost = "what it knew is lost: computations that were running are lost, submit them again"

        def told() -> dict[str, Any]:
            modules = self.modules.directory if at.on_manager else self.modules.directory_on(at.host)
            return {**self._everybody("scheduler", at), "modules": modules, "options": self.scheduler_options}

        return _program("dask-scheduler", "scheduler", settings=told, env=self._early, at_restart=lost)

    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        """Return what a worker is: a nanny, which starts its own worker again as it likes."""
        told = lambda: self._worker(at, master)  # noqa: E731
        # Some modules must be imported after a fork if they are to use GPUs.
        env = BEFORE_START if at.gpus else {**BEFORE_START, **self._early}
        return _program("dask-worker", "worker", settings=told, env=env, patience=5.0)

    def _worker(self, at: Endpoint, master: Endpoint) -> dict[str, Any]:
        # Tasks that share a GPU share its memory: as elsewhere in Dask's world, there is one at a time.
        threads = self.nthreads or (1 if at.gpus else None)
        resources = dict(self.resources) if self.resources else {"GPU": at.gpus} if at.gpus else None
        size = {"nthreads": threads, "memory_limit": self.memory_limit, "resources": resources}
        known = {"name": at.name, "siblings": at.siblings, "modules": self.modules.directory_on(at.host)}
        given = {"local_directory": self.local_directory, "preload": self.preload, "options": self.worker_options}
        where = {"scheduler": self.access.address(master.port, master.address), "trust_group": Environment.trust_group}
        return {**self._everybody("worker", at), **where, **known, **size, **given}

    def _everybody(self, role: str, at: Endpoint) -> dict[str, Any]:
        between_hosts = {"master": at.bind} if role == "scheduler" else {"worker": at.bind, "nanny": at.bind}
        where = {"ports": at.ports, "hosts": between_hosts, "address": at.address}
        return {**where, **self.access.settings(role), "configuration": self.configuration.get()}
