"""A cluster in a process of its own, used as one in this process is: ``DaskCluster(group, name="night")``."""

from __future__ import annotations

import datetime
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from lazycluster.background import state
from lazycluster.background.client import BackgroundProcess, end, running
from lazycluster.background.launch import Launch, Person, cluster_document, launch
from lazycluster.core import event_loop
from lazycluster.exceptions import BackgroundError
from lazycluster.output.view import View
from lazycluster.runtime.session import may_ask

from .contracts import DEFAULT_TIMEOUT
from .engine import Endpoint
from .exceptions import ClusterError
from .health import ClusterEvent, EventCallback, ProcessStatus
from .usage import ProcessUsage

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup

    from .engine_cluster import EngineCluster
    from .services import Service

    _Base = EngineCluster
else:
    _Base = object

__all__ = ["class_in_background"]

_NOT_SENT = ("asynchronous",)  # options that are about this process


@functools.cache
def class_in_background(cluster_class: type[EngineCluster]) -> type[EngineCluster]:
    """Return the class of clusters in the background that goes with a class of clusters."""
    found = type(cluster_class.__name__, (_InBackground, cluster_class), {"__module__": cluster_class.__module__})
    found.__doc__ = cluster_class.__doc__
    return cast("type[EngineCluster]", found)


@dataclass(frozen=True)
class _Worker:
    """A worker of a cluster in the background, as views and the like see it.

    Attributes:
        label: What it is called.
        state: See `ProcessStatus`.
        detail: What it says of itself.
    """

    label: str
    state: str
    detail: Mapping[str, Any] = field(default_factory=dict)


class _InBackground(_Base):
    """Cluster that is in another process: a mix-in that comes before the class of the engine.

    The process is started at once, and connects the hosts; it goes on when this program ends, if the cluster was
    started by then.
    """

    def __init__(self, runtime_group: RuntimeGroup, *arguments: Any, name: str, **options: Any) -> None:
        state.checked_name(name)
        given = _given(super().__init__, runtime_group, *arguments, **options)
        super().__init__(runtime_group, *arguments, **options)
        self._name = name
        self._document = cluster_document(
            self.engine_class.name, [_host(runtime) for runtime in runtime_group.runtimes], options=given, wait=True
        ) | {"class": _class_name(type(self))}
        self._launched: Launch | None = self._launch()

    def _end_with_program(self) -> None:
        """Do not end it with this program."""

    def _launch(self) -> Launch:
        record = state.NamedRecord.new(
            "cluster", self._name, engine=self.engine_class.name, hosts=self._group.hosts, idle=None
        )
        launched = launch(record, self._document)
        with _as_cluster_error(launched.end):
            launched.wait(Person(may_ask()))
        return launched

    # --- the process ---------------------------------------------------------------------------
    @property
    def _process(self) -> BackgroundProcess:
        with _as_cluster_error():
            return running(self._name)

    def _ask(self, command: str, **arguments: Any) -> Any:
        with _as_cluster_error():
            return self._process.request(command, **arguments)

    def _known(self) -> dict[str, Any]:
        """Return what is known of master and workers; nothing if the cluster does not run."""
        if self._state != "running":
            return {}
        try:
            return dict(self._ask("processes"))
        except ClusterError:
            return {}

    def _problem(self) -> str:
        try:
            return str(self._ask("status")["problem"])
        except ClusterError as error:
            return str(error).partition("\n")[0]

    def _master_problem(self) -> str:
        return self._problem()

    def _reach_master(self, within: float | None = None, run: Callable[..., Any] = event_loop.run) -> None:
        self._check_running()  # its process waits for the link

    def _unreached(self) -> str:
        try:
            return str(self._ask("status").get("unreached", ""))  # of an earlier version there is none
        except ClusterError:
            return ""

    def _master_status(self) -> int | None:
        return None

    def _master_endpoint(self) -> Endpoint:
        return cast("Endpoint", getattr(self._master_launcher, "at"))  # noqa: B009  (of the default launchers)

    # --- begin and end -------------------------------------------------------------------------
    def start(self, worker_count: int | None = None, master_port: int | None = None, debug: bool = False) -> None:
        if debug:
            raise ValueError("debug=True is not possible in the background: see 'lazycluster logs'")
        self._check_not("running", "starting")
        with self._lock:
            self._state = "starting"
        try:
            launched, self._launched = self._launched or self._launch(), None
            launched.go_on(workers=worker_count, port=master_port)
            with _as_cluster_error(launched.end):
                launched.wait(Person(may_ask()))
            launched.let_go()
            self._adopt()
        except BaseException:
            self._state = "failed"
            raise
        self._state = "running"

    def _adopt(self) -> None:
        known = self._ask("processes")
        at = self._master_endpoint()
        at.host, at.ports = known["endpoint"]["host"], dict(known["endpoint"]["ports"])
        self._engine.adopt(self._ask("connection"), self._process)

    def start_master(self, master_port: int | None = None, timeout: int = DEFAULT_TIMEOUT, debug: bool = False) -> None:
        raise ClusterError("in the background, start() starts the master and the workers together")

    def start_workers(self, count: int | None = None, debug: bool = False) -> None:
        raise ClusterError("in the background, start() starts the workers, and scale() changes their number")

    def cleanup(self) -> None:
        with self._lock:
            if self._state in ("closing", "closed"):
                return
            self._state = "closing"
        try:
            launched, self._launched = self._launched, None
            if launched is not None:
                launched.end()
            found = state.find(self._name)
            if found is not None and not found.is_elsewhere:
                with _as_cluster_error():
                    end(found)
        finally:
            super()._let_go()
            self._master_endpoint().ports = {}
            self._state = "closed"

    def write_connection_file(self, path: str | os.PathLike[str]) -> Any:
        from lazycluster.utils import expanded

        self._check_running()
        file = expanded(path).absolute()
        self._ask("connection_file", path=str(file))
        return file

    # --- how it is -----------------------------------------------------------------------------
    @property
    def master_port(self) -> int | None:
        ports = self._master_endpoint().ports
        return next(iter(ports.values()), None)

    @property
    def master(self) -> ProcessStatus | None:
        found = self._known().get("master")
        return None if found is None else ProcessStatus(**found)

    @property
    def workers(self) -> list[ProcessStatus]:
        return [ProcessStatus(**worker) for worker in self._known().get("workers", [])]

    @property
    def plan(self) -> set[str]:
        """The names of the workers that there are to be."""
        return {worker.name.rpartition(" ")[2] for worker in self.workers if worker.state != "failed"}

    @property
    def _processes(self) -> list[Service]:
        known = self._known()
        workers = zip(known.get("workers", []), known.get("details", []), strict=True)
        return [cast("Service", _Worker(worker["name"], worker["state"], detail)) for worker, detail in workers]

    def usage(self, timeout: float = 1.0) -> dict[str, ProcessUsage]:
        return {name: ProcessUsage(**used) for name, used in self._ask("usage", within=timeout, timeout=None).items()}

    @property
    def events(self) -> list[ClusterEvent]:
        events = self._known().get("events", [])
        return [ClusterEvent(**{**one, "time": datetime.datetime.fromisoformat(one["time"])}) for one in events]

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        raise ClusterError(
            "a cluster in the background does not call functions of this program\n"
            f"  Next step: look at events, or at lazycluster logs {self._name} -f"
        )

    def print_log(self) -> None:
        from lazycluster.output.lines import write

        for process in [self.master, *self.workers]:
            if process is not None:
                write(f"--- {process.name} on {process.host} ({process.log_file})\n{process.log}\n")

    def _view(self) -> View:
        if self._state != "running" or self._problem():
            return View(f"{type(self).__name__} {self._name}", None, [("state", self._present_state)])
        view = View.of(self._ask("info")["view"])
        return View(f"{view.title} {self._name}", view.state, view.facts, view.tables)

    # --- more and fewer workers ----------------------------------------------------------------
    def _change(self, count: int) -> None:
        with self._changing:
            self._ask("scale", n=count, timeout=None)

    def adapt(self, minimum: int | None = None, maximum: int | None = None, **options: Any) -> None:
        """Have the number of workers follow the load, until `scale` or `cleanup` is called.

        Args:
            minimum: How many workers there are at least.
            maximum: How many there are at most.
            **options: Further options, as the cluster's class has them; plain data.
        """
        self._check_running()
        self._ask("adapt", minimum=minimum, maximum=maximum, timeout=None, **options)


class _as_cluster_error:  # noqa: N801  (a context manager)
    """Turn a failure that a cluster's process reports into an error of clusters.

    Args:
        otherwise: Is called when it fails.
    """

    def __init__(self, otherwise: Callable[[], Any] | None = None) -> None:
        self._otherwise = otherwise

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._otherwise is not None:
            self._otherwise()
        if isinstance(error, BackgroundError):
            raise ClusterError(str(error)) from None


def _host(runtime: Any) -> dict[str, Any]:
    """Return a host with its settings, as its runtime has them now."""
    return {**runtime._session.spec.document(), "env": dict(runtime.env_variables)}


def _class_name(cluster_class: type) -> str:
    """Return the name of the engine's class, by which the process makes sure that it has the same one."""
    return f"{cluster_class.__module__}:{cluster_class.__qualname__}"


def _given(method: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Return the arguments of a cluster's class by name, as the process gets them.

    Raises:
        TypeError: If one cannot be sent.
    """
    bound = inspect.signature(method).bind(*arguments, **options)
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    del given["runtime_group"]
    for name in ("master_launcher", "worker_launcher"):
        if given.pop(name, None) is not None:
            raise TypeError(f"{name} cannot be used for a cluster in the background: its process gets plain data only")
    plain = {name: value for name, value in given.items() if value is not None and name not in _NOT_SENT}
    return {name: os.path.abspath(value) if isinstance(value, os.PathLike) else value for name, value in plain.items()}  # noqa: PTH100
