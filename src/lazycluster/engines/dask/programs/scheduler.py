"""The scheduler of a Dask cluster, as a program."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from ....cluster.sent import messages
from . import common, sent_modules


def main() -> None:
    """Run until asked to end, or until a client ends the cluster."""
    messages.emit_versions(common.PACKAGES)
    import distributed  # noqa: F401  (this takes a second, in which the manager gets ready to send the settings)

    from ....agent import filenames
    from . import serialization

    serialization.keep_file_names(filenames.dumps)
    common.import_early()  # it unpickles the work
    messages.run(_serve)


def _scheduler_class() -> Any:
    from distributed import Scheduler

    class UpToDateScheduler(Scheduler):  # type: ignore[misc]
        """A scheduler that unpickles work with the present version of the user's modules.

        Workers may be named by their host: all of them are at the same address, so distributed cannot tell hosts apart.
        """

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.host_info: _Hosts = _Hosts(self.workers)

        async def update_graph(self, *arguments: Any, **named: Any) -> Any:
            """Take new work."""
            sent_modules.refresh()
            return await super().update_graph(*arguments, **named)

        def coerce_address(self, addr: Any, resolve: bool = True) -> str:
            """Return the address of a worker.

            Raises:
                ValueError: If it is the name of a host; distributed then looks for the workers there.
            """
            if addr not in self.aliases and self.host_info.workers_on(addr):
                raise ValueError(f"{addr} is a host")
            return str(super().coerce_address(addr, resolve))

        async def scatter(self, *, workers: Any = None, **named: Any) -> Any:
            """Send data to workers."""
            return await super().scatter(workers=self._named(workers), **named)

        async def broadcast(self, *, workers: Any = None, **named: Any) -> Any:
            """Send a message to workers."""
            return await super().broadcast(workers=self._named(workers), **named)

        def _named(self, workers: Any) -> list[str] | None:
            if workers is None:
                return None
            found = (self.host_info.workers_on(one) or [self.aliases.get(one, one)] for one in workers)
            return list(dict.fromkeys(address for several in found for address in several))

    return UpToDateScheduler


class _Hosts(dict[str, Any]):
    """Hosts as distributed notes them; those of the group are known by their names, too.

    Args:
        workers: The workers of the scheduler by their addresses.
    """

    def __init__(self, workers: Mapping[str, Any]) -> None:
        super().__init__()
        self._workers = workers

    def get(self, host: Any, default: Any = None) -> Any:
        """Return what is known of a host."""
        found = super().get(host)
        if found is None and (addresses := self.workers_on(host)):
            found = {"addresses": addresses, "nthreads": sum(self._workers[one].nthreads for one in addresses)}
        return default if found is None else found

    def workers_on(self, host: Any) -> set[str]:
        """Return the addresses of the workers on a host of the group; their names are its name and a number."""
        if host == messages.LOOPBACK or not isinstance(host, str):
            return set()
        names = ((address, str(worker.name).rpartition("-")) for address, worker in self._workers.items())
        return {address for address, (place, _, number) in names if place == host and number.isdecimal()}


async def _serve(settings: dict[str, Any]) -> None:
    import dask

    from .connection_limits import limit_unauthenticated
    from .dashboards import Dashboard
    from .own_connections import prepare_scheduler
    from .tls import MemorySecurity
    from .versions import compare_what_counts

    ports, prefix = settings["ports"], settings["prefix"]
    stop = messages.stop_signal()
    common.configure(settings["configuration"])
    dask.config.set({"temporary-directory": os.environ["LAZYCLUSTER_SCRATCH"]})  # it leaves a directory behind
    sent_modules.install(settings["modules"])
    limit_unauthenticated()
    compare_what_counts()
    scheduler = _scheduler_class()(
        host=common.listening_host(settings, "master"),
        port=ports["master"],
        contact_address=common.contact_address(settings, "master"),
        protocol=settings["protocol"],
        security=MemorySecurity(**settings["security"]),
        dashboard=False,
        dashboard_address=f"{messages.LOOPBACK}:{ports['dashboard']}",
        **settings["options"],
    )
    sent_modules.look(scheduler)
    prepare_scheduler(scheduler)
    Dashboard(scheduler, "distributed.dashboard.scheduler", prefix)
    try:
        await scheduler
    except Exception as error:  # distributed tells of all that goes wrong as of one thing
        await scheduler.close()
        cause = messages.root_of(error)
        if isinstance(cause, OSError) and cause.errno in (errno.EADDRINUSE, errno.EACCES):
            raise messages.PortTakenError(ports["master"]) from None
        raise
    try:
        if scheduler.http_server.port != ports["dashboard"]:  # distributed takes another one with a warning
            raise messages.PortTakenError(ports["dashboard"])
        messages.emit("ready", address=scheduler.address)
        await common.first(scheduler.finished(), stop.wait())
        if stop.is_set() and common.is_alone():
            # The manager starts another one, or ends the workers itself: they and the clients are not to be told that
            # the cluster has ended.
            os._exit(1)
    finally:
        await scheduler.close()
