"""A launcher for workers that are services: supervised processes on the hosts, with ports and tunnels of their own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lazycluster.core import event_loop
from lazycluster.core.words import counted
from lazycluster.exceptions import LazyclusterError, NoAnswerError, NoPortsLeftError, PortInUseError
from lazycluster.output.progress import Progress
from lazycluster.ssh import workspace
from lazycluster.ssh.tunnels import Tunnel

from .contracts import WorkerLauncher
from .engine import Endpoint, Engine, stated
from .exceptions import ClusterError, ClusterStartError, ServiceError, WorkerStartError
from .health import Watch
from .network import Listener, Network, Port, PortSupply, forwards_needed, single_ports
from .placement import Gpus, capacity, round_robin
from .service_spec import ServiceSpec
from .services import Service, as_kind, stop_all
from .versions import check_worker_hosts, check_workers
from .worker_hosts import WorkerHost, place_again, places_of, prepared_places, usable

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup
    from lazycluster.ssh.connection import Connection

__all__ = ["ENDED", "ServiceWorkerLauncher", "Worker"]

T = TypeVar("T")

logger = logging.getLogger("lazycluster")

_PORT_ROUNDS = 10  # how often ports are chosen anew because somebody was faster
_MANY_FORWARDS = 3000
_SETTLE = 1.0  # seconds that the other workers get to fail, too, after one has failed


ENDED = "the cluster was ended meanwhile"
"""Message for a thread that starts or changes something while another one ends it."""


@dataclass
class Worker:
    """A worker that is to be, or is there.

    Attributes:
        at: Its name and ports.
        place: Where it runs.
        service: Its process.
    """

    at: Endpoint
    place: WorkerHost
    service: Service

    @property
    def name(self) -> str:
        """Its name, unique in the cluster."""
        return self.at.name

    @property
    def ports(self) -> dict[str, int]:
        """Its ports, by what they are for."""
        return self.at.ports

    @property
    def has_gone(self) -> bool:
        """True if its process has ended for good."""
        return self.service.state in ("ended", "failed")


class ServiceWorkerLauncher(WorkerLauncher):
    """Starts the workers of an engine as supervised services on the hosts, in turn (round robin).

    Args:
        runtime_group: The group where the workers will be started.
        engine: The statement of the engine.
    """

    START_LIMIT: ClassVar[float] = 180.0
    """Seconds within which all workers must be there."""

    def __init__(self, runtime_group: RuntimeGroup, engine: Engine) -> None:
        super().__init__(runtime_group)
        self.engine = engine
        self.master = Endpoint("master")
        self.network = Network()
        self.use(self.network)
        self.master_services: Callable[[], Sequence[Service]] = list
        self.watch: Watch | None = None
        self.workers: list[Worker] = []
        self.min_workers: int | None = None
        self.gpus: Gpus | None = None
        self._needed: int | None = None  # how many of those that are being started must be there in the end
        self._failed: dict[str, LazyclusterError] = {}
        self._prepared: list[Worker] = []
        self._numbers: dict[str, int] = {}
        self._supplies: list[PortSupply] = []
        self._at_work: set[asyncio.Task[Any]] = set()

    def use(self, network: Network) -> None:
        """Have processes reach each other by a network."""
        self.network = network
        network.on_lost = self._port_lost

    # --- what an engine states -----------------------------------------------------------------
    def spec(self, at: Endpoint) -> ServiceSpec:
        """Return what is to run; see `Engine.worker`."""
        return stated(self.engine, "worker", at, self.master)

    async def handshake(self, workers: Sequence[Worker]) -> Mapping[str, LazyclusterError]:
        """Check the software of the hosts before anything listens; raise an error to give up.

        Returns:
            By name the workers to be left out, and why.
        """
        if self.engine.sent:
            return await check_workers(self.engine, workers)
        return await check_worker_hosts(self.engine, workers)

    async def reprovision(self, place: WorkerHost) -> None:
        """Put on a host, which has lost what it had, what its workers need beside their settings."""

    async def retire(self, workers: Sequence[Worker]) -> dict[str, str]:
        """Have workers hand over what they hold to those that stay; returns by name why some must not leave."""
        return {}

    async def choose_to_retire(self, workers: Sequence[Worker], count: int) -> list[Worker]:
        """Return as many of some workers as are to leave: those that are missed the least."""
        restarting = [worker for worker in workers if worker.service.state != "ready"]
        others = [worker for worker in reversed(workers) if worker not in restarting]
        return [*restarting, *others][:count]

    def changed(self, service: Service) -> None:
        """Take note that the state of a worker's process has changed. For the event loop's thread."""

    # --- shared --------------------------------------------------------------------------------
    @property
    def services(self) -> list[Service]:
        """The services of the workers."""
        return [worker.service for worker in [*self.workers, *self._prepared]]

    @property
    def planned(self) -> set[str]:
        """The names of the workers that there are to be: those whose processes run, or are being started."""
        return {worker.name for worker in [*self.workers, *self._prepared] if not worker.has_gone}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something with the workers, from a user's thread; `cleanup` puts an end to it.

        Raises:
            ClusterError: If that happened.
        """
        try:
            return event_loop.run(self._tracked(work))
        except concurrent.futures.CancelledError:
            raise ClusterError(ENDED) from None

    async def _tracked(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._at_work.add(task)
        try:
            return await work
        finally:
            self._at_work.discard(task)

    async def with_master(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something that needs the master, which is over once that has ended for good.

        Raises:
            LazyclusterError: Why the master has ended, if it has.
        """
        masters = self.master_services()
        if not masters:  # one that is watched in another way
            return await work
        doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(masters[0].gone())
        try:
            await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (doing, gone):
                task.cancel()
            await asyncio.wait({doing, gone})  # not gather: cancelled itself, that would cancel them once more
        if doing.cancelled():
            raise masters[0].error or ClusterError(f"the {self.engine.master_name} has ended")
        return doing.result()

    def _per_host(self) -> Counter[str]:
        return Counter(worker.place.host for worker in self.workers)

    def _port_lost(self, tunnel: Tunnel) -> None:
        """End the workers behind a port that somebody else has taken: they would go on talking to him, in vain."""
        ours = tunnel.direction == "from_runtime"
        port, owner = (tunnel.local_port, "the manager") if ours else (tunnel.remote_port, tunnel.host)
        role = "by which it was reached" if ours else "by which it reached the rest of the cluster"
        problem = (
            f"port {port} of {owner}, {role}, could not be opened again after the link to {tunnel.host} was "
            "interrupted: another program listens there now, or the sshd forbids it"
        )
        hint = f"find that program on {owner} (ss -ltnp), end it, and start another worker with scale()"
        for worker in [*self.workers, *self._prepared]:
            if worker.place.network == tunnel.network and (not ours or port in worker.ports.values()):
                worker.service.give_up(problem, hint)

    def default_count(self) -> int:
        """Return how many workers are started if nobody says: one per host, or as many as the GPUs suffice for."""
        if self.gpus is None:
            return len(self._group.runtimes)
        return sum(event_loop.run(capacity(places_of(self._group), self.gpus, self._per_host())).values())

    def check_ports(self, count: int, ports: Sequence[int]) -> None:
        """Refuse to start more workers than there can be ports for: they would be started first.

        Raises:
            NoPortsLeftError: If so.
        """
        needed = len(self._port_uses) * count
        if needed > len(ports):
            raise NoPortsLeftError(
                f"{count} workers need {needed} ports, but only {len(ports)} may be used"
                "\n  Next step: start fewer, or pass more with ports="
            )

    async def prepare(self, count: int, debug: bool, places: Sequence[WorkerHost] | None = None) -> None:
        """Start the processes, which wait for their settings, and check them."""
        places, existing = places or await prepared_places(self._group), self._per_host()
        room = None if self.gpus is None else await capacity(places, self.gpus, existing)
        homes = round_robin(places, count, existing, room)
        self._warn_of_forwards(count + sum(existing.values()), len({place.network for place in usable(places)}))
        self._failed.clear()
        for place in homes:
            siblings = homes.count(place) + existing[place.host]
            number = self._numbers[place.host] = self._numbers.get(place.host, -1) + 1
            self._add(Endpoint(f"{place.host}-{number}", siblings=siblings), place, debug)
        self._check_failures()
        if self._prepared:
            await self._give_up(await self.handshake(list(self._prepared)))
            self._check_failures()

    def _warn_of_forwards(self, workers: int, hosts: int) -> None:
        needed = forwards_needed(self._port_uses, workers, hosts)
        if needed <= _MANY_FORWARDS or self.network.direct.is_direct:
            return
        step = ""
        if self.engine.direct != "no":
            step = f'.\n  Next step: if the hosts reach each other, {self.engine.cluster}(..., network="auto")'
        logger.warning(
            "%s on %s need %d ports that are forwarded through this machine, which takes long%s",
            counted(workers, "worker"), counted(hosts, "host"), needed, step,
        )  # fmt: skip

    def _add(self, at: Endpoint, place: WorkerHost, debug: bool) -> None:
        """Add a worker to be started; it starts at once if it waits for its settings."""
        at.move(place)
        at.gpus = self.gpus.count if self.gpus is not None else 0
        spec = self._spec(at) if self.engine.sent else ServiceSpec(f"{self.engine.name} worker")
        label = f"{spec.name} {at.name}"
        service = Service(
            spec, place, label, debug=debug, on_change=self.changed, watch=self.watch, renew=self._renewed
        )
        try:
            if place.problem is not None:
                raise place.problem
            if self.engine.sent:
                service.start()
        except LazyclusterError as error:
            self._failed[at.name] = WorkerStartError(label, place.host, str(error))
        else:
            self._prepared.append(Worker(at, place, service))

    def _spec(self, at: Endpoint) -> ServiceSpec:
        spec = self.spec(at)
        return spec if self.gpus is None else replace(spec, gpus=self.gpus.count, idle_gpus=self.gpus.idle)

    @property
    def _port_uses(self) -> list[Port]:
        return single_ports(self.engine.worker_ports)

    def start(self, worker_count: int, master_port: int, ports: list[int], debug: bool = False) -> list[int]:
        """See `WorkerLauncher.start`."""
        return self.run(self.with_master(self._start_or_undo(worker_count, master_port, list(ports), debug)))

    async def _start_or_undo(self, count: int, master_port: int, ports: list[int], debug: bool) -> list[int]:
        try:
            return await self._start(count, master_port, ports, debug)
        except BaseException:
            await self._drop_prepared()
            raise

    async def scale(self, count: int, master_port: int, ports: list[int]) -> None:
        """Start workers, or have some leave, until there are `count` on the present hosts of the group.

        Raises:
            ClusterError: If some did not start, or cannot leave. What could be done is done.
        """
        await self.forget_gone()
        places = places_of(self._group)
        here = [place.connection for place in places]
        staying = [worker for worker in self.workers if worker.place.connection in here]
        leaving = [worker for worker in self.workers if worker not in staying]
        errors: list[LazyclusterError] = []
        if len(staying) < count:
            errors += await self._add_workers(count - len(staying), master_port, ports)
        elif len(staying) > count:
            leaving += await self.choose_to_retire(staying, len(staying) - count)
        try:
            await self.leave(leaving)
        except ClusterError as error:
            errors.append(error)
        await self.network.keep([place.connection for place in [*places, *(w.place for w in self.workers)]])
        if errors:
            raise errors[0] if len(errors) == 1 else ClusterError("\n\n".join(map(str, errors)))

    async def _add_workers(self, count: int, master_port: int, ports: list[int]) -> list[LazyclusterError]:
        """Start workers where that is possible; returns why some did not start."""
        self.check_ports(count, ports)
        places = await prepared_places(self._group)
        for place in places:
            if place.problem is not None:
                logger.warning("%s: gets no worker: %s", place.host, place.problem)
        if not usable(places):
            raise ClusterError("no host of the group can be used at present:\n" + "\n".join(_problems(places)))
        self._needed = 0
        try:
            await self.prepare(count, False, usable(places))
            await self._start_or_undo(count, master_port, ports, False)
        finally:
            self._needed = None
        return list(self._failed.values())

    async def _start(self, count: int, master_port: int, ports: list[int], debug: bool) -> list[int]:
        if len(self._prepared) + len(self._failed) != count:
            self.check_ports(count, ports)
            await self._drop_prepared()
            await self.prepare(count, debug)
        supply = PortSupply(ports)
        self._supplies.append(supply)
        # All of its ports if it was started by a launcher of the same kind, which shares this with us.
        if master_port not in self.master.ports.values():
            self.master.ports = {single_ports(self.engine.master_ports)[0].name: master_port}
        places = usable(places_of(self._group))
        await self._introduce(master_port, places)
        await self._give_ports(self._prepared, supply, places)
        waiting = lambda: [w.name for w in self._prepared if w.service.state != "ready"]  # noqa: E731
        with Progress("workers", count, waiting=waiting) as progress:
            await self._bring_up_all(supply, places, progress)
        for worker in self._prepared:
            if self._port_uses:
                listening = self._ports_per_host.setdefault(worker.place.host, [])
                listening.append(worker.ports[self._port_uses[0].name])
                self._tunnelled.add((worker.place.host, listening[-1]))
        self.workers += self._prepared
        self._prepared = []
        if self._needed is None:
            for error in self._failed.values():  # there are enough without them
                logger.error("%s", error)
        return supply.left

    async def _introduce(self, port: int, places: Sequence[WorkerHost]) -> None:
        """Make the master, and the workers that are there, reachable on hosts that are new."""
        failed = await self.network.share_master(port, places)
        present = [
            Listener(worker.place, worker.ports[use.name], use.reach)
            for worker in self.workers
            for use in self._port_uses
        ]
        failed = {**await self.network.extend(present, places), **failed}
        for place in (worker.place for worker in self._prepared):
            if place.connection.unanswered is not None:
                failed.setdefault(place.host, place.connection.unanswered)
        await self._give_up({w.name: failed[w.place.host] for w in self._prepared if w.place.host in failed})
        self._check_failures()

    async def _give_ports(self, workers: Sequence[Worker], supply: PortSupply, places: Sequence[WorkerHost]) -> None:
        """Choose ports for workers and make them reachable."""
        waiting = list(workers) if self._port_uses else []
        keeper = await workspace.acquire()
        try:
            for _ in range(_PORT_ROUNDS):
                if not waiting:
                    return
                connections = [keeper.keeper, *(place.connection for place in places)]
                waiting, silent = await self._one_round(waiting, supply, places, connections)
                places = [place for place in places if place.host not in silent]
        finally:
            await keeper.release()
        raise NoPortsLeftError("every port that was chosen for a worker was taken before it was used")

    async def _one_round(
        self, workers: list[Worker], supply: PortSupply, places: Sequence[WorkerHost], connections: Sequence[Connection]
    ) -> tuple[list[Worker], set[str]]:
        """Try ports for some workers.

        Returns:
            Those workers that need other ones, and the hosts that do not answer, whose workers are given up.
        """
        width = len(self._port_uses)
        numbers = await supply.take(width * len(workers), connections)
        for index, worker in enumerate(workers):
            worker.at.ports = dict(
                zip((use.name for use in self._port_uses), numbers[index * width : (index + 1) * width], strict=True)
            )
        listeners = self._listeners([worker.place for worker in workers], numbers)
        failed = await self.network.open(listeners, places)
        for worker in workers:
            self.network.direct.locate(worker.at, worker.place)
        silent = {host: error for host, error in failed.values() if isinstance(error, NoAnswerError)}
        again = []
        for worker in workers:
            errors = [failed[port][1] for port in worker.ports.values() if port in failed]
            if errors:
                for port in worker.ports.values():
                    await self.network.close(port)
                for error in errors:
                    if not isinstance(error, (PortInUseError, NoAnswerError)):
                        raise error
                again.append(worker)
        await self._give_up({w.name: silent[w.place.host] for w in self._prepared if w.place.host in silent})
        self._check_failures()
        return [worker for worker in again if worker.place.host not in silent], set(silent)

    def _listeners(self, places: Sequence[WorkerHost], numbers: Sequence[int]) -> list[Listener]:
        """Return what will listen on some ports: those of one worker in each of the places."""
        uses = [(place, use) for place in places for use in self._port_uses]
        return [Listener(place, number, use.reach) for (place, use), number in zip(uses, numbers, strict=True)]

    async def expected(self, count: int, ports: Sequence[int], keeper: Connection) -> list[Listener]:
        """Return what workers will listen on, unless somebody else takes one of these ports before.

        Args:
            count: How many will be started.
            ports: The ports that may be used.
            keeper: The connection to the manager itself.
        """
        places = usable(await prepared_places(self._group))
        existing = self._per_host()
        room = None if self.gpus is None else await capacity(places, self.gpus, existing)
        homes = round_robin(places, count, existing, room)
        supply = PortSupply(ports)
        try:
            connections = [keeper, *(place.connection for place in places)]
            return self._listeners(homes, await supply.take(len(self._port_uses) * count, connections))
        finally:
            supply.release()

    # --- bringing them up ----------------------------------------------------------------------
    async def _bring_up_all(self, supply: PortSupply, places: Sequence[WorkerHost], progress: Progress) -> None:
        tasks = {asyncio.ensure_future(self._bring_up(worker, supply, places)): worker for worker in self._prepared}
        pending: set[asyncio.Task[None]] = set(tasks)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.START_LIMIT
        try:
            while pending and (left := deadline - loop.time()) > 0:
                done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None:
                        progress.advance()
                        deadline = loop.time() + self.START_LIMIT  # others may have waited for this
                    elif isinstance(error, LazyclusterError):
                        await self._give_up({tasks[task].name: error})
                    else:
                        raise error
                if not self._enough():
                    deadline = min(deadline, loop.time() + _SETTLE)
            for task in pending:
                error = tasks[task].service.not_ready(self.START_LIMIT)
                if self._enough() or not self._failed:
                    await self._give_up({tasks[task].name: as_kind(WorkerStartError, error)})
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        self._check_failures()

    async def _bring_up(self, worker: Worker, supply: PortSupply, places: Sequence[WorkerHost]) -> None:
        try:
            for _ in range(_PORT_ROUNDS):
                if not self.engine.sent and worker.service.state != "new":  # it ends for want of a port
                    await worker.service.stop()
                    worker.service = worker.service.again()
                spec = worker.service.spec if self.engine.sent else self._spec(worker.at)
                if await worker.service.come_up(spec, worker.ports) is None:
                    return
                for port in worker.ports.values():
                    await self.network.close(port)
                await self._give_ports([worker], supply, places)
        except ServiceError as error:
            raise as_kind(WorkerStartError, error) from None
        raise WorkerStartError(worker.name, worker.place.host, "all ports that were tried were taken")

    async def _renewed(self, service: Service) -> None:
        """Prepare a worker's host once more, whose agent is another one now."""
        worker = next(worker for worker in [*self.workers, *self._prepared] if worker.service is service)
        worker.place = service.place = await place_again(self._group, service.place.connection)
        worker.at.move(worker.place)
        await self.reprovision(worker.place)
        if not self.engine.sent:
            service.spec = self._spec(worker.at)

    async def _give_up(self, errors: Mapping[str, LazyclusterError]) -> None:
        """Go on without some workers, given by their names; those that were given up before are left as they are."""
        given_up = [worker for worker in self._prepared if worker.name in errors]
        if not given_up:
            return
        for worker in given_up:
            error = errors[worker.name]
            if isinstance(error, NoAnswerError):
                error = WorkerStartError(worker.service.label, worker.place.host, str(error))
            self._failed[worker.name] = error
        self._prepared = [worker for worker in self._prepared if worker not in given_up]
        await self._clear(given_up)

    def _enough(self) -> bool:
        wanted = len(self._prepared) + len(self._failed)
        needed = (self.min_workers or wanted) if self._needed is None else self._needed
        return len(self._prepared) >= min(wanted, needed)

    def _check_failures(self) -> None:
        if not self._enough():
            errors = list(self._failed.values())
            raise errors[0] if len(errors) == 1 else ClusterStartError(errors)

    # --- leaving -------------------------------------------------------------------------------
    async def forget_gone(self) -> None:
        """Let go of what belonged to workers whose processes have ended for good."""
        await self._let_go([worker for worker in self.workers if worker.has_gone])

    async def leave(self, workers: Sequence[Worker]) -> None:
        """End workers once they have handed over what they hold.

        Raises:
            ClusterError: If some cannot; those stay, the others have left.
        """
        refused = await self.retire(workers) if workers else {}
        await self._let_go([worker for worker in workers if worker.name not in refused])
        if refused:
            raise ClusterError("\n".join(["not all workers could leave:", *(f"  {why}" for why in refused.values())]))

    async def _let_go(self, workers: Sequence[Worker]) -> None:
        self.workers = [worker for worker in self.workers if worker not in workers]
        for worker in workers:
            listed = self._ports_per_host.get(worker.place.host, [])
            listed[:] = [port for port in listed if port not in worker.ports.values()]
            if not listed:
                self._ports_per_host.pop(worker.place.host, None)
            self._tunnelled.difference_update((worker.place.host, port) for port in worker.ports.values())
        await self._clear(workers)
        self._supplies = [supply for supply in self._supplies if supply.in_use]

    async def _clear(self, workers: Sequence[Worker]) -> None:
        """End the processes of workers, and free their ports."""
        await stop_all([worker.service for worker in workers])
        for worker in workers:
            for port in worker.ports.values():
                await self.network.close(port)
            for supply in self._supplies:
                supply.release(worker.ports.values())

    # --- the end -------------------------------------------------------------------------------
    async def _drop_prepared(self) -> None:
        dropped, self._prepared = self._prepared, []
        await self._clear(dropped)

    async def _stop(self) -> None:
        work = set(self._at_work)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        services = self.services
        try:
            await stop_all(services)
        finally:  # also if Ctrl-C puts an end to the waiting: they were told
            self.workers, self._prepared = [], []
            await self.network.close()
            for supply in self._supplies:
                supply.release()
            self._supplies.clear()

    def cleanup(self) -> None:
        """End the workers. Doing it again does nothing."""
        event_loop.run(self._stop())
        self._numbers.clear()
        super().cleanup()


def _problems(places: Sequence[WorkerHost]) -> list[str]:
    return [f"  {place.host}: {place.problem}" for place in places if place.problem is not None]
