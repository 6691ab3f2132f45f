"""A client of a Dask cluster whose hosts have the present version of the user's own modules before they need it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from distributed import Client
from distributed.protocol.pickle import dumps

from lazycluster.agent.filenames import dumps as dumps_with_names
from lazycluster.core import event_loop
from lazycluster.tasks.host_paths import tell_path

from .dashboard_link import shown_link
from .scaling import scheduler_at

if TYPE_CHECKING:
    from lazycluster.cluster.client_modules import ClientModules
    from lazycluster.cluster.local_modules import LocalModules

__all__ = ["ClusterClient", "UpToDateClient", "client_of", "connected"]

C = TypeVar("C", bound="ClusterClient")

_BACK = 30.0  # seconds for a scheduler that is started again; distributed's own default
_CLOSED = 5.0  # seconds for a client that is not connected to end its loop

# What carries no code, and is on the path of each result.
_WITHOUT_CODE = frozenset({"gather", "who_has", "identity"})


class ClusterClient(Client):  # type: ignore[misc]
    """A client whose errors say so if they are about a file of this machine, which the workers do not have.

    Attributes:
        dashboard: The address of the dashboard on this machine, if the cluster is another process's.
    """

    dashboard = ""

    @property
    def dashboard_link(self) -> str:
        """The address of the dashboard; that which distributed makes up itself has no secret part."""
        return shown_link(self.dashboard) if self.dashboard else str(super().dashboard_link)

    def _handle_task_erred(self, key: Any = None, exception: Any = None, traceback: Any = None) -> None:
        super()._handle_task_erred(key, exception, traceback)
        if (state := self.futures.get(key)) is not None:
            tell_path(state.exception)

    async def _run(self, *arguments: Any, **named: Any) -> Any:
        try:
            return await super()._run(*arguments, **named)
        except OSError as error:
            tell_path(error)
            raise


class UpToDateClient(ClusterClient):
    """A client that has changed modules sent before it sends anything that may need them.

    Work goes through `_graph_to_futures`. All else (`run`, plugins, `scatter`, variables and queues, calls of actors)
    is a call of the scheduler, in some coroutine on the client's loop.

    Args:
        address: See `distributed.Client`.
        modules: The user's own modules on the hosts.
        explained: Returns the error of a client that is awaited and not connected, with its cause where that is known.
        **options: See `distributed.Client`.
    """

    _calls: Any = None

    def __init__(
        self,
        address: Any,
        modules: LocalModules | ClientModules,
        explained: Callable[[Exception], Exception] | None = None,
        **options: Any,
    ) -> None:
        self._local_modules = modules
        self._explained = explained
        super().__init__(address, **options)

    async def _start(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super()._start(*arguments, **options)
        except OSError as error:
            if self._explained is None:
                raise
            raise self._explained(error) from error

    @property
    def scheduler(self) -> Any:
        """The scheduler, for calls; distributed sets it when it connects."""
        return self._calls

    @scheduler.setter
    def scheduler(self, calls: Any) -> None:
        self._calls = _UpToDateCalls(calls, self) if hasattr(calls, "close_rpc") else calls

    def _graph_to_futures(self, *arguments: Any, **options: Any) -> Any:
        # Without this method a change is noticed later.
        if self._is_old():
            event_loop.run(self._update())  # another loop than the client's, which this may be called on
        return super()._graph_to_futures(*arguments, **options)

    def _is_old(self) -> bool:
        modules = self._local_modules
        return modules.announced != modules.version or modules.changes()

    async def update_modules(self) -> None:
        """Have the present modules on the hosts, and those forgotten that were imported there."""
        if self._is_old():
            await asyncio.wrap_future(event_loop.submit(self._update()))

    async def _update(self) -> None:
        """Do so, on lazycluster's own loop."""
        modules = self._local_modules
        version = await modules.sync_changes()
        if version <= modules.announced or self._calls is None:  # it is not connected any more
            return

        def refresh() -> None:  # in a function, so that it goes by value: the hosts have nothing of this package
            from importlib import import_module

            import_module("lazycluster_dask.engines.dask.programs.sent_modules").refresh()

        call = {"function": dumps(refresh), "args": dumps(()), "kwargs": dumps({}), "wait": True}
        async with scheduler_at(self._calls.address, self.connection_args) as scheduler:
            await asyncio.gather(
                # What fails has gone, and starts with the present version.
                scheduler.broadcast(msg={"op": "run", **call}, on_error="ignore"),
                scheduler.broadcast(msg={"op": "run", **call}, nanny=True, on_error="ignore"),
                scheduler.run_function(**call),
            )
        modules.announced = max(version, modules.announced)


class _UpToDateCalls:
    """The scheduler as a client calls it: before a call that may carry code, the hosts get the present modules."""

    def __init__(self, calls: Any, client: UpToDateClient) -> None:
        self._calls, self._client = calls, client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._calls, name)
        if name in _WITHOUT_CODE or name == "close_rpc" or not callable(call):
            return call

        async def up_to_date(*arguments: Any, **named: Any) -> Any:
            await self._client.update_modules()
            return await call(*arguments, **named)

        return up_to_date


def client_of(kind: type[C], connection: Mapping[str, Any], *arguments: Any, **options: Any) -> C:
    """Return a client of a cluster of another process.

    Args:
        kind: The class of the client.
        connection: What `DaskCluster._connection` has returned there.
        *arguments: Further arguments of the class.
        **options: Its options.
    """
    from .programs.serialization import keep_file_names
    from .programs.tls import MemorySecurity

    keep_file_names(dumps_with_names)
    security = MemorySecurity(**connection["security"])
    client = connected(kind, connection["scheduler"], *arguments, security=security, **options)
    client.dashboard = connection.get("dashboard", "")
    return client


def connected(kind: type[C], *arguments: Any, **options: Any) -> C:
    """Return a client that waits for a scheduler that is started again, however short the time was to connect at first.

    One that cannot connect is closed before its error is raised. Otherwise the garbage collector closes it: at any
    moment, and for ever if that is while distributed starts or stops the loop of another client, since the lock of
    `distributed.utils.LoopRunner` waits for its own thread.

    Args:
        kind: The class of the client.
        *arguments: Its arguments, see `distributed.Client`.
        **options: Its options.

    Raises:
        Exception: What the class raises.
    """
    client: Any = object.__new__(kind)
    try:
        client.__init__(*arguments, **options)
    except BaseException:
        with contextlib.suppress(Exception):  # the error that counts is the one that is being raised
            client.close(timeout=_CLOSED)
            client._loop_runner.stop()  # which `close` leaves to run where connecting has closed the rest
        raise
    client._timeout = max(client._timeout, _BACK)
    made: C = client
    return made
