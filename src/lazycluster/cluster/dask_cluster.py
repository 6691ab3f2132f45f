"""A Dask cluster on the hosts of a group: https://distributed.dask.org.

The scheduler runs on the manager, the workers on the hosts. All of them listen on loopback interfaces only; each
reaches the others under the same loopback address and port, through the connections that the runtimes have anyway.
Whoever connects needs a certificate of the cluster. The dashboards, which only show, are served without encryption on
loopback under a secret path, which `DaskCluster.dashboard_link` has.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .certificates import Credentials, make_credentials
from .dask_programs import common
from .dask_versions import check_manager, check_workers
from .exceptions import ClusterError
from .launchers import ServiceMasterLauncher
from .network import PortUse, Reach
from .runtime_cluster import MasterLauncher, MasterWorkerCluster, WorkerLauncher
from .services import Program, Source
from .workers import ServiceWorkerLauncher, Worker

if TYPE_CHECKING:
    from distributed import Client, Security, Status

    from lazycluster.runtime_mgmt import RuntimeGroup

    from .places import Place

__all__ = ["DaskCluster", "LocalMasterLauncher", "RoundRobinLauncher"]

CheckVersions = Literal["error", "warn", "ignore"]

_PROGRAMS = Path(__file__).with_name("dask_programs")
_PACKAGE = "lazycluster_dask"
_GREETING_LIMIT = 60.0
# What distributed's nanny sets before it starts a worker process; ours is a copy of a process that must have it before.
_BEFORE_START = {"MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONHASHSEED": "6640"}


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
    """

    nthreads: int | None = None
    memory_limit: str | int | float | None = "auto"
    resources: Mapping[str, float] | None = None
    local_directory: str | None = None
    worker_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    check_versions: CheckVersions = "error"
    secure: bool = True
    prefix: str = field(default_factory=lambda: secrets.token_urlsafe(18), repr=False)
    _credentials: Credentials | None = field(default=None, repr=False)

    @property
    def credentials(self) -> Credentials:
        """The certificates of the cluster, made when they are first needed."""
        if self._credentials is None:
            self._credentials = make_credentials()
        return self._credentials

    @property
    def protocol(self) -> str:
        """How addresses begin."""
        return "tls" if self.secure else "tcp"

    def security(self, role: str) -> dict[str, Any]:
        """Return the arguments of `distributed.Security` for a role."""
        return self.credentials.for_role(role) if self.secure else {"require_encryption": False}

    def address(self, port: int) -> str:
        """Return the address of a port."""
        return f"{self.protocol}://{common.LOOPBACK}:{port}"

    def forget(self) -> None:
        """Forget the secrets; a cluster that is started anew has others."""
        self._credentials = None
        self.prefix = secrets.token_urlsafe(18)


class LocalMasterLauncher(ServiceMasterLauncher):
    """Starts the scheduler on the manager.

    Args:
        runtime_group: The group where the workers will be started.
    """

    extra_ports = ("dashboard",)

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        super().__init__(runtime_group)
        self.dask = DaskSettings()

    def program(self) -> Program:
        """The program of the scheduler."""
        return Program("dask-scheduler", source=Source(_PROGRAMS, "scheduler", _PACKAGE), marker=common.MARKER)

    def settings(self, ports: Mapping[str, int]) -> dict[str, Any]:
        """What the scheduler is told."""
        return {
            "ports": dict(ports),
            "prefix": self.dask.prefix,
            "protocol": self.dask.protocol,
            "security": self.dask.security("scheduler"),
            "options": dict(self.dask.scheduler_options),
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

    def program(self, place: Place) -> Program:
        """The program of a worker."""
        source = Source(_PROGRAMS, "worker", _PACKAGE)
        return Program(
            "dask-worker", source=source, env=_BEFORE_START, marker=common.MARKER, restarts=self.RESTARTS, patience=5.0
        )

    async def greet(self, workers: Sequence[Worker]) -> None:
        """Check the software of the hosts, before anything listens."""
        await check_workers(workers, self.dask.check_versions, _GREETING_LIMIT)

    def settings(self, worker: Worker, master_port: int) -> dict[str, Any]:
        """What a worker is told."""
        dask = self.dask
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
            "options": dict(dask.worker_options),
        }


class DaskCluster(MasterWorkerCluster):
    """A Dask cluster. The number of workers defaults to the number of runtimes in the group.

    By default the scheduler is started on the manager, and the workers on the hosts in turn. With launchers of your
    own, connections are encrypted only if they have an attribute ``dask`` (as those here have), which they use.

    Args:
        runtime_group: The hosts that can be used.
        ports: The ports that may be used, see `MasterWorkerCluster`.
        master_launcher: How the scheduler is started; by default `LocalMasterLauncher`.
        worker_launcher: How the workers are started; by default `RoundRobinLauncher`.
        nthreads: Threads per worker; by default the host's cores, divided by its workers.
        memory_limit: Memory per worker, e.g. ``"4 GiB"``, bytes, a fraction of the host's memory, or None for no
            limit; by default the host's memory, divided by its workers.
        resources: Abstract resources of each worker, e.g. ``{"GPU": 1}``.
        local_directory: Where workers write what does not fit in memory; by default a temporary directory.
        min_workers: How many workers must be there for a start to succeed; by default all.
        check_versions: What happens if Python, dask, distributed or cloudpickle of a host do not match the manager's:
            ``error``, ``warn`` or ``ignore``.
        worker_options: Further options of `distributed.Nanny`; what JSON cannot hold is not possible.
        scheduler_options: Further options of `distributed.Scheduler`.
        gpus_per_worker: How many GPUs of its host each worker gets for itself: ``CUDA_VISIBLE_DEVICES`` is set, by
            default each has one thread and the resource ``{"GPU": gpus_per_worker}``. Then there is by default one
            worker for each GPU, and hosts without GPUs get none.
        idle_gpus: Whether GPUs are left alone that others use, as nvidia-smi says.

    Raises:
        ClusterError: If dask, distributed or cryptography is not installed here.
        ValueError: If an argument makes no sense.

    Examples:
        >>> with DaskCluster(RuntimeGroup(hosts=["host-1", "host-2"])) as cluster:      # doctest: +SKIP
        ...     cluster.start()
        ...     client = cluster.get_client()
        ...     print(sum(client.gather(client.map(lambda x: x + 1, range(10)))))
        55
    """

    def __init__(
        self,
        runtime_group: RuntimeGroup,
        ports: list[int] | None = None,
        master_launcher: MasterLauncher | type[MasterLauncher] | None = None,
        worker_launcher: WorkerLauncher | type[WorkerLauncher] | None = None,
        *,
        nthreads: int | None = None,
        memory_limit: str | int | float | None = "auto",
        resources: Mapping[str, float] | None = None,
        local_directory: str | None = None,
        min_workers: int | None = None,
        check_versions: CheckVersions = "error",
        worker_options: Mapping[str, Any] | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        gpus_per_worker: int | None = None,
        idle_gpus: bool = False,
    ) -> None:
        if check_versions not in ("error", "warn", "ignore"):
            raise ValueError(f"check_versions must be 'error', 'warn' or 'ignore', not {check_versions!r}")
        if nthreads is not None and (isinstance(nthreads, bool) or not isinstance(nthreads, int) or nthreads < 1):
            raise ValueError(f"nthreads must be an integer of at least 1, not {nthreads!r}")
        self._dask = DaskSettings(
            nthreads,
            memory_limit,
            resources,
            local_directory,
            worker_options or {},
            scheduler_options or {},
            check_versions,
        )
        self._security: Security | None = None
        super().__init__(
            runtime_group,
            ports,
            master_launcher,
            worker_launcher,
            min_workers=min_workers,
            gpus_per_worker=gpus_per_worker,
            idle_gpus=idle_gpus,
        )
        check_manager(self._dask.secure)
        _check_options(memory_limit, resources)

    def _default_master_launcher(self) -> MasterLauncher:
        return LocalMasterLauncher(self._group)

    def _default_worker_launcher(self) -> WorkerLauncher:
        return RoundRobinLauncher(self._group)

    def _connect_launchers(self) -> None:
        super()._connect_launchers()
        launchers = (self._master_launcher, self._worker_launcher)
        # A launcher that does not know of certificates starts something that does not ask for them.
        self._dask.secure = all(hasattr(launcher, "dask") for launcher in launchers)
        for launcher in launchers:
            if hasattr(launcher, "dask"):
                launcher.dask = self._dask

    # --- for clients ---------------------------------------------------------------------------
    def get_client(self, timeout: int = 2) -> Client:
        """Return a connected client.

        Args:
            timeout: Seconds until it must be connected.

        Raises:
            TimeoutError: If it is not connected in time.
            ClusterError: If the cluster does not run.
        """
        from distributed import Client

        self._check_running()
        return Client(self, timeout=timeout)

    @property
    def scheduler_address(self) -> str:
        """The address of the scheduler, for clients."""
        self._check_running()
        assert self.master_port is not None
        return self._dask.address(self.master_port)

    @property
    def security(self) -> Security:
        """What a client authenticates itself with: `distributed.Client` takes it as ``security``."""
        from distributed import Security

        if self._security is None:
            self._security = Security(**self._dask.security("client"))
        return self._security

    @property
    def dashboard_link(self) -> str:
        """The address of the dashboard. Whoever knows it can look at the cluster, if he has an account here."""
        self._check_running()
        port = getattr(self._master_launcher, "ports", {}).get("dashboard")
        if port is None:
            raise ClusterError("the scheduler was started by a launcher of your own, which tells no dashboard")
        return f"http://{common.LOOPBACK}:{port}/{self._dask.prefix}/status"

    @property
    def status(self) -> Status:
        """What the cluster does, in distributed's own words."""
        from distributed import Status

        if self._state == "running" and self._scheduler_status() is not None:
            return Status.failed if self._scheduler_status() else Status.closed
        return Status[self._state]  # the same words, on purpose

    def _scheduler_status(self) -> int | None:
        process = self._master_launcher.process
        return process.poll() if process is not None else None

    def _check_running(self) -> None:
        if self._state in ("running", "starting") and self.master_port is not None:
            status = self._scheduler_status()
            if status is None:
                return
            raise ClusterError(f"the scheduler has ended (status {status}): call cleanup(), then start()")
        how = {"created": "was not started: call start()", "failed": "did not start"}
        raise ClusterError(f"the cluster {how.get(self._state, 'was ended: call start() to start it anew')}")

    # --- the end -------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """End the workers, the scheduler and the tunnels. Doing it again does nothing."""
        try:
            super().cleanup()
        finally:
            self._dask.forget()
            self._security = None

    def close(self, timeout: float | None = None) -> _Closed:
        """Do what `cleanup` does. The result can be awaited, as `distributed.Client.shutdown` does.

        Args:
            timeout: Without use; here because the clusters of distributed have it.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.cleanup()
            return _Closed(None)
        return _Closed(loop.run_in_executor(None, self.cleanup))

    def __await__(self) -> Generator[Any, None, DaskCluster]:
        """Return the cluster: clients await it, to have it started; this one is."""
        self._check_running()
        return self
        yield

    def __repr__(self) -> str:
        services = getattr(self._worker_launcher, "services", [])
        workers = sum(service.state == "ready" for service in services)
        return f"<DaskCluster {self._state}, port {self.master_port}, {workers} workers>"


def _check_options(memory_limit: object, resources: Mapping[str, object] | None) -> None:
    """Refuse what every worker would stumble over, some seconds later."""
    if isinstance(memory_limit, str) and memory_limit != "auto":
        from dask.utils import parse_bytes

        try:
            parse_bytes(memory_limit)
        except ValueError:
            raise ValueError(f"memory_limit must be a size such as '4 GiB', not {memory_limit!r}") from None
    for name, amount in (resources or {}).items():
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise ValueError(f"resources: the amount of {name!r} must be a number, not {amount!r}")


class _Closed:
    """The end of a cluster, which may be awaited."""

    def __init__(self, ending: asyncio.Future[None] | None) -> None:
        self._ending = ending

    def __await__(self) -> Generator[Any, None, None]:
        if self._ending is not None:
            yield from asyncio.shield(self._ending).__await__()
