"""The statement of Dask: the scheduler and the workers, what they are told, and what they share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.certificates import Credentials, make_credentials
from lazycluster.cluster.client_modules import ClientModules
from lazycluster.cluster.engine import Endpoint, Engine, Option
from lazycluster.cluster.local_modules import LocalModules
from lazycluster.cluster.network import Port, Reach
from lazycluster.cluster.sent.messages import LOOPBACK, MARKER
from lazycluster.cluster.service_spec import ServiceSpec, Source
from lazycluster.core import event_loop
from lazycluster.core.certificates import valid_until
from lazycluster.utils import Environment

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess

from .configuration import check_size, configuration
from .programs import common
from .programs.worker import BEFORE_START

_SHARED = (
    "cluster.sent",
    "agent.filenames",
    "agent.localmodules",
    "agent.oom",
    "agent.ownership",
    "agent.processes",
    "agent.zygote",
)


def _program(name: str, module: str, **options: Any) -> ServiceSpec:
    source = Source.of(f"lazycluster.engines.dask.programs.{module}", "lazycluster_dask", _SHARED)
    return ServiceSpec(name, source=source, marker=MARKER, **options)


def _is_module(preload: str) -> bool:
    """Tell a module from the other things that Dask preloads: files and addresses."""
    return all(part.isidentifier() for part in preload.split(".")) and not preload.endswith(".py")


class DaskEngine(Engine):
    """Statement of one Dask cluster; for its arguments see `DaskCluster`.

    Attributes:
        secure: Whether connections are encrypted and authenticated.
        modules: The user's own modules on the hosts.
        client_modules: Those of clients in this process: the same, unless the cluster is in another one.
        prefix: The secret part of the dashboards' addresses.
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
        Option(
            "--memory-limit", "memory_limit", "Memory per worker: '4 GiB'.", "SIZE", "text", "auto", True, check_size
        ),
        Option("--dashboard-port", "dashboard_port", "Port of the dashboard on this machine (any).", "PORT", "count"),
        Option("--preload", "preload", "Modules that workers import first, with commas between.", "MODULES"),
        Option("--gpus-per-worker", "gpus_per_worker", "One worker for every so many GPUs.", "N", "count"),
        Option("--network", "network", "How hosts reach each other: through this machine (tunnel), direct, or auto.",
               "HOW", default="tunnel", choices=("tunnel", "direct", "auto")),
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
        self.worker_options, self.scheduler_options = dict(worker_options or {}), dict(scheduler_options or {})
        self.secure, self.modules = True, LocalModules()
        self.client_modules: LocalModules | ClientModules = self.modules
        self.forget()

    def is_busy(self, master: Endpoint) -> bool:
        """Return True if the scheduler has tasks, or has had some since it was asked before."""
        from .scaling import idle_since

        before, self._idle_since = self._idle_since, event_loop.run(idle_since(self, master.port))
        return self._idle_since is None or self._idle_since != before

    def valid_until(self) -> float | None:
        """Return when the certificates expire, in seconds since 1970."""
        return valid_until(self.credentials.scheduler.certificate) if self.secure else None

    def adopt(self, connection: Mapping[str, Any], process: BackgroundProcess) -> None:
        """Take over what a client needs, and have this process's modules sent by the cluster's."""
        self._client_security = dict(connection["security"])
        self.prefix = str(connection.get("dashboard", "///")).split("/")[3]
        self.client_modules = ClientModules(process)

    def forget(self) -> None:
        """Forget the secrets; a cluster that is started anew has others."""
        self.prefix = secrets.token_urlsafe(18)
        self._credentials: Credentials | None = None
        self._configuration: dict[str, Any] | None = None
        self._client_security = None
        self._idle_since = None

    _client_security: dict[str, Any] | None
    _idle_since: float | None

    def encrypts(self) -> bool:
        """Return True unless launchers of the user's own start something that knows of no certificates."""
        return self.secure

    def needed_here(self) -> tuple[str, ...]:
        """Return the packages that the manager must have."""
        return super().needed_here() if self.secure else self.packages

    # --- the processes -------------------------------------------------------------------------
    def master(self, at: Endpoint) -> ServiceSpec:
        """Return what the scheduler is."""
        lost = "what it knew is lost: computations that were running are lost, submit them again"
        told = lambda: self._scheduler(at)  # noqa: E731
        return _program("dask-scheduler", "scheduler", settings=told, env=self._early, at_restart=lost)

    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        """Return what a worker is: a nanny, which starts its own worker again as it likes."""
        told = lambda: self._worker(at, master)  # noqa: E731
        # Some modules must be imported after a fork if they are to use GPUs.
        env = BEFORE_START if at.gpus else {**BEFORE_START, **self._early}
        return _program("dask-worker", "worker", settings=told, env=env, patience=5.0)

    @property
    def _early(self) -> dict[str, str]:
        return {common.EARLY_IMPORTS: " ".join(filter(_is_module, self.preload))}

    def _scheduler(self, at: Endpoint) -> dict[str, Any]:
        modules = self.modules.directory if at.on_manager else self.modules.directory_on(at.host)
        return {**self._everybody("scheduler", at), "modules": modules, "options": self.scheduler_options}

    def _worker(self, at: Endpoint, master: Endpoint) -> dict[str, Any]:
        return {
            **self._everybody("worker", at),
            "scheduler": self.address(master.port, master.address),
            "name": at.name,
            "siblings": at.siblings,
            # Tasks that share a GPU share its memory: as elsewhere in Dask's world, there is one at a time.
            "nthreads": self.nthreads or (1 if at.gpus else None),
            "memory_limit": self.memory_limit,
            "resources": dict(self.resources) if self.resources else {"GPU": at.gpus} if at.gpus else None,
            "local_directory": self.local_directory,
            "trust_group": Environment.trust_group,
            "modules": self.modules.directory_on(at.host),
            "preload": self.preload,
            "options": self.worker_options,
        }

    def _everybody(self, role: str, at: Endpoint) -> dict[str, Any]:
        how = {"protocol": self.protocol, "security": self.security(role), "prefix": self.prefix}
        between_hosts = {"master": at.bind} if role == "scheduler" else {"worker": at.bind, "nanny": at.bind}
        where = {"ports": at.ports, "hosts": between_hosts, "address": at.address}
        return {**where, **how, "configuration": self.configuration}

    # --- what they share -----------------------------------------------------------------------
    @property
    def configuration(self) -> dict[str, Any]:
        """The manager's Dask configuration, as it is when it is first needed; importing Dask takes a second."""
        if self._configuration is None:
            self._configuration = configuration()
        return self._configuration

    @property
    def protocol(self) -> str:
        """Beginning of addresses."""
        return "tls" if self.secure else "tcp"

    @property
    def credentials(self) -> Credentials:
        """The certificates of the cluster, made when they are first needed."""
        self._credentials = self._credentials or make_credentials()
        return self._credentials

    def security(self, role: str) -> dict[str, Any]:
        """Return the arguments of `distributed.Security` for a role."""
        if self._client_security is not None:
            return self._client_security
        if not self.secure:
            return {"require_encryption": False}
        return self.credentials.for_role(role)

    def address(self, port: int, host: str = LOOPBACK) -> str:
        """Return the address of a port, as Dask writes it."""
        return f"{self.protocol}://[{host}]:{port}" if ":" in host else f"{self.protocol}://{host}:{port}"
