"""A Dask cluster on the hosts of a group: https://distributed.dask.org.

The scheduler runs on the manager, the workers on the hosts. All of them listen on loopback interfaces only; each
reaches the others under the same loopback address and port, through the connections that the runtimes have anyway.
Whoever connects needs a certificate of the cluster. The dashboards, which only show, are served without encryption on
loopback under a secret path, which `DaskCluster.dashboard_link` has.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import ssl
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lazycluster.agent.filenames import dumps
from lazycluster.cluster import connection_file
from lazycluster.cluster.client_modules import ClientModules
from lazycluster.cluster.contracts import MasterLauncher, WorkerLauncher
from lazycluster.cluster.engine import CheckVersions
from lazycluster.cluster.engine_cluster import EngineCluster, checked_count
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.master_launcher import ServiceMasterLauncher
from lazycluster.cluster.views import ready
from lazycluster.cluster.worker_launcher import ServiceWorkerLauncher
from lazycluster.core import event_loop
from lazycluster.core.words import counted
from lazycluster.output.host_cells import megabytes, number
from lazycluster.output.view import Cell, Fact
from lazycluster.runtime.reachability import NetworkChoice
from lazycluster.ssh.tunnels import check_port

from .dashboard_link import dashboard_link, plain_link
from .engine import DaskEngine
from .launchers import LocalMasterLauncher, RoundRobinLauncher
from .options import check_sizes, checked_options, checked_preload
from .scaling import AdaptedCluster, access, check_duration, check_names, checked_amount

if TYPE_CHECKING:
    from distributed import Client, Security, Status
    from distributed.deploy.adaptive import Adaptive

    from lazycluster.background.client import BackgroundProcess
    from lazycluster.runtime_mgmt import RuntimeGroup

    from .scheduler_view import SchedulerCalls, SchedulerView

__all__ = ["DaskCluster", "LocalMasterLauncher", "RoundRobinLauncher"]

_AGAIN = 0.1  # seconds between two attempts to connect to a scheduler that is being replaced
_CONNECTION = {"scheduler": str, "dashboard?": str, "security": {...: (str, bool, type(None))}, "manager?": int}


class DaskCluster(EngineCluster):
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
        dashboard_port: The port of the scheduler's dashboard on this machine; by default any of `ports`.
        worker_options: Further options of `distributed.Nanny`; what JSON cannot hold is not possible.
        scheduler_options: Further options of `distributed.Scheduler`.
        preload: Modules that workers import before they are ready, as a list such as ``["dask.dataframe"]``, or with
            commas between: the first computation does not wait for them then. It is Dask's own ``preload``: what else
            that takes is possible, and a function ``dask_setup`` of a module is called. One that fails is an error.
        gpus_per_worker: How many GPUs of its host each worker gets for itself: ``CUDA_VISIBLE_DEVICES`` is set, by
            default each has one thread and the resource ``{"GPU": gpus_per_worker}``. Then there is by default one
            worker for each GPU, and hosts without GPUs get none.
        idle_gpus: Whether GPUs are left alone that others use, as nvidia-smi says.
        network: How hosts reach each other: ``"tunnel"``: through this machine; ``"direct"``: at their own addresses,
            with the scheduler on the first host of the group; ``"auto"``: direct if all of them do, else through
            tunnels. All of it is encrypted and authenticated.
        asynchronous: Whether methods that have to wait return awaitables where an event loop runs. ``await cluster``
            and ``async with`` start the cluster, and have the same effect for their event loop.
        name: Have the cluster in the background, under this name: in a process of its own, which goes on when this
            program ends, until `cleanup` or ``lazycluster down NAME``. See `lazycluster.connect`. By default it is in
            this process.

    Raises:
        ClusterError: If dask, distributed or cryptography is not installed here.
        ValueError: If an argument makes no sense.

    Examples:
        >>> with DaskCluster(RuntimeGroup(hosts=["host-1", "host-2"])) as cluster:      # doctest: +SKIP
        ...     cluster.start()
        ...     client = cluster.get_client()
        ...     print(sum(client.gather(client.map(lambda x: x + 1, range(10)))))
        55

        In a coroutine:

        >>> async with DaskCluster(group) as cluster, Client(cluster, asynchronous=True) as client:   # doctest: +SKIP
        ...     print(await client.submit(lambda: 55))
    """

    engine_class = DaskEngine
    _adapting: AdaptedCluster | None = None
    _scheduler_view: SchedulerView | None = None
    _owns_group = False

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
        local_directory: str | os.PathLike[str] | None = None,
        min_workers: int | None = None,
        check_versions: CheckVersions = "error",
        dashboard_port: int | None = None,
        worker_options: Mapping[str, Any] | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        preload: str | Iterable[str] = (),
        gpus_per_worker: int | None = None,
        idle_gpus: bool = False,
        network: NetworkChoice = "tunnel",
        asynchronous: bool = False,
        name: None = None,
    ) -> None:
        if nthreads is not None:
            checked_count(nthreads, "nthreads", 1)
        self._dashboard_port = None if dashboard_port is None else check_port(dashboard_port, "dashboard_port")
        self._security: Security | None = None
        self._name = secrets.token_hex(4)
        self._asynchronous = asynchronous
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()  # that have awaited it
        super().__init__(
            runtime_group,
            ports,
            master_launcher,
            worker_launcher,
            min_workers=min_workers,
            check_versions=check_versions,
            gpus_per_worker=gpus_per_worker,
            idle_gpus=idle_gpus,
            network=network,
            nthreads=nthreads,
            memory_limit=memory_limit,
            resources=resources,
            local_directory=None if local_directory is None else os.fspath(local_directory),
            worker_options=checked_options(worker_options, "worker_options"),
            scheduler_options=checked_options(scheduler_options, "scheduler_options"),
            preload=checked_preload(preload),
        )
        check_sizes(memory_limit, resources)

    def _default_master_launcher(self) -> MasterLauncher:
        return LocalMasterLauncher(self._group)

    def _default_worker_launcher(self) -> WorkerLauncher:
        return RoundRobinLauncher(self._group)

    def _connect_launchers(self) -> None:
        launchers = (self._master_launcher, self._worker_launcher)
        # A launcher that does not know of certificates starts something that does not ask for them.
        self._dask.access.secure = all(hasattr(launcher, "dask") for launcher in launchers)
        for launcher in launchers:
            if hasattr(launcher, "dask"):
                launcher.dask = self._dask
        self._fix_dashboard_port()
        super()._connect_launchers()

    def _fix_dashboard_port(self) -> None:
        port = self._dashboard_port
        if port is None:
            return
        if not isinstance(self._master_launcher, ServiceMasterLauncher):
            raise ValueError("dashboard_port needs a launcher that builds on ServiceMasterLauncher")
        self._master_launcher.fixed_ports = {"dashboard": port}
        self._all_ports = [one for one in self._all_ports if one != port]
        self._ports = list(self._all_ports)

    @property
    def _dask(self) -> DaskEngine:
        assert isinstance(self._engine, DaskEngine)
        return self._engine

    # --- for clients ---------------------------------------------------------------------------
    def get_client(self, timeout: int = 2) -> Client:
        """Return a connected client.

        What it sends, in whatever way, runs with the present version of your own modules, which are sent to the hosts
        again when their files have changed. Clients of other origin notice that within a second.

        Args:
            timeout: Seconds until it must be connected.

        Returns:
            The client; where the cluster is used asynchronously, it is connected by ``await`` or ``async with``.

        Raises:
            TimeoutError: If it is not connected in time.
            ClusterError: If the cluster does not run; or if it is not connected in time, and the link to the host of
                the scheduler is interrupted.
        """
        from distributed.comm import CommClosedError

        from .client import UpToDateClient, connected

        if self.asynchronous:
            self._check_running()
            return UpToDateClient(self, self._dask.client_modules, self._explained, timeout=timeout, asynchronous=True)
        deadline = time.monotonic() + timeout
        while True:
            self._reach_master(max(0.0, deadline - time.monotonic()))
            try:
                left = max(0.0, deadline - time.monotonic())
                return connected(UpToDateClient, self, self._dask.client_modules, timeout=left)
            except CommClosedError as error:  # the scheduler has ended while it answered; there will be another one
                if time.monotonic() + _AGAIN >= deadline:
                    raise TimeoutError(
                        f"the scheduler did not answer within {timeout:g} s: {error}\n"
                        "  Next step: if it was just restarted, give it more time: get_client(timeout=30)"
                    ) from None
                time.sleep(_AGAIN)
            except OSError as error:
                raise self._explained(error) from None

    @staticmethod
    def connect(path: str | os.PathLike[str], timeout: float = 10) -> Client:
        """Return a client of a cluster that another process of this user has started.

        Args:
            path: The file that `write_connection_file` or ``lazycluster start dask --connection-file`` has written.
            timeout: Seconds until it must be connected.

        Raises:
            ClusterError: If the file is not there, is not this user's own, or its cluster does not answer.

        Examples:
            >>> client = DaskCluster.connect("cluster.json")        # doctest: +SKIP
        """
        from .client import ClusterClient, client_of

        found = connection_file.read(path, DaskCluster.__name__, _CONNECTION)
        try:
            client: Client = client_of(ClusterClient, found, timeout=timeout)
        except (TypeError, ValueError, ssl.SSLError, RuntimeError) as error:
            # These are no arguments of distributed's, no address or one without TLS, or no key.
            raise connection_file.unusable(path, str(error)) from None
        except (OSError, TimeoutError) as error:
            raise connection_file.unanswered(path, found, str(error)) from None
        return client

    @classmethod
    def connect_to(cls, process: BackgroundProcess, timeout: float = 10, **options: Any) -> Client:
        """Return a client of a cluster in the background, see `lazycluster.connect`.

        It has your own modules sent, as `get_client` does, from the process that it is in.

        Args:
            process: The cluster's process.
            timeout: Seconds until it must be connected.
            **options: Further ones of `distributed.Client`.

        Raises:
            BackgroundError: If the process does not answer.
            TimeoutError: If the client is not connected in time.
            ClusterError: Likewise, if the link to the host of the scheduler is interrupted.
        """
        from .client import UpToDateClient, client_of

        modules = ClientModules(process)
        modules.sync_now()
        try:
            return client_of(UpToDateClient, process.request("connection"), modules, timeout=timeout, **options)
        except OSError as error:
            unreached = process.status().get("unreached")
            raise (ClusterError(f"{error}\n  Cause: {unreached}") if unreached else error) from None

    def _connection(self) -> dict[str, Any]:
        self._check_running()
        found = {"scheduler": self.scheduler_address, "security": self._dask.access.security("client")}
        port = self._dashboard()
        return found if port is None else {**found, "dashboard": plain_link(port, self._dask.access.prefix)}

    def _dashboard(self) -> int | None:
        """Return the port of the dashboard; None if a launcher of the user's own tells none."""
        ports: Mapping[str, int] = getattr(self._master_launcher, "ports", {})
        return ports.get("dashboard")

    @property
    def scheduler_address(self) -> str:
        """The address of the scheduler, for clients; ``<Not Connected>`` before a start and after the end."""
        if not self._has_scheduler():
            return "<Not Connected>"
        self._check_running()
        assert self.master_port is not None
        return self._dask.access.address(self.master_port)

    @property
    def security(self) -> Security:
        """The credentials of a client: `distributed.Client` takes it as ``security``."""
        from .programs.serialization import keep_file_names
        from .programs.tls import MemorySecurity

        if self._security is None:
            keep_file_names(dumps)
            self._security = MemorySecurity(**self._dask.access.security("client"))
        return self._security

    @property
    def dashboard_link(self) -> str:
        """The address of the dashboard, "" before a start and after the end.

        Whoever knows it can look at the cluster, if he has an account here. It is as ``distributed.dashboard.link`` of
        Dask's configuration says, for instance ``{JUPYTERHUB_SERVICE_PREFIX}proxy/{port}/status``, with the secret part
        of the path behind the port, or in the place of ``{prefix}``.
        """
        if not self._has_scheduler():
            return ""
        self._check_running()
        port = self._dashboard()
        if port is None:
            raise ClusterError("the scheduler was started by a launcher of your own, which tells no dashboard")
        return dashboard_link(port, self._dask.access.prefix)

    @property
    def status(self) -> Status:
        """State of the cluster, in distributed's own words."""
        from distributed import Status

        return Status[self._present_state]  # the same words, on purpose

    @property
    def _present_state(self) -> str:
        if self._state == "running" and (ended := self._master_status()) is not None:
            return "failed" if ended else "closed"
        return super()._present_state

    # --- more and fewer workers ----------------------------------------------------------------
    def scale(self, n: int | None = None, memory: str | float | None = None, cores: float | None = None) -> Any:
        """Start workers, or have some leave, until there are `n` on the hosts that the group has now.

        Workers leave in good order: what they hold is copied to others first, tasks that they work on are done by
        others. Those on hosts that were removed from the group leave, too. This ends `adapt`. A worker's threads and
        memory do not change when it gets or loses neighbours: where several are to be on a host, say ``nthreads`` and
        ``memory_limit``.

        Args:
            n: How many workers there are to be; with 0, tasks wait until there are some again.
            memory: How much memory they have together at least: bytes, or a text such as ``"64 GiB"``. This and the
                next one need workers of one size: as `nthreads` and `memory_limit` of the cluster say, or as those that
                are there.
            cores: How many threads they have together at least. Of several arguments the highest number counts.

        Returns:
            None once it is done; an awaitable where the cluster is used asynchronously.

        Raises:
            ClusterError: If the cluster does not run; or if some workers did not start, or could not leave since
                nobody can take what they hold: then what could be done is done.
            ValueError: If a number makes no sense, or none is given.
        """
        by_size = n is None and not (memory is None and cores is None)
        count = checked_count(0 if by_size else n, "the number of workers", 0)
        self._check_running()
        count = self._bounds(count, None, ("cores", cores, None), ("memory", memory, None))[0] or 0
        return self._done(lambda: self._scale(count))

    def _scale(self, count: int) -> None:
        self._end_adapting()
        super().scale(count)

    def adapt(
        self,
        minimum: int | None = None,
        maximum: float | None = None,
        *,
        Adaptive: type[Adaptive] | None = None,  # noqa: N803  (the name that clusters of distributed have)
        minimum_cores: float | None = None,
        maximum_cores: float | None = None,
        minimum_memory: str | float | None = None,
        maximum_memory: str | float | None = None,
        **options: Any,
    ) -> Adaptive:
        """Have the number of workers follow the load, until `scale` or `cleanup` is called.

        Args:
            minimum: How many workers there are at least; by default as Dask's configuration says, 0.
            maximum: How many there are at most; by default as Dask's configuration says, or if that sets no limit, one
                per host (with `gpus_per_worker`, per GPU), or as many as there are now if that is more.
            Adaptive: The strategy; by default distributed's own.
            minimum_cores: How many threads all workers together have at least. This and the next three need workers of
                one size: as `nthreads` and `memory_limit` of the cluster say, or as those that are there.
            maximum_cores: How many threads they have at most.
            minimum_memory: How much memory they have at least: bytes, or a text such as ``"16 GiB"``.
            maximum_memory: How much memory they have at most.
            **options: Further options of it, e.g. ``interval="1s"``, ``wait_count=3``, ``target_duration="5s"``.

        Returns:
            What adapts the cluster; its ``stop()`` leaves the cluster as it is then.

        Raises:
            ClusterError: If the cluster does not run, or the size of its workers is not known.
            TypeError: If there is no such option.
            ValueError: If a number makes no sense.
        """
        import dask.config
        from distributed.deploy import adaptive

        self._check_running()
        launcher = self._own_launcher()
        strategy_class = Adaptive or adaptive.Adaptive
        check_names(options, strategy_class)
        minimum, maximum = self._bounds(
            minimum, maximum, ("cores", minimum_cores, maximum_cores), ("memory", minimum_memory, maximum_memory)
        )
        if minimum is None:
            minimum = int(dask.config.get("distributed.adaptive.minimum"))
        if maximum is None:
            maximum = dask.config.get("distributed.adaptive.maximum")
        checked_count(minimum, "minimum", 0)
        if maximum != math.inf:
            checked_count(maximum, "maximum", max(1, minimum))
        else:
            maximum = max(launcher.default_count(), len(launcher.workers), minimum, 1)
        for name in ("interval", "target_duration"):
            check_duration(options.get(name), name)
        self._end_adapting()
        view = event_loop.run(AdaptedCluster.begin(self, launcher, *access(self._dask, self._master_endpoint().port)))
        try:
            strategy = strategy_class(view, minimum=minimum, maximum=maximum, **options)
        except BaseException:
            event_loop.run(view.end())
            raise
        view.strategy = strategy
        self._adapting = view
        return strategy

    def _bounds(
        self, minimum: int | None, maximum: float | None, *limits: tuple[str, object, object]
    ) -> tuple[int | None, float | None]:
        """Return the least and the highest number of workers, from limits of what they have together."""
        for what, least, most in limits:
            if least is not None:
                amount = checked_amount(least, f"minimum_{what}")
                minimum = max(minimum or 0, math.ceil(amount / self._worker_size(what)))
            if most is not None:
                amount = checked_amount(most, f"maximum_{what}")
                count = math.floor(amount / self._worker_size(what))
                if count < max(1, minimum or 0):
                    raise ValueError(
                        f"maximum_{what}={most!r} leaves room for {count} workers, fewer than there are to be at least "
                        f"({max(1, minimum or 0)}); each has {self._worker_size(what):g}"
                    )
                maximum = count if maximum is None else min(maximum, count)
        return minimum, maximum

    def _worker_size(self, what: str) -> float:
        from dask.utils import parse_bytes

        if what == "cores" and self._dask.nthreads is not None:
            return self._dask.nthreads
        limit = self._dask.memory_limit
        if what == "memory" and limit not in ("auto", None) and not (isinstance(limit, float) and limit <= 1):
            return float(parse_bytes(limit))
        key, argument = ("nthreads", "nthreads") if what == "cores" else ("memory_limit", "memory_limit")
        sizes = {number(worker.detail.get(key)) for worker in self._processes if worker.state == "ready"}
        if len(sizes) != 1 or not min(sizes):
            seen = " and ".join(f"{size:g}" for size in sorted(sizes)) or "none is there"
            raise ClusterError(
                f"limits of {what} need workers of one size, and these have none in common: {seen}\n"
                f"  Next step: say {argument}= when you make the cluster, or minimum= and maximum= workers here"
            )
        return sizes.pop()

    def _end_adapting(self) -> None:
        view, self._adapting = self._adapting, None
        if view is not None:
            event_loop.run(view.end())

    def _in_order(self, launcher: ServiceWorkerLauncher, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        import distributed.core  # noqa: F401  (it takes a second, which is not to be the event loop's)

        super()._in_order(launcher, work)

    # --- the end -------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """End the workers, the scheduler and the tunnels. Doing it again does nothing."""
        try:
            self._end_adapting()
        finally:
            try:
                super().cleanup()
            finally:
                if self._owns_group:
                    self._group.cleanup()

    def _let_go(self) -> None:
        view, self._scheduler_view = self._scheduler_view, None
        if view is not None:
            event_loop.run(view.close())
        event_loop.run(self._dask.modules.close())
        super()._let_go()
        self._security = None

    def close(self, timeout: float | None = None) -> Any:
        """Do what `cleanup` does.

        Args:
            timeout: Without use; here because the clusters of distributed have it.

        Returns:
            None; where an event loop runs, an awaitable.
        """
        return self._done(self.cleanup)

    # --- as the clusters of distributed --------------------------------------------------------
    @property
    def name(self) -> str:
        """A name that tells it from others; eight random letters and digits, unless it is set to something else."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = str(name)

    @property
    def asynchronous(self) -> bool:
        """True where methods that have to wait return awaitables: on an event loop by which it is awaited."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        return self._asynchronous or loop in self._loops

    def sync(
        self,
        func: Callable[..., Coroutine[Any, Any, Any]],
        *args: Any,
        asynchronous: bool | None = None,
        callback_timeout: str | float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call a coroutine function, such as a method of `scheduler_comm`, and wait for it.

        Args:
            func: The function.
            *args: Its arguments.
            asynchronous: Whether to return an awaitable instead; by default as `asynchronous` of the cluster.
            callback_timeout: Seconds until it must be done.
            **kwargs: Its arguments.

        Returns:
            What it returns, or an awaitable of it.

        Raises:
            TimeoutError: If it took longer.

        Examples:
            >>> cluster.sync(cluster.scheduler_comm.identity)                    # doctest: +SKIP
        """
        from dask.utils import parse_timedelta

        from .scheduler_view import awaitable

        seconds = parse_timedelta(callback_timeout)
        if not (self.asynchronous if asynchronous is None else asynchronous):
            return event_loop.run(func(*args, **kwargs), seconds)
        return asyncio.wait_for(awaitable(func(*args, **kwargs)), seconds)

    @property
    def scheduler_comm(self) -> SchedulerCalls:
        """The scheduler, to call: what it offers returns awaitables, for any event loop.

        Examples:
            >>> cluster.sync(cluster.scheduler_comm.ncores)                      # doctest: +SKIP
        """
        return self._view_of_scheduler().comm

    @property
    def scheduler_info(self) -> dict[str, Any]:
        """The scheduler's information about itself and its workers; without one, a dictionary without workers."""
        try:
            view = self._view_of_scheduler()
        except ClusterError:
            return {"workers": {}}
        event_loop.run(view.begin())
        return view.info

    @property
    def plan(self) -> set[str]:
        """The names of the workers that there are to be."""
        launcher = self._worker_launcher
        return launcher.planned if isinstance(launcher, ServiceWorkerLauncher) else self.observed

    @property
    def requested(self) -> set[str]:
        """The names of the workers that were started: those of `plan`, since a start is never put off."""
        return self.plan

    @property
    def observed(self) -> set[str]:
        """The names of the workers that the scheduler knows."""
        return {str(worker["name"]) for worker in self.scheduler_info["workers"].values()}

    def wait_for_workers(self, n_workers: int, timeout: str | float | None = None) -> Any:
        """Wait until so many workers can work.

        Args:
            n_workers: How many.
            timeout: Seconds; by default as long as the cluster runs.

        Returns:
            None; an awaitable where the cluster is used asynchronously.

        Raises:
            TimeoutError: If there are fewer then; it is distributed's own `WorkerStartTimeoutError`.
            ClusterError: If the cluster does not run.
            ValueError: If the number is no positive integer.
        """
        from dask.utils import parse_timedelta

        count = checked_count(n_workers, "n_workers", 1)
        view = self._view_of_scheduler()
        return self.sync(view.wait_for_workers, count, parse_timedelta(timeout), self._check_running)

    def get_logs(self, cluster: bool = True, scheduler: bool = True, workers: bool | Iterable[str] = True) -> Any:
        """Return what scheduler and workers have logged lately, and the events of the cluster, as texts.

        Args:
            cluster: Whether the events of the cluster are wanted.
            scheduler: Whether the log of the scheduler is wanted.
            workers: Whether those of the workers are wanted, or the addresses of some of them.

        Returns:
            The texts by ``"Cluster"``, ``"Scheduler"`` and the addresses of the workers; an awaitable of them where the
            cluster is used asynchronously.

        Raises:
            ClusterError: If the cluster does not run.

        Examples:
            >>> print(cluster.get_logs()["Scheduler"])                           # doctest: +SKIP
        """
        events = "\n".join(map(str, self.events)) if cluster else None
        return self.sync(self._view_of_scheduler().logs, events, scheduler, workers)

    def _has_scheduler(self) -> bool:
        """Tell whether there is, or should be, a scheduler: not before a start, nor after the end."""
        return self._state == "failed" or (self._state in ("running", "starting") and self.master_port is not None)

    def _view_of_scheduler(self) -> SchedulerView:
        from .scheduler_view import SchedulerView

        self._check_running()
        with self._lock:
            if self._scheduler_view is None:
                self._scheduler_view = SchedulerView(*access(self._dask, self._master_endpoint().port), self._explained)
            return self._scheduler_view

    def _done(self, work: Callable[[], None]) -> Any:
        """Do what blocks; where the cluster is used asynchronously, begin it, and return what can be awaited."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return work()
        if self.asynchronous:
            return _Ending(loop.create_task(event_loop.in_thread(work)))
        work()
        return _Ending(None)

    def __await__(self) -> Generator[Any, None, DaskCluster]:
        """Return the cluster, which is started unless that was done before: clients await it, too."""
        return self._awaited().__await__()

    async def _awaited(self) -> DaskCluster:
        self._loops.add(asyncio.get_running_loop())
        if self._state == "created" or (self._state == "starting" and self.master_port is None):
            begun: list[bool] = []
            try:
                await event_loop.in_thread(self._start_once, begun)
            except asyncio.CancelledError:
                if begun:
                    await event_loop.in_thread(self.cleanup)
                raise
        self._check_running()
        return self

    def _start_once(self, begun: list[bool]) -> None:
        with self._changing:  # which a start elsewhere holds until it is done
            if self._state == "created":
                begun.append(True)
                self.start()

    async def __aenter__(self) -> DaskCluster:
        return await self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await event_loop.in_thread(self.cleanup)

    def _further_addresses(self) -> list[str]:
        return [f"Dashboard (its address is a secret): {self.dashboard_link}"]

    @contextlib.contextmanager
    def _work_line(self) -> Iterator[Callable[[], str]]:
        with self.get_client(timeout=10) as client:

            def line() -> str:
                workers = _all_workers(client)
                threads = sum(w["nthreads"] for w in workers)
                running = sum(w["metrics"].get("task_counts", {}).get("executing", 0) for w in workers)
                return f"{counted(threads, 'thread')}, {counted(running, 'task')} running"

            yield line

    def _facts(self) -> list[Fact]:
        details = [worker.detail for worker in self._processes if worker.state == "ready"]
        threads, memory = (sum(number(detail.get(key)) for detail in details) for key in ("nthreads", "memory_limit"))
        facts = super()._facts()
        if self._state == "running" and self._master_status() is None:
            facts[0] = ("scheduler", self.scheduler_address)
            # The path of the dashboard is a secret, and outputs of notebooks are stored, committed and sent around.
            facts.insert(1, ("dashboard", Cell("its address is secret: see cluster.dashboard_link", "dim")))
        if details:
            facts += [("threads", f"{threads:g}"), ("memory", megabytes(memory) if memory else "no limit")]
        return facts

    def _columns(self) -> dict[str, list[str]]:
        details = [worker.detail for worker in self._processes]
        limits = [number(detail.get("memory_limit")) for detail in details]
        return {
            "threads": [f"{number(detail.get('nthreads')):g}" for detail in details],
            "memory": [megabytes(limit) if limit else "no limit" for limit in limits],
        }

    def __repr__(self) -> str:
        workers, network = counted(ready(self._processes), "worker"), self._network.direct
        over = f", network: {network.described()}" if network.wanted != "tunnel" else ""
        return f"<DaskCluster {self._present_state}, port {self.master_port}, {workers}{over}>"


def _all_workers(client: Client) -> list[dict[str, Any]]:
    try:
        info = client.scheduler_info(n_workers=-1)
    except TypeError:  # before 2025.4 it had all workers anyway
        info = client.scheduler_info()
    return list(info["workers"].values())


class _Ending:
    """Something that has been done, or begun, which may be awaited."""

    def __init__(self, work: asyncio.Future[None] | None) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, None, None]:
        if self._work is not None:
            yield from asyncio.shield(self._work).__await__()

    def _ipython_display_(self) -> None:
        """Show nothing where it is the last line of a notebook's cell."""
