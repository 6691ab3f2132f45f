"""Contracts of a cluster, and of the strategies that start its parts."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from lazycluster.core import event_loop
from lazycluster.core.suggestions import suggestion

from .network import Listener, Network, Reach
from .worker_hosts import places_of, usable

if TYPE_CHECKING:
    from subprocess import Popen

    from lazycluster.runtime_mgmt import RuntimeGroup

    from .master_process import MasterProcess

__all__ = ["MasterLauncher", "RuntimeCluster", "WorkerLauncher"]


class DefaultTimeout(int):
    """Documented default of a time-out, told apart from the same number given by a user, which holds as it is."""


DEFAULT_TIMEOUT = DefaultTimeout(3)  # seconds

AnyCluster = TypeVar("AnyCluster", bound="RuntimeCluster")


class MasterLauncher(abc.ABC):
    """The strategy of starting the master of a cluster.

    A subclass implements :meth:`start`, which sets ``self._port`` and ``self._process``.

    Args:
        runtime_group: The group where the workers will be started.
    """

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        self._group = runtime_group
        self._port: int | None = None
        self._process: Popen[bytes] | MasterProcess | None = None

    @property
    def port(self) -> int | None:
        """The port of the master; None if it was not started yet."""
        return self._port

    @property
    def process(self) -> Popen[bytes] | MasterProcess | None:
        """The process of the master, with the interface of `subprocess.Popen`; None if it was not started yet."""
        return self._process

    @abc.abstractmethod
    def start(self, ports: list[int] | int, timeout: int = DEFAULT_TIMEOUT, debug: bool = False) -> list[int]:
        """Start the master.

        Args:
            ports: The port of the master; or a list, of which the first port is taken that is free on the manager and
                in the group.
            timeout: Seconds until it must be there; by default 3, see `MasterWorkerCluster.start_master`.
            debug: Whether its output is printed as it comes.

        Returns:
            The ports of the list that are left; an empty list if a single port was given.

        Raises:
            PortInUseError: If a single port was given, and it is not free on the manager and on all hosts.
            NoPortsLeftError: If no port of the list is free.
            MasterStartError: If it was not there in time.
        """

    def cleanup(self) -> None:
        """Release all resources. Doing it again does nothing."""
        self._port = self._process = None


class WorkerLauncher(abc.ABC):
    """The strategy of starting the workers of a cluster.

    A subclass implements :meth:`start`, which enters the ports of the workers in ``self._ports_per_host``.

    Args:
        runtime_group: The group where the workers will be started.
    """

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        self._group = runtime_group
        self._ports_per_host: dict[str, list[int]] = {}
        self._worker_tunnels = Network()
        self._tunnelled: set[tuple[str, int]] = set()

    @property
    def ports_per_host(self) -> dict[str, list[int]]:
        """The ports where workers can be reached, by host."""
        return self._ports_per_host

    @abc.abstractmethod
    def start(self, worker_count: int, master_port: int, ports: list[int], debug: bool = False) -> list[int]:
        """Start workers in the group.

        Args:
            worker_count: How many.
            master_port: The port of the master.
            ports: Ports that may be used; only those are that are free.
            debug: Whether the output of the workers is printed as it comes.

        Returns:
            The ports that are left.

        Raises:
            NoPortsLeftError: If not enough ports are free.
        """

    def setup_worker_ssh_tunnels(self) -> None:
        """Make the ports of all workers reachable at the same loopback address on the manager and on all hosts.

        To be called where workers talk to each other. Ports that were made reachable before are passed over.

        Raises:
            ValueError: If a host in ``ports_per_host`` is not in the group.
            PortInUseError: If a port is taken on the manager or on a host.
            TunnelError: If a host does not allow it.
        """
        event_loop.run(self._setup_worker_tunnels())

    async def _setup_worker_tunnels(self) -> None:
        places = usable(places_of(self._group))
        by_host = {place.host: place for place in places}
        new = [
            (host, port)
            for host, ports in self._ports_per_host.items()
            for port in ports
            if (host, port) not in self._tunnelled
        ]
        for host, _ in new:
            if host not in by_host:
                raise ValueError(f"{host!r} is not in the group{suggestion(host, by_host)}")
        listeners = [Listener(by_host[host], port, Reach.ALL) for host, port in new]
        failed = await self._worker_tunnels.open(listeners, places)
        self._tunnelled.update((host, port) for host, port in new if port not in failed)
        for _, error in failed.values():
            raise error

    def cleanup(self) -> None:
        """Release all resources. Doing it again does nothing."""
        event_loop.run(self._worker_tunnels.close())
        self._tunnelled.clear()
        self._ports_per_host.clear()


class RuntimeCluster(abc.ABC):
    """Base of all clusters. It is cleaned up at the end of a ``with`` block, and at the end of the interpreter."""

    @abc.abstractmethod
    def cleanup(self) -> None:
        """End the cluster and release all resources. Doing it again does nothing."""

    def __enter__(self: AnyCluster) -> AnyCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cleanup()
