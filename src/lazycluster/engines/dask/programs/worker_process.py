"""The code of a worker process. Imported by the nanny's program before it is copied."""

from __future__ import annotations

from typing import Any

import dask
import distributed
from distributed import Security, Worker

from ....agent import filenames
from ....cluster.sent.messages import PortTakenError
from . import sent_modules, serialization
from .connection_limits import limit_unauthenticated
from .dashboards import Dashboard
from .tls import MemorySecurity


def configure(forked: bool) -> None:
    """Choose how the nanny makes the worker process."""
    if forked:
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
        # Else distributed imports pandas and others into the nanny, to have them imported in its fork server.
        distributed.utils._forkserver_preload_set = True


class PagedWorker(Worker):  # type: ignore[misc]
    """A worker whose dashboard has a secret path, and is imported when it is first looked at."""

    def __init__(self, *arguments: Any, modules: str = "", **options: Any) -> None:
        sent_modules.install(modules)
        serialization.keep_file_names(filenames.dumps)
        limit_unauthenticated()
        if isinstance(options.get("security"), Security):  # its nanny's, which was pickled
            options["security"] = MemorySecurity.of(options["security"])
        super().__init__(*arguments, **options)
        sent_modules.look(self)

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Start the HTTP server, on the port that the settings name and no other."""
        super().start_http_server(*arguments, **options)
        wanted = int(str(self._dashboard_address).rpartition(":")[2])
        if self.http_server.port != wanted:
            raise PortTakenError(wanted)
        Dashboard(self, "distributed.dashboard.worker", self._http_prefix.strip("/"))

    async def close(self, *arguments: Any, **options: Any) -> Any:
        """End. What runs is not waited for if its scheduler has gone: the next one does not know of it."""
        if "connection-broken" in str(options.get("reason")):
            options["executor_wait"] = False
        return await super().close(*arguments, **options)
