"""`MasterWorkerCluster`: start, state and end, which all clusters share.

How a master and the workers are started is the strategy of a `MasterLauncher` and a `WorkerLauncher`; own ones may be
passed to every cluster. The launchers of engines are in `master_launcher` and `worker_launcher`: an engine states its
programs, ports and settings.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lazycluster.core import event_loop, lifetime
from lazycluster.exceptions import LazyclusterError, NoRuntimesError
from lazycluster.output import progress
from lazycluster.output.lines import settled, write
from lazycluster.output.view import Cell, Fact, Shown, View, headline
from lazycluster.runtime.reachability import NetworkChoice

from . import connection_file
from .contracts import DEFAULT_TIMEOUT, MasterLauncher, RuntimeCluster, WorkerLauncher
from .direct_network import DirectNetwork
from .exceptions import ClusterError
from .health import ClusterEvent, EventCallback, ProcessStatus, Watch
from .master_launcher import Begun, ServiceMasterLauncher, prepare, try_network
from .network import Network
from .own_master import OwnMasterWatch
from .placement import Gpus
from .usage import Meter, ProcessUsage
from .views import cluster_view
from .worker_launcher import ENDED, ServiceWorkerLauncher

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup

    from .services import Service

__all__ = ["MasterLauncher", "MasterWorkerCluster", "RuntimeCluster", "WorkerLauncher"]

T = TypeVar("T")
_INTERRUPT_LIMIT = 15.0  # seconds
logger = logging.getLogger("lazycluster")


class MasterWorkerCluster(Shown, RuntimeCluster):
    """Base of clusters with a master and workers.

    Args:
        runtime_group: The hosts that can be used.
        ports: The ports that may be used; by default those from ``DEFAULT_PORT_RANGE_START`` up to, and without,
            ``DEFAULT_PORT_RANGE_END``.
        master_launcher: How the master is started: a `MasterLauncher`, or a class of it; by default the engine's own.
        worker_launcher: How the workers are started: a `WorkerLauncher`, or a class of it; by default the engine's own.
        min_workers: How many workers must be there for a start to succeed; by default all that were asked for.
        gpus_per_worker: How many GPUs of its host each worker gets for itself (``CUDA_VISIBLE_DEVICES``). Then there is
            by default one worker for each of them, and hosts without GPUs get none.
        idle_gpus: Whether GPUs are left alone that others use.
        network: How hosts reach each other: ``"tunnel"``: through this machine, where the network sees ssh and nothing
            else; ``"direct"``: at their own addresses, with the master on the first host of the group; ``"auto"``:
            direct if all of them do and what they say is encrypted and authenticated, else through tunnels.

    Raises:
        ValueError: If an argument makes no sense.

    Examples:
        >>> cluster = MyCluster(RuntimeManager().create_group())              # doctest: +SKIP
        >>> cluster.start()                                                   # doctest: +SKIP

        With launchers of your own:

        >>> cluster = MyCluster(group, None, MyMasterLauncher(group), MyWorkerLauncher)    # doctest: +SKIP
    """

    DEFAULT_MASTER_PORT = 24786
    """Outside the ranges from which systems take ports for outgoing connections, like all default ports here."""
    DEFAULT_PORT_RANGE_START = 25000
    DEFAULT_PORT_RANGE_END = 28000

    _workers_talk = True
    """True if the workers of this engine connect to each other."""

    def __init__(
        self,
        runtime_group: RuntimeGroup,
        ports: list[int] | None = None,
        master_launcher: MasterLauncher | type[MasterLauncher] | None = None,
        worker_launcher: WorkerLauncher | type[WorkerLauncher] | None = None,
        *,
        min_workers: int | None = None,
        gpus_per_worker: int | None = None,
        idle_gpus: bool = False,
        network: NetworkChoice = "tunnel",
    ) -> None:
        if min_workers is not None and min_workers < 1:
            raise ValueError(f"min_workers must be at least 1, not {min_workers}")
        if idle_gpus and gpus_per_worker is None:
            raise ValueError("idle_gpus says which GPUs may be used: say how many with gpus_per_worker, too")
        self._watch = Watch()
        self._meter = Meter()
        self._own_master = OwnMasterWatch(self._watch)
        self._group = runtime_group
        self._network = Network(DirectNetwork(network, None if network == "tunnel" else runtime_group._reachability))
        self._all_ports = _checked_ports(ports, self.DEFAULT_PORT_RANGE_START, self.DEFAULT_PORT_RANGE_END)
        self._ports = list(self._all_ports)
        self._min_workers = min_workers
        self._gpus = None if gpus_per_worker is None else Gpus(gpus_per_worker, idle_gpus)
        self._state = "created"
        self._start_problem = ""
        self._connection_files: list[Path] = []
        self._files_owner = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._changing = threading.RLock()  # held while workers are started or leave: one change at a time
        self._master_launcher = _launcher(master_launcher, runtime_group) or self._default_master_launcher()
        self._worker_launcher = _launcher(worker_launcher, runtime_group) or self._default_worker_launcher()
        self._connect_launchers()
        self._end_with_program()
        self._forgetting: Any = None

    # --- what an engine states -----------------------------------------------------------------
    def _default_master_launcher(self) -> MasterLauncher:
        raise ValueError(f"{type(self).__name__} has no master launcher of its own: pass one as master_launcher=")

    def _default_worker_launcher(self) -> WorkerLauncher:
        raise ValueError(f"{type(self).__name__} has no worker launcher of its own: pass one as worker_launcher=")

    def _connect_launchers(self) -> None:
        """Tell the launchers what they share; called once both are there."""
        master, worker = self._master_launcher, self._worker_launcher
        if isinstance(master, ServiceMasterLauncher):
            master.spare_ports = list(self._all_ports)
            master.watch = self._watch
        if isinstance(worker, ServiceWorkerLauncher):
            worker.watch = self._watch
            worker.min_workers = self._min_workers
            worker.gpus = self._gpus or worker.gpus
            if isinstance(master, ServiceMasterLauncher):
                worker.use(self._network)
                master.network = self._network
        elif self._gpus is not None:
            raise ValueError("gpus_per_worker needs a launcher that builds on ServiceWorkerLauncher")

    # --- documented ----------------------------------------------------------------------------
    @property
    def master_port(self) -> int | None:
        """The port of the master; None if it was not started yet."""
        return self._master_launcher.port

    @property
    def runtime_group(self) -> RuntimeGroup:
        """The group whose hosts are used."""
        return self._group

    def start(self, worker_count: int | None = None, master_port: int | None = None, debug: bool = False) -> None:
        """Start the master and the workers. If that fails, nothing of it is left.

        Args:
            worker_count: How many workers; by default one per host, or one per GPU with `gpus_per_worker`.
            master_port: The port of the master; by default ``DEFAULT_MASTER_PORT``, or another one if it is taken.
            debug: Whether all output is printed as it comes, each line with its host.

        Raises:
            ClusterError: If a part does not start; the message has its own output.
            PortInUseError: If the given master port is taken.
            NoPortsLeftError: If too few ports are free.
        """
        self._check_not("running", "starting")
        with self._changing, self._shown(f"Starting the {type(self).__name__}"):
            with self._lock:
                self._check_not("running", "starting")
                self._state = "starting"
            try:
                count = self._count(worker_count)
                self._prepare(count, master_port, debug)
                self.start_master(master_port, debug=debug)
                self.start_workers(count, debug=debug)
            except BaseException as error:
                ended = self._state in ("closing", "closed")
                self._undo()
                self._start_problem = str(error) or type(error).__name__
                if ended and isinstance(error, LazyclusterError):  # that its parts have ended says nothing of the cause
                    raise ClusterError(ENDED) from error
                raise

    def start_master(self, master_port: int | None = None, timeout: int = DEFAULT_TIMEOUT, debug: bool = False) -> None:
        """Start the master.

        Args:
            master_port: Its port; by default ``DEFAULT_MASTER_PORT``, or another one if that is not free on the
                manager and in the group.
            timeout: Seconds until it must be there. A number that you give holds as it is. By default it is 3, and a
                master that is alive may take longer, up to a limit of the engine's own: on a loaded machine, some need
                more than 3 s to import what they are made of.
            debug: Whether its output is printed as it comes.

        Raises:
            PortInUseError: If the given port is taken.
            NoPortsLeftError: If no port is free.
            MasterStartError: If it was not there in time.
        """
        with self._changing:
            self._check_hosts()
            self._end_when_forgotten()
            if self.master_port is not None:
                raise ClusterError(f"the master runs already, on port {self.master_port}")
            if not self._network.direct.uses:
                self._prepare_network(master_port)
            if master_port is None:
                left = _call(self._master_launcher.start, self._master_ports(None), timeout, debug=debug)
                ours = set(self._ports)
                self._ports = [port for port in left if port in ours]
            else:
                _call(self._master_launcher.start, master_port, timeout, debug=debug)
            if self._is_custom(self._master_launcher):
                self._own_master.begin(self._master_launcher.process)
            taken = self.master_port
            self._ports = [port for port in self._ports if port != taken]
            self._begun("starting")

    def _master_ports(self, wanted: int | None) -> list[int]:
        """Return the ports that the master may have."""
        if wanted is not None:
            return [wanted]
        return [self.DEFAULT_MASTER_PORT, *(port for port in self._ports if port != self.DEFAULT_MASTER_PORT)]

    def start_workers(self, count: int | None = None, debug: bool = False) -> None:
        """Start workers; may be called again for more of them.

        Args:
            count: How many; by default one per host, or one per GPU that is free with `gpus_per_worker`.
            debug: Whether their output is printed as it comes, each line with its host.

        Raises:
            ClusterError: If the master was not started, or a worker does not start; the message has its output.
            NoPortsLeftError: If too few ports are free.
        """
        with self._changing, self._shown(f"Starting the {type(self).__name__}"):
            count = self._count(count)
            self._end_when_forgotten()
            port = self.master_port
            if port is None:
                raise ClusterError("the master was not started: call start(), or start_master() first")
            custom = self._is_custom(self._worker_launcher)
            if custom:
                self._share_with_custom_workers(port)
            self._ports = list(_call(self._worker_launcher.start, count, port, list(self._ports), debug=debug))
            if custom and self._workers_talk:
                self._worker_launcher.setup_worker_ssh_tunnels()
            self._begun("running")

    def write_connection_file(self, path: str | os.PathLike[str]) -> Path:
        """Write a file from which other processes of this user connect, with ``connect(path)`` of the cluster's class.

        It holds the secrets of the cluster, so only its owner can read it. It is removed when the cluster ends, unless
        something else has its name by then.

        Args:
            path: Where; an earlier connection file is replaced, nothing else.

        Returns:
            The absolute path.

        Raises:
            ClusterError: If the cluster does not run, its engine knows no such file, or there is something else.
            OSError: If it cannot be written.
        """
        content = {"manager": os.getpid(), **self._connection()}
        file = connection_file.write(path, type(self).__name__, content, self._files_owner)
        self._connection_files.append(file)
        return file

    def _connection(self) -> dict[str, Any]:
        """Return what another process needs to connect, as JSON can hold it."""
        raise ClusterError(f"{type(self).__name__} has no connection files")

    # --- how its processes are ------------------------------------------------------------------
    @property
    def status(self) -> Any:
        """State of the cluster: ``created``, ``starting``, ``running``, ``closing``, ``closed`` or ``failed``.

        A cluster has failed if it did not start, or if its master, or each of its workers, has ended for good: it was
        started again as often as is allowed within minutes. Use of it raises an error then, which says why.
        """
        return self._present_state

    @property
    def _present_state(self) -> str:
        return "failed" if self._state == "running" and self._problem() else self._state

    @property
    def master(self) -> ProcessStatus | None:
        """State of the master; None if it was not started, or by a launcher of your own that tells no process."""
        found = (ProcessStatus.of(service) for service in self._services(self._master_launcher))
        return next(found, self._own_master.status)

    @property
    def workers(self) -> list[ProcessStatus]:
        """State of each worker, those that have failed for good included."""
        return [ProcessStatus.of(service) for service in self._services(self._worker_launcher)]

    def usage(self, timeout: float = 1.0) -> dict[str, ProcessUsage]:
        """Ask the hosts what the workers use of them: processor and memory, each with all that it has started.

        May be called every second: it costs a host no more than 1 % of a core.

        Args:
            timeout: Seconds for the hosts' answers. One that says nothing is waited for only once.

        Returns:
            What is known, by the names that `workers` has. What has not been heard of for 10 s is left out.

        Examples:
            >>> for name, used in cluster.usage().items():                       # doctest: +SKIP
            ...     print(name, used.cpu, used.memory)
        """
        return event_loop.run(self._meter.look(self._services(self._worker_launcher), timeout))

    @property
    def events(self) -> list[ClusterEvent]:
        """Events of the master and the workers, the latest last."""
        return self._watch.events

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        """Have a function called with each event of the master and the workers.

        It is called on the thread that serves all connections: it must not wait, nor use the cluster itself.

        Args:
            callback: The function; it gets a `ClusterEvent`.

        Returns:
            A function that ends it.

        Examples:
            >>> cluster.on_event(print)                                          # doctest: +SKIP
        """
        return self._watch.on_event(callback)

    def print_log(self) -> None:
        """Print the logs of the group's tasks, and what master and workers printed."""
        self._group.print_log()
        for launcher in (self._master_launcher, self._worker_launcher):
            for service in getattr(launcher, "services", []):
                head = headline(f"{service.label} on {service.place.host} ({service.log_file})")
                write(f"{head}\n{settled(service.last_output(1 << 20))}\n")

    def cleanup(self) -> None:
        """End the workers, the master and the tunnels. Doing it again does nothing.

        Raises:
            ClusterError: If a launcher's own clean-up fails; the others are cleaned up nevertheless.
        """
        errors: list[Exception] = []
        ours = alone = False
        try:
            with self._lock:
                if self._state == "closing":
                    return
                ours, self._state = True, "closing"
            alone = self._interrupt()
            if self._forgetting is not None:
                self._forgetting.detach()
            while self._connection_files:
                connection_file.remove(self._connection_files.pop(), self._files_owner)
            for launcher in (self._worker_launcher, self._own_master, self._master_launcher):
                try:
                    launcher.cleanup()
                except Exception as error:  # noqa: BLE001 - whatever a custom launcher does, the rest must be ended
                    errors.append(error)
        finally:  # also after Ctrl-C: it may be done again
            try:
                if ours:
                    self._let_go()
            finally:
                if ours:
                    self._ports = list(self._all_ports)
                    self._state = "closed"
                if alone:
                    self._changing.release()
        if errors:
            raise ClusterError("cleaning up: " + "; ".join(str(error) for error in errors)) from errors[0]

    def _let_go(self) -> None:
        """Let go of what master and workers had in common, once they have ended."""
        self._network.direct.forget()

    # --- shared --------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _shown(self, what: str) -> Iterator[None]:
        """Show how far something is that takes long."""
        with progress.shown(getattr(self._group, "progress", None)), progress.Progress(what):
            yield

    def _end_with_program(self) -> None:
        lifetime.register(self)

    def _end_when_forgotten(self) -> None:
        if self._forgetting is None or not self._forgetting.alive:
            self._forgetting = lifetime.when_forgotten(
                self, (self._worker_launcher, self._own_master, self._master_launcher)
            )

    def _begun(self, state: str) -> None:
        """Note what has been reached, unless somebody ends it meanwhile."""
        with self._lock:
            if self._state == "closing":
                raise ClusterError(ENDED)
            self._state = state

    def _interrupt(self) -> bool:
        """Put an end to what other threads start or change, so that they cannot add anything to what is being ended.

        Returns:
            Whether none can do so until `_changing` is released. A launcher of somebody's own may not be interrupted.
        """
        deadline = time.monotonic() + _INTERRUPT_LIMIT
        patience = 0.0
        while not self._changing.acquire(timeout=patience):
            if time.monotonic() > deadline:
                return False
            for launcher in (self._worker_launcher, self._master_launcher):
                if not self._is_custom(launcher):
                    with contextlib.suppress(Exception):  # it is cleaned up again, and that tells of it
                        launcher.cleanup()
            patience = 0.1
        return True

    def _undo(self) -> None:
        try:
            self.cleanup()
        except LazyclusterError as error:  # what is being raised already is the cause that the user needs
            logger.error("%s", error)
        self._state = "failed"

    def _check_not(self, *states: str) -> None:
        if self._state in states:
            raise ClusterError(f"the cluster is {self._state}: end it with cleanup() before it is started again")

    def _check_hosts(self) -> None:
        if self._group.runtime_count == 0:
            raise NoRuntimesError("the group has no runtime: a cluster needs at least one host")

    def _count(self, count: int | None) -> int:
        self._check_hosts()
        if count is None:
            launcher = self._worker_launcher
            if isinstance(launcher, ServiceWorkerLauncher):
                count = launcher.default_count()
            else:
                count = int(self._group.runtime_count)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"the number of workers must be an integer of at least 1, not {count!r}")
        if self._min_workers is not None and self._min_workers > count:
            raise ValueError(f"min_workers is {self._min_workers}, but only {count} workers are asked for")
        return count

    @staticmethod
    def _is_custom(launcher: MasterLauncher | WorkerLauncher) -> bool:
        return not isinstance(launcher, (ServiceMasterLauncher, ServiceWorkerLauncher))

    def _prepare(self, count: int, master_port: int | None, debug: bool) -> None:
        """Have everything begin that takes long and depends on nothing else."""
        master, worker = self._master_launcher, self._worker_launcher
        if isinstance(master, ServiceMasterLauncher) and isinstance(worker, ServiceWorkerLauncher):
            worker.check_ports(count, self._ports)
            begun = Begun(count, self._master_ports(master_port), self._ports, debug)
            worker.run(prepare(master, worker, begun))
            self._say_network()

    def _prepare_network(self, master_port: int | None) -> None:
        """Choose the network for a master that is started by itself."""
        master, worker = self._master_launcher, self._worker_launcher
        if isinstance(master, ServiceMasterLauncher) and isinstance(worker, ServiceWorkerLauncher):
            begun = Begun(self._count(None), self._master_ports(master_port), self._ports, False)
            worker.run(try_network(master, worker, begun))
            self._say_network()

    def _say_network(self) -> None:
        direct = self._network.direct
        if direct.wanted != "tunnel":
            level = logging.WARNING if direct.wanted == "auto" and not direct.is_direct else logging.INFO
            logger.log(level, "network: %s", direct.described())

    def _share_with_custom_workers(self, port: int) -> None:
        try:
            self._group.expose_port_to_runtimes(port)
        except LazyclusterError as error:
            logger.warning("the master's port %d is not exposed to all hosts: %s", port, error)

    # --- what is shown of it --------------------------------------------------------------------
    def _further_addresses(self) -> list[str]:
        """Return lines on what else can be looked at, for a cluster in the foreground."""
        return []

    @contextlib.contextmanager
    def _work_line(self) -> Iterator[Callable[[], str]]:
        """Have a function that says in a line what is done, for a cluster in the foreground."""
        yield lambda: ""

    @property
    def _processes(self) -> list[Service]:
        """The processes of the workers."""
        return self._services(self._worker_launcher)

    def _facts(self) -> list[Fact]:
        """Return what is said of the cluster."""
        hosts = dict.fromkeys(worker.place.host for worker in self._processes)
        facts: list[Fact] = [("master", f"port {self.master_port}" if self.master_port else "none")]
        facts.append(("hosts", str(len(hosts))))
        if self._network.direct.wanted != "tunnel":
            facts.append(("network", self._network.direct.described()))
        problem = self._problem() if self._state == "running" else ""
        problems = [problem] if problem else list(self._link_problems.values())
        return [*facts, *(("problem", Cell(one, "bad")) for one in problems)]

    @property
    def _link_problems(self) -> dict[str, str]:
        """Reasons why nothing is heard of hosts at present, by host."""
        services = [*self._services(self._master_launcher), *self._processes]
        return {service.place.host: problem for service in services if (problem := service.link_problem)}

    def _columns(self) -> dict[str, list[str]]:
        """Return what an engine shows of each worker beside its state."""
        return {}

    def _view(self) -> View:
        return cluster_view(type(self).__name__, self._present_state, self._facts(), self._processes, self._columns())

    @staticmethod
    def _services(launcher: MasterLauncher | WorkerLauncher) -> list[Service]:
        return list(getattr(launcher, "services", []))

    def _problem(self) -> str:
        """Return why the cluster cannot do anything any more, "" if it can."""
        if problem := self._master_problem():
            return problem
        workers = self._services(self._worker_launcher)
        if workers and all(worker.state == "failed" for worker in workers):
            return f"no worker is left; the last one: {workers[-1].error}"
        return ""

    def _master_problem(self) -> str:
        failed = (s for s in self._services(self._master_launcher) if s.state == "failed")
        return next((str(service.error) for service in failed), self._own_master.problem)

    def _check_alive(self) -> None:
        problem = self._problem() if self._state == "running" else ""
        if problem:
            raise self._failure(problem)

    @staticmethod
    def _failure(problem: str) -> ClusterError:
        return ClusterError(f"the cluster has failed: {problem}\n  Next step: call cleanup(), then start()")


def _launcher(given: Any, group: RuntimeGroup) -> Any:
    """Return a launcher from what was passed: one, or a class of it."""
    return given(group) if isinstance(given, type) else given


def _checked_ports(ports: Sequence[int] | None, start: int, end: int) -> list[int]:
    if ports is None:
        return list(range(start, end))
    from lazycluster.ssh.tunnels import check_port

    checked = list(dict.fromkeys(check_port(port, "ports") for port in ports))
    if not checked:
        raise ValueError("ports is an empty list: a cluster needs ports; leave it out for the default ones")
    return checked


def _call(function: Callable[..., T], *arguments: Any, debug: bool) -> T:
    """Call a launcher's method with `debug`, if it takes that: launchers of earlier documents do not."""
    parameters = inspect.signature(function).parameters
    takes = "debug" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return function(*arguments, debug=debug) if takes else function(*arguments)
