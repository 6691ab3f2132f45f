"""The scheduler of a Dask cluster, as a program."""

from __future__ import annotations

import errno
import os
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
    messages.run(_serve)


def _scheduler_class() -> Any:
    from distributed import Scheduler

    class UpToDateScheduler(Scheduler):  # type: ignore[misc]
        """A scheduler that unpickles work with the present version of the user's modules."""

        async def update_graph(self, *arguments: Any, **named: Any) -> Any:
            """Take new work."""
            sent_modules.refresh()
            return await super().update_graph(*arguments, **named)

    return UpToDateScheduler


async def _serve(settings: dict[str, Any]) -> None:
    import dask

    from .connection_limits import limit_unauthenticated
    from .dashboards import Dashboard
    from .tls import MemorySecurity

    ports, prefix = settings["ports"], settings["prefix"]
    stop = messages.stop_signal()
    common.configure(settings["configuration"])
    dask.config.set({"temporary-directory": os.environ["LAZYCLUSTER_SCRATCH"]})  # it leaves a directory behind
    sent_modules.install(settings["modules"])
    limit_unauthenticated()
    scheduler = _scheduler_class()(
        host=common.listening_host(settings, "master"),
        port=ports["master"],
        contact_address=common.contact_address(settings, "master"),
        protocol=settings["protocol"],
        security=MemorySecurity(**settings["security"]),
        dashboard=False,
        dashboard_address=f"{messages.LOOPBACK}:{ports['dashboard']}",
        http_prefix="/" + prefix,
        **settings["options"],
    )
    sent_modules.look(scheduler)
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
