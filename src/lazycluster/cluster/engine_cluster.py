"""A cluster of any engine, made from the engine's statement."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError
from lazycluster.runtime.reachability import NetworkChoice

from . import connection_file
from .contracts import MasterLauncher, WorkerLauncher
from .engine import CheckVersions, Endpoint, Engine, check_statement, checked_policy
from .exceptions import ClusterError
from .master_launcher import ServiceMasterLauncher
from .network import single_ports
from .runtime_cluster import MasterWorkerCluster
from .versions import check_manager
from .worker_launcher import ServiceWorkerLauncher

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["EngineCluster", "checked_count"]


class EngineCluster(MasterWorkerCluster):
    """A cluster of the engine that `engine_class` states. The number of workers defaults to the group's runtimes.

    Args:
        runtime_group: The hosts that can be used.
        ports: The ports that may be used, see `MasterWorkerCluster`.
        master_launcher: How the master is started; by default as the engine states it.
        worker_launcher: How the workers are started; by default as the engine states it.
        min_workers: How many workers must be there for a start to succeed; by default all.
        check_versions: What happens if software of a host does not match the manager's: ``error``, ``warn`` or
            ``ignore``.
        gpus_per_worker: How many GPUs of its host each worker gets for itself, see `MasterWorkerCluster`.
        idle_gpus: Whether GPUs are left alone that others use.
        name: Have the cluster in the background, under this name: in a process of its own, which goes on when this
            program ends, until `cleanup` or ``lazycluster down NAME``. See `lazycluster.connect`. By default it is in
            this process.
        network: How hosts reach each other, see `MasterWorkerCluster`.
        **options: What the engine takes.

    Raises:
        ClusterError: If a package that the engine needs is not installed here.
        ValueError: If an argument makes no sense.

    Examples:
        >>> class CountingCluster(EngineCluster):                               # doctest: +SKIP
        ...     engine_class = Counting
        >>> with CountingCluster(RuntimeGroup(hosts=["host-1", "host-2"])) as cluster:    # doctest: +SKIP
        ...     cluster.start()
    """

    engine_class: ClassVar[type[Engine]]
    """The statement of the engine."""

    def __new__(cls, *arguments: Any, name: str | None = None, **options: Any) -> EngineCluster:
        """Return a new cluster: with a name, one in a process of its own."""
        if name is None:
            return super().__new__(cls)
        from .background_cluster import class_in_background

        made: EngineCluster = super().__new__(class_in_background(cls))
        return made

    def __init__(
        self,
        runtime_group: RuntimeGroup,
        ports: list[int] | None = None,
        master_launcher: MasterLauncher | type[MasterLauncher] | None = None,
        worker_launcher: WorkerLauncher | type[WorkerLauncher] | None = None,
        *,
        min_workers: int | None = None,
        check_versions: CheckVersions = "error",
        gpus_per_worker: int | None = None,
        idle_gpus: bool = False,
        name: None = None,
        network: NetworkChoice = "tunnel",
        **options: Any,
    ) -> None:
        check_statement(self.engine_class)
        policy = checked_policy(check_versions)
        self._engine = self.engine_class(**options)
        self._engine.check_versions = policy
        super().__init__(
            runtime_group,
            ports,
            master_launcher,
            worker_launcher,
            min_workers=min_workers,
            gpus_per_worker=gpus_per_worker,
            idle_gpus=idle_gpus,
            network=network,
        )

    def _default_master_launcher(self) -> MasterLauncher:
        return ServiceMasterLauncher(self._group, self._engine)

    def _default_worker_launcher(self) -> WorkerLauncher:
        return ServiceWorkerLauncher(self._group, self._engine)

    def _connect_launchers(self) -> None:
        super()._connect_launchers()
        master, worker = self._master_launcher, self._worker_launcher
        for launcher in (master, worker):
            if isinstance(launcher, (ServiceMasterLauncher, ServiceWorkerLauncher)):
                launcher.engine = self._engine
        if isinstance(master, ServiceMasterLauncher) and isinstance(worker, ServiceWorkerLauncher):
            worker.master = master.at
            worker.master_services = lambda: master.services
        check_manager(self._engine)
        own = not (isinstance(master, ServiceMasterLauncher) and isinstance(worker, ServiceWorkerLauncher))
        why = self._network.direct.refuse(self._engine, own)
        if why:
            raise ClusterError(
                f'{type(self).__name__} cannot use network="direct": {why}\n  Next step: leave out network='
            )

    @property
    def engine(self) -> Engine:
        """The statement of the engine, with what belongs to this cluster."""
        return self._engine

    # --- for clients ---------------------------------------------------------------------------
    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> Any:
        """Return a client of a cluster that another process of this user has started.

        Args:
            path: The file that `write_connection_file` or ``lazycluster start NAME --connection-file`` has written.

        Raises:
            ClusterError: If the file is not there, is not this user's own, or is of another engine.
        """
        return cls.engine_class.client(connection_file.read(path, cls.__name__))

    @classmethod
    def connect_to(cls, process: BackgroundProcess, **options: Any) -> Any:
        """Return a client of a cluster in the background, see `lazycluster.connect`.

        Args:
            process: Its process.
            **options: What the client takes.
        """
        return cls.engine_class.client(process.request("connection"), **options)

    def _connection(self) -> dict[str, Any]:
        self._check_running()
        return self._engine.connection(self._master_endpoint())

    def _master_endpoint(self) -> Endpoint:
        if isinstance(self._master_launcher, ServiceMasterLauncher):
            return self._master_launcher.at
        assert self.master_port is not None
        return Endpoint("master", ports={single_ports(self._engine.master_ports)[0].name: self.master_port})

    def _check_running(self) -> None:
        """Raise an error if the cluster cannot be used, which says why."""
        self._check_alive()
        if self._state in ("running", "starting") and self.master_port is not None:
            status = self._master_status()
            if status is None:
                return
            raise ClusterError(
                f"the {self._engine.master_name} has ended (status {status}): call cleanup(), then start()"
            )
        how = {
            "created": "was not started: call start()",
            "failed": f"did not start: {self._start_problem}",
        }
        how |= {"starting": "is being started: wait until start() is done", "closing": "is being ended"}
        raise ClusterError(f"the cluster {how.get(self._state, 'was ended: call start() to start it anew')}")

    def _reach_master(self, within: float | None = None, run: Callable[..., Any] = event_loop.run) -> None:
        """Wait for the link to the master's host if it is interrupted.

        Args:
            within: Seconds; by default until it has been interrupted for as long as a host may take to answer.
            run: What runs a coroutine.

        Raises:
            ClusterError: If the link is not back then, or is lost.
        """
        for service in self._services(self._master_launcher):
            run(service.wait_for_link(within))
        self._check_running()
        if problem := self._unreached():
            raise ClusterError(problem)

    def _explained(self, error: Exception) -> Exception:
        """Return the error of something that needs the master: with its cause where that is the master."""
        if self._state == "running" and (problem := self._master_problem()):
            return self._failure(problem)
        problem = self._unreached()
        return ClusterError(f"{error}\n  Cause: {problem}") if problem else error

    def _unreached(self) -> str:
        """Return why the master is not reached at present, "" if it is."""
        for service in self._services(self._master_launcher):
            if problem := service.link_problem:
                host = service.place.host
                return (
                    f"the {self._engine.master_name} is on {host}, and {problem}\n"
                    f"  Next step: check that {host} is up and reachable; the cluster goes on once the link is back, "
                    "and has failed if it is lost"
                )
        return ""

    def _master_status(self) -> int | None:
        process = self._master_launcher.process
        return process.poll() if process is not None else None

    # --- more and fewer workers ----------------------------------------------------------------
    def scale(self, n: int) -> None:
        """Start workers, or have some leave, until there are `n` on the hosts that the group has now.

        Those on hosts that were removed from the group leave, too.

        Args:
            n: How many workers there are to be.

        Raises:
            ClusterError: If the cluster does not run; or if some workers did not start, or could not leave: then what
                could be done is done.
        """
        count = checked_count(n, "the number of workers", 0)
        self._check_running()
        self._change(count)

    def _own_launcher(self) -> ServiceWorkerLauncher:
        launcher = self._worker_launcher
        if not isinstance(launcher, ServiceWorkerLauncher):
            raise ClusterError(
                "the workers were started by a launcher of your own, which says nothing of how they leave: "
                "build it on ServiceWorkerLauncher, or use start_workers()"
            )
        return launcher

    def _change(self, count: int) -> None:
        """Have as many workers as that."""
        launcher = self._own_launcher()
        self._in_order(launcher, lambda port: launcher.scale(count, port, self._spare(launcher)))

    def _remove(self, names: Sequence[str]) -> None:
        """Have certain workers leave."""
        launcher = self._own_launcher()
        self._in_order(
            launcher, lambda _: launcher.leave([worker for worker in launcher.workers if worker.name in names])
        )

    def _in_order(self, launcher: ServiceWorkerLauncher, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """Change the workers, one change at a time."""
        with self._changing, self._shown(f"Scaling the {type(self).__name__}"):
            self._check_running()
            self._reach_master(run=launcher.run)
            port = self.master_port
            assert port is not None
            try:
                launcher.run(launcher.with_master(work(port)))
            except LazyclusterError as error:
                raise self._explained(error) from None
            finally:
                self._ports = self._spare(launcher)

    def _spare(self, launcher: ServiceWorkerLauncher) -> list[int]:
        """Return the ports that may be used for workers."""
        taken = {self.master_port, *(port for worker in launcher.workers for port in worker.ports.values())}
        return [port for port in self._all_ports if port not in taken]

    def _let_go(self) -> None:
        super()._let_go()
        self._engine.forget()


def checked_count(value: object, what: str, least: int) -> int:
    """Return a number if it makes sense.

    Raises:
        ValueError: If it does not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} must be an integer of at least {least}, not {value!r}")
    return value
