"""The code of a worker process. Imported by the nanny's program before it is copied."""

from __future__ import annotations

import functools
import types
from typing import Any

import dask
import distributed
from distributed import Security, Worker, core, worker
from distributed.protocol import core as protocol

from ....agent import filenames
from ....cluster.sent.host_paths import name_host
from ....cluster.sent.messages import PortTakenError
from . import own_connections, sent_modules, serialization
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

    def __init__(self, *arguments: Any, modules: str = "", dashboard_prefix: str = "", **options: Any) -> None:
        sent_modules.install(modules)
        serialization.keep_file_names(filenames.dumps)
        limit_unauthenticated()
        if isinstance(options.get("security"), Security):  # its nanny's, which was pickled
            options["security"] = MemorySecurity.of(options["security"])
        self._dashboard_prefix = dashboard_prefix
        host = str(options.get("name")).rpartition("-")[0]
        _name_host_in_errors(host)
        _keep_worker_whatever_comes(host)
        options["startup_information"] = {
            **(options.get("startup_information") or {}),
            **own_connections.startup_information(),
        }
        super().__init__(*arguments, **options)
        sent_modules.look(self)
        own_connections.prepare_worker(self)

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Start the HTTP server, on the port that the settings name and no other."""
        super().start_http_server(*arguments, **options)
        wanted = int(str(self._dashboard_address).rpartition(":")[2])
        if self.http_server.port != wanted:
            raise PortTakenError(wanted)
        Dashboard(self, "distributed.dashboard.worker", self._dashboard_prefix)

    async def close(self, *arguments: Any, **options: Any) -> Any:
        """End. What runs is not waited for if its scheduler has gone: the next one does not know of it."""
        if "connection-broken" in str(options.get("reason")):
            options["executor_wait"] = False
        return await super().close(*arguments, **options)


def _name_host_in_errors(host: str) -> None:
    """Have errors of tasks about files say on which host they looked for them."""
    original = core.error_message

    @functools.wraps(original)
    def error_message(error: BaseException, *arguments: Any, **named: Any) -> Any:
        name_host(error, host)
        return original(error, *arguments, **named)

    worker.error_message = error_message


def _keep_worker_whatever_comes(host: str) -> None:
    """Have a task that cannot be unpickled here fail, and no more.

    distributed unpickles it while it reads from the scheduler: that ends the connection, and so the worker, and the
    next one that gets the task. Nobody is told why.
    """
    try:
        from dask._task_spec import Task
    except ImportError:  # before 2024.12, which unpickled tasks when they were run
        return
    original = protocol.pickle.loads

    @functools.wraps(original)
    def loads(*arguments: Any, **named: Any) -> Any:
        try:
            return original(*arguments, **named)
        except Exception as error:  # noqa: BLE001  (whatever importing the user's modules raises)
            return Task("unreadable", _raise, _with_next_step(error, host))

    protocol.pickle = types.SimpleNamespace(**{**vars(protocol.pickle), "loads": loads})


def _raise(error: Exception) -> None:
    raise error


def _with_next_step(error: Exception, host: str) -> Exception:
    if isinstance(error, ModuleNotFoundError):
        error.msg = (
            f"{error.msg} on {host}, where the task needs it\n  Next step: have the manager's packages there with "
            'environment="manager" (which leaves out tools, such as pytest: EnvironmentSpec("manager", exclude=[]) has '
            "them, too), or install it there"
        )
        error.args = (error.msg,)
    return error
