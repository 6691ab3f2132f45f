"""A launcher for masters that are services: supervised processes, on the manager or on a host."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError, NoPortsLeftError, PortInUseError
from lazycluster.runtime.network import free_on_all
from lazycluster.ssh import workspace

from .contracts import DEFAULT_TIMEOUT, DefaultTimeout, MasterLauncher
from .engine import Endpoint, Engine, stated
from .exceptions import ClusterError, MasterStartError, ServiceError
from .health import Watch
from .master_process import MasterProcess
from .network import Listener, Network, Port, PortSupply, single_ports
from .service_spec import ServiceSpec
from .services import Service, as_kind, stop_all
from .versions import check_master, check_master_host
from .worker_hosts import MANAGER, WorkerHost, place_again, places_of, prepared_places, usable
from .worker_launcher import ENDED, ServiceWorkerLauncher

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup
    from lazycluster.ssh.connection import Connection

__all__ = ["Begun", "ServiceMasterLauncher", "prepare", "try_network"]

_MOST_BESIDE_PROBE = 64  # hosts whose processes start while it is found out whether they reach each other
_PORT_ROUNDS = 10  # how often ports are chosen anew because somebody was faster


class ServiceMasterLauncher(MasterLauncher):
    """Starts the master of an engine as a supervised service.

    On the manager it is a child of the keeper: it ends when the manager does, in whatever way.

    Args:
        runtime_group: The group where the workers will be started.
        engine: The statement of the engine.

    Attributes:
        fixed_ports: Ports that have a number of the user's choice, by name; not the first one, which `start` is told.
    """

    START_LIMIT: ClassVar[float] = 60.0
    """Seconds that a master which is alive may take with the default time-out."""

    def __init__(self, runtime_group: RuntimeGroup, engine: Engine) -> None:
        super().__init__(runtime_group)
        self.engine = engine
        self.network = Network()
        self.watch: Watch | None = None
        self.spare_ports: list[int] = []
        self.fixed_ports: Mapping[str, int] = {}
        self.at = Endpoint("master")
        self._space: workspace.Workspace | None = None
        self._service: Service | None = None
        self._supplies: list[PortSupply] = []
        self._starting: asyncio.Task[Any] | None = None

    def spec(self, at: Endpoint) -> ServiceSpec:
        """Return what is to run; see `Engine.master`."""
        return stated(self.engine, "master", at)

    @property
    def ports(self) -> dict[str, int]:
        """The ports of the master by name, once they are chosen."""
        return self.at.ports

    @property
    def services(self) -> list[Service]:
        """The master's service, if it was started."""
        return [self._service] if self._service is not None else []

    async def prepare(self, debug: bool) -> None:
        """Start the process if it waits for its settings; check that it can be started if it does not."""
        if self._service is not None:
            return
        if self._space is None:
            self._space = await workspace.acquire()
        place = await self._place(self._space)
        self.at.move(place)
        # What runs, and under which name, is known once the ports are, unless it is a program of our own.
        spec = self.spec(self.at) if self.engine.sent else ServiceSpec(f"{self.engine.name} master")
        self._service = Service(
            spec, place, spec.name, debug=debug, on_change=self._changed, watch=self.watch, renew=self._renewed
        )
        if self.engine.sent:
            self._service.start()

    @property
    def _is_on_host(self) -> bool:
        return self.engine.master_on == "host" or self.network.direct.is_direct

    async def _place(self, space: workspace.Workspace) -> WorkerHost:
        needs = self.engine.master_needs
        self.at.on_manager = not self._is_on_host
        if self.at.on_manager:
            for name in needs:
                if shutil.which(name) is None:
                    raise MasterStartError(
                        f"{self.engine.name} master", problem=f"{name} is not on the PATH here", hint=f"install {name}"
                    )
            return WorkerHost(MANAGER, space.keeper, sys.executable, {}, os.getcwd())
        places = await prepared_places(self._group)
        if not usable(places):
            problems = "; ".join(str(place.problem) for place in places)
            raise ClusterError(f"no host of the group can be used at present: {problems}")
        place = usable(places)[0]
        if not self.engine.sent:
            await check_master_host(self.engine, place)
        return place

    def start(self, ports: list[int] | int, timeout: int = DEFAULT_TIMEOUT, debug: bool = False) -> list[int]:
        """See `MasterLauncher.start`."""
        if self._port is not None:
            raise ClusterError(f"the master runs already, on port {self._port}")
        limit = self._limit(timeout)
        try:
            return event_loop.run(self._start(ports, limit, debug))
        except BaseException as error:
            event_loop.run(self._stop())
            if isinstance(error, concurrent.futures.CancelledError):
                raise ClusterError(ENDED) from None
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
        self._starting = asyncio.current_task()
        try:
            return await self._brought_up(ports, limit, debug)
        finally:
            self._starting = None

    async def _brought_up(self, ports: list[int] | int, limit: float, debug: bool) -> list[int]:
        await self.prepare(debug)
        assert self._service is not None
        if self.engine.sent and not self.at.on_manager:
            await check_master(self.engine, self._service)
        fixed = set(self.fixed_ports.values())
        supply = PortSupply(port for port in ports if port not in fixed) if isinstance(ports, list) else PortSupply([])
        spare = PortSupply(port for port in self.spare_ports if port != ports and port not in fixed)
        self._supplies += [supply, spare]
        try:
            await self._serve(ports, supply, spare if self.spare_ports else supply, limit)
        except asyncio.TimeoutError:
            hint = f"a longer time-out than {limit:g} s, or see the log"
            raise as_kind(MasterStartError, self._service.not_ready(limit, hint)) from None
        except ServiceError as error:
            raise as_kind(MasterStartError, error) from None
        return [port for port in supply.left if port not in self.ports.values()] if isinstance(ports, list) else []

    async def _serve(self, ports: list[int] | int, supply: PortSupply, spare: PortSupply, limit: float) -> None:
        for _ in range(_PORT_ROUNDS):
            # In each round anew: who has not answered is not waited for again.
            places = usable(places_of(self._group))
            self.at.ports = await self._choose_ports(ports, supply, spare, places)
            # The tunnels listen before the master does: what they hold, nobody else can take meanwhile.
            clash = await self._open(places)
            if clash is None:
                # The hosts have deadlines of their own: only the master's own time counts for it.
                taken = await asyncio.wait_for(self._come_up(), limit)
                if taken is None:
                    self._is_ready()
                    return
                clash = PortInUseError(taken, self.at.host)
            for port in self.at.ports.values():
                await self.network.close(port)
            if clash.port in (ports, *self.fixed_ports.values()):
                raise clash
        raise NoPortsLeftError("every port that was chosen for the master was taken before it was used")

    async def _choose_ports(
        self, ports: list[int] | int, supply: PortSupply, spare: PortSupply, places: Sequence[WorkerHost]
    ) -> dict[str, int]:
        assert self._space is not None
        assert self._service is not None
        connections: list[Connection] = [self._space.keeper, *(place.connection for place in places)]
        if isinstance(ports, int):
            await _check_free(ports, connections)
            port = ports
        else:
            port = (await supply.take(1, connections))[0]
        first, *others = single_ports(self.engine.master_ports)
        nearby = list({self._space.keeper, self._service.place.connection})
        numbers = {first.name: port}
        for reach, reached_from in ((True, connections), (False, nearby)):
            names = [one.name for one in others if one.reach.is_between_hosts is reach]
            for name in self.fixed_ports.keys() & names:
                await _check_free(self.fixed_ports[name], reached_from)
                numbers[name] = self.fixed_ports[name]
            free = [name for name in names if name not in self.fixed_ports]
            numbers.update(zip(free, await spare.take(len(free), reached_from) if free else [], strict=True))
        return numbers

    async def _open(self, places: Sequence[WorkerHost]) -> PortInUseError | None:
        """Make the ports reachable; returns the error if one is taken."""
        ports: list[Port] = single_ports(self.engine.master_ports)
        numbers = self.at.ports
        failed: list[LazyclusterError] = []
        if self.at.on_manager:
            for port in ports:
                if port.reach.is_between_hosts:
                    failed += (await self.network.share_master(numbers[port.name], places)).values()
        else:
            assert self._service is not None
            home = self._service.place
            listeners = [Listener(home, numbers[port.name], port.reach) for port in ports]
            failed = await self.network.open_master(listeners, places)
            self.network.direct.locate(self.at, home)
        return next((error for error in failed if isinstance(error, PortInUseError)), None)

    async def _come_up(self) -> int | None:
        service = self._service
        assert service is not None
        if self.engine.sent:
            return await service.come_up(service.spec, self.at.ports)
        if service.state != "new":  # it ends for want of a port
            await service.stop()
            service = self._service = service.again()
        return await service.come_up(self.spec(self.at), self.at.ports)

    def _is_ready(self) -> None:
        assert self._service is not None
        assert self._service.pid is not None
        self._port = self.at.port
        command = self._service.spec.command or (sys.executable, self._service.label)
        self._process = MasterProcess(command, self._service.pid, self._signal)

    async def _renewed(self, service: Service) -> None:
        """Prepare for another agent. The ports stay the same, as the others know the master by them."""
        if not self.at.on_manager:
            service.place = await place_again(self._group, service.place.connection)
            self.at.move(service.place)
        if not self.engine.sent:
            service.spec = self.spec(self.at)

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
        if self._starting is not None:  # by another thread, which finds nothing any more of what this ends
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
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
        self.at.ports = {}
        self.at.address = self.at.bind = Endpoint.address
        super().cleanup()


async def _check_free(port: int, connections: Sequence[Connection]) -> None:
    for connection in connections:
        if not await free_on_all([port], [connection], skip_lost=True):
            raise PortInUseError(port, connection.host)


@dataclass(frozen=True)
class Begun:
    """A start that has begun.

    Attributes:
        count: How many workers are started.
        master_ports: The ports that the master may have.
        ports: The ports that the workers may have.
        debug: Whether all output is printed as it comes.
    """

    count: int
    master_ports: Sequence[int]
    ports: Sequence[int]
    debug: bool


async def prepare(master: ServiceMasterLauncher, worker: ServiceWorkerLauncher, begun: Begun) -> None:
    """Start all processes at once; they wait for their settings, and meanwhile import what they are made of."""
    direct = master.network.direct
    # An undecided one says where the master runs; and hosts that are busy with imports answer very many others late.
    first = not direct.uses or (direct.is_direct and master._group.runtime_count > _MOST_BESIDE_PROBE)
    if first:
        await try_network(master, worker, begun)
    work = [master.prepare(begun.debug), worker.prepare(begun.count, begun.debug)]
    if direct.is_direct and not first:
        work.append(try_network(master, worker, begun))
    await event_loop.together([asyncio.ensure_future(one) for one in work])


async def try_network(master: ServiceMasterLauncher, worker: ServiceWorkerLauncher, begun: Begun) -> None:
    """Find out whether hosts reach each other on the ports that will be used, and choose the network if need be.

    Raises:
        UnreachableError: If they do not, and nothing else is to be used.
    """
    space = await workspace.acquire()
    try:
        places = usable(await prepared_places(master._group))
        if not places:
            return  # which is told by whoever prepares them
        connections = [space.keeper, *(place.connection for place in places)]
        first, *others = single_ports(master.engine.master_ports)
        supply, spare = PortSupply(begun.master_ports), PortSupply(master.spare_ports)
        try:
            number = (await supply.take(1, connections))[0]
            await spare.take(len(others), connections)  # as it will be: workers get those behind
            workers = await worker.expected(begun.count, begun.ports, space.keeper)
        except NoPortsLeftError:
            return  # likewise
        finally:
            for one in (supply, spare):
                one.release()
        master.network.direct.master = places[0]
        await master.network.direct.decide([Listener(places[0], number, first.reach), *workers], places)
    finally:
        await space.release()
