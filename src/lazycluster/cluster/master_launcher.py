"""A launcher for masters that are services: processes on the manager that end when it does."""

from __future__ import annotations

import abc
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lazycluster.core import event_loop
from lazycluster.exceptions import NoPortsLeftError, PortInUseError
from lazycluster.runtime.network import free_on_all
from lazycluster.ssh import workspace

from .contracts import DEFAULT_TIMEOUT, DefaultTimeout, MasterLauncher
from .exceptions import ClusterError, MasterStartError, ServiceError
from .health import Watch
from .master_process import MasterProcess
from .network import Network, PortSupply
from .programs import Program
from .services import Service, as_kind, ready_or_port_taken, stop_all
from .worker_hosts import MANAGER, WorkerHost, places_of, usable
from .worker_launcher import ServiceWorkerLauncher

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup
    from lazycluster.ssh.connection import Connection

__all__ = ["ServiceMasterLauncher", "prepare"]

_PORT_ROUNDS = 10  # how often ports are chosen anew because somebody was faster


class ServiceMasterLauncher(MasterLauncher):
    """Starts a master on the manager, as a child of the keeper: it ends when the manager does, in whatever way."""

    START_LIMIT: ClassVar[float] = 60.0
    """Seconds that a master which is alive may take with the default time-out."""
    extra_ports: ClassVar[tuple[str, ...]] = ()
    """Names of further ports of the master, which only the manager uses."""

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        super().__init__(runtime_group)
        self.network = Network()
        self.watch: Watch | None = None
        self.spare_ports: list[int] = []
        self.ports: dict[str, int] = {}
        self._space: workspace.Workspace | None = None
        self._service: Service | None = None
        self._supplies: list[PortSupply] = []

    # --- what an engine states -----------------------------------------------------------------
    @abc.abstractmethod
    def program(self) -> Program:
        """Return what is to run."""

    @abc.abstractmethod
    def settings(self, ports: Mapping[str, int]) -> dict[str, Any]:
        """Return what the program is told: `ports` has the port ``master`` and the extra ones."""

    # --- shared --------------------------------------------------------------------------------
    @property
    def services(self) -> list[Service]:
        """The master's service, if it was started."""
        return [self._service] if self._service is not None else []

    async def prepare(self, debug: bool) -> None:
        """Start the process, which waits for its settings."""
        if self._service is not None:
            return
        if self._space is None:
            self._space = await workspace.acquire()
        place = WorkerHost(MANAGER, self._space.keeper, sys.executable, {}, os.getcwd())
        program = self.program()
        self._service = Service(
            program,
            place,
            program.name,
            debug=debug,
            on_change=self._changed,
            watch=self.watch,
            renew=self._renewed,
        )
        self._service.start()

    def start(self, ports: list[int] | int, timeout: int = DEFAULT_TIMEOUT, debug: bool = False) -> list[int]:
        """See `MasterLauncher.start`."""
        if self._port is not None:
            raise ClusterError(f"the master runs already, on port {self._port}")
        limit = self._limit(timeout)
        try:
            return event_loop.run(self._start(ports, limit, debug))
        except BaseException:
            event_loop.run(self._stop())
            raise

    def _limit(self, timeout: float) -> float:
        if isinstance(timeout, DefaultTimeout):
            return max(timeout, self.START_LIMIT)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
        if not timeout >= 0:  # NaN is not, either
            raise ValueError(f"timeout must be at least 0 seconds, not {timeout:g}")
        return timeout

    async def _start(self, ports: list[int] | int, limit: float, debug: bool) -> list[int]:
        await self.prepare(debug)
        assert self._space is not None and self._service is not None
        supply = PortSupply(ports if isinstance(ports, list) else [])
        spare = PortSupply(port for port in self.spare_ports if port != ports)
        self._supplies += [supply, spare]
        try:
            await self._serve(ports, supply, spare, limit)
        except asyncio.TimeoutError:
            hint = f"a longer time-out than {limit:g} s, or see the log"
            raise as_kind(MasterStartError, self._service.not_ready(limit, hint)) from None
        except ServiceError as error:
            raise as_kind(MasterStartError, error) from None
        return [port for port in supply.left if port not in self.ports.values()] if isinstance(ports, list) else []

    async def _serve(self, ports: list[int] | int, supply: PortSupply, spare: PortSupply, limit: float) -> None:
        service, space = self._service, self._space
        assert service is not None and space is not None
        for _ in range(_PORT_ROUNDS):
            # In each round anew: who has not answered is not waited for again.
            places = usable(places_of(self._group))
            connections: list[Connection] = [space.keeper, *(place.connection for place in places)]
            if isinstance(ports, int):
                await _check_free(ports, connections)
                port = ports
            else:
                port = (await supply.take(1, connections))[0]
            extra = await (spare if self.spare_ports else supply).take(len(self.extra_ports), connections[:1])
            taken = {"master": port, **dict(zip(self.extra_ports, extra, strict=True))}
            # The tunnels listen before the master does: what they hold, nobody else can take meanwhile.
            failed = await self.network.share_master(port, places)
            clash = next((error for error in failed.values() if isinstance(error, PortInUseError)), None)
            if clash is None:
                # The hosts have deadlines of their own: only the master's own time counts for it.
                name, fields = await asyncio.wait_for(self._tell(service, taken), limit)
                if name == "ready":
                    self._is_ready(taken)
                    return
                clash = PortInUseError(int(fields["port"]), MANAGER)
            await self.network.close(port)
            if isinstance(ports, int) and clash.port == ports:
                raise clash
        raise NoPortsLeftError("every port that was chosen for the master was taken before it was used")

    async def _tell(self, service: Service, ports: dict[str, int]) -> tuple[str, dict[str, Any]]:
        await service.send(self.settings(ports))
        return await ready_or_port_taken(service)

    def _is_ready(self, ports: dict[str, int]) -> None:
        assert self._service is not None and self._service.pid is not None
        self.ports, self._port = ports, ports["master"]
        self._process = MasterProcess(
            self._service.program.argv or (sys.executable, self._service.label), self._service.pid, self._signal
        )

    async def _renewed(self, service: Service) -> dict[str, Any]:
        """Return what the master is told under another keeper: the same, as the others know it by its ports."""
        return self.settings(self.ports)

    def _signal(self, name: str) -> None:
        service = self._service
        if service is not None:
            event_loop.get_loop().call_soon_threadsafe(service.signal, name)

    def _changed(self, service: Service) -> None:
        if not isinstance(self._process, MasterProcess):
            return
        if service.state in ("ended", "failed"):
            self._process.ended(service.exit_status)
        elif service.state == "ready" and service.pid is not None:
            self._process.pid = service.pid  # it may have been started again

    async def _stop(self) -> None:
        if self._service is not None:
            await stop_all([self._service])
            self._service = None
        await self.network.close()
        for supply in self._supplies:
            supply.release()
        self._supplies.clear()
        if self._space is not None:
            space, self._space = self._space, None
            await space.release()

    def cleanup(self) -> None:
        """End the master. Doing it again does nothing."""
        event_loop.run(self._stop())
        self.ports = {}
        super().cleanup()


async def _check_free(port: int, connections: Sequence[Connection]) -> None:
    for connection in connections:
        if not await free_on_all([port], [connection], skip_lost=True):
            raise PortInUseError(port, connection.host)


async def prepare(master: ServiceMasterLauncher, worker: ServiceWorkerLauncher, count: int, debug: bool) -> None:
    """Start all processes at once; they wait for their settings, and meanwhile import what they are made of."""
    await event_loop.together(
        [asyncio.ensure_future(master.prepare(debug)), asyncio.ensure_future(worker.prepare(count, debug))]
    )
