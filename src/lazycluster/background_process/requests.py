"""Requests to a cluster's process."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lazycluster.background import state
from lazycluster.background.protocol import MessageStream
from lazycluster.cluster.engine_cluster import EngineCluster
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.core import event_loop
from lazycluster.exceptions import LazyclusterError
from lazycluster.ssh import logins

if TYPE_CHECKING:
    from .program import ClusterProcess

__all__ = ["Requests"]

_LOGIN = ("SSH_AUTH_SOCK", "KRB5CCNAME")  # what a login has that may end with it
_AGAIN = 120.0  # seconds for links to be had again after a login
_LOOK = 0.05
_SIGN = 1.0  # seconds between two signs of life of a process that is ending


class Requests:
    """The requests of other processes of the user; each is a method, called on a thread of its own.

    Args:
        process: The cluster's process.
    """

    def __init__(self, process: ClusterProcess) -> None:
        self._process = process
        self._sending = threading.Lock()
        self._requests: dict[str, Callable[..., Any]] = {
            "status": self._status, "down": self._down, "info": self._info, "scale": self._scale,
            "processes": self._processes, "connection": self._connection, "modules": self._modules,
            "login": self._login, "usage": self._usage, "connection_file": self._connection_file, "adapt": self._adapt,
        }  # fmt: skip

    @property
    def name(self) -> str:
        """The name of the cluster."""
        return self._process.name

    def do(self, command: object, arguments: Mapping[str, Any], stream: MessageStream) -> Any:
        """Do what is asked for, and return the answer.

        Args:
            command: What is asked for.
            arguments: What there is to know.
            stream: The connection, for what comes before the answer.

        Raises:
            LazyclusterError: If it is not possible.
        """
        request = self._requests.get(command) if isinstance(command, str) else None
        if request is None:
            raise LazyclusterError(f"there is no request {command!r}")
        if command in ("login", "down"):
            return request(stream, **arguments)
        if command == "status":  # whatever another version says beside it
            return request()
        return request(**arguments)

    @property
    def _cluster(self) -> EngineCluster:
        cluster = self._process.cluster
        if cluster is None or self._process.claim.record.state == "starting":
            raise ClusterError(f"the cluster {self.name!r} is being started: wait until it runs")
        return cluster

    def _status(self) -> dict[str, Any]:
        return self._process.summary()

    def _down(self, stream: MessageStream, **_: Any) -> dict[str, Any]:
        self._process.end()
        while not self._process.ended.wait(_SIGN):
            stream.send(alive=True)
        if self._process.outcome:
            raise ClusterError(self._process.outcome)
        return {}

    def _info(self) -> dict[str, Any]:
        process = self._process
        return {
            **process.summary(),
            "view": _as_lists(asdict(self._cluster._view())),
            "pid": os.getpid(),
            "environment": sorted(os.environ),
            "unreachable": process.unreachable,
            "addresses": process.connection_lines(),
        }

    def _scale(self, n: int) -> dict[str, Any]:
        self._cluster.scale(n)
        return self._process.summary()

    def _adapt(self, **options: Any) -> None:
        adapt = getattr(self._cluster, "adapt", None)
        if adapt is None:
            raise ClusterError(f"a {type(self._cluster).__name__} does not adapt its size to the load")
        adapt(**options)

    def _processes(self) -> dict[str, Any]:
        cluster = self._cluster
        master = cluster.master
        events = [{**asdict(event), "time": event.time.isoformat()} for event in cluster.events]
        return {
            "status": str(getattr(cluster.status, "name", cluster.status)),
            "master": None if master is None else asdict(master),
            "workers": [asdict(worker) for worker in cluster.workers],
            "events": events,
            "port": cluster.master_port,
            "hosts": cluster.runtime_group.hosts,
            "details": [dict(getattr(worker, "detail", {})) for worker in cluster._processes],
            "endpoint": {"host": cluster._master_endpoint().host, "ports": cluster._master_endpoint().ports},
        }

    def _usage(self, within: float) -> dict[str, Any]:
        return {name: asdict(used) for name, used in self._cluster.usage(within).items()}

    def _connection_file(self, path: str) -> str:
        return str(self._cluster.write_connection_file(path))

    def _connection(self) -> dict[str, Any]:
        return {"manager": os.getpid(), "engine": type(self._cluster).__name__, **self._cluster._connection()}

    def _modules(self, files: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
        """Have modules of a client's on the hosts; returns the version of what they have, and what was replaced."""
        modules = getattr(self._cluster.engine, "modules", None)
        if modules is None:
            return {"version": 0, "replaced": {}}
        contents = {name: text if kind == "text" else base64.b64decode(text) for name, (kind, text) in files.items()}
        with self._sending:
            replaced = event_loop.run(modules.take(contents, paths))
            with contextlib.suppress(OSError):  # no room: other clients notice it later
                (self._process.claim.path / state.MODULES).write_text(str(modules.version), "ascii")
            return {"version": modules.version, "replaced": replaced}

    def _login(self, stream: MessageStream, variables: Mapping[str, str]) -> dict[str, str]:
        """Use what a new login has; answers to questions come over the connection meanwhile."""
        for name in _LOGIN:
            if variables.get(name):
                os.environ[name] = str(variables[name])
        relay = self._process.relay
        relay.attend(stream)
        try:
            event_loop.run(logins.try_again())
            end = time.monotonic() + _AGAIN
            while self._interrupted() - logins.needed().keys() and time.monotonic() < end:
                time.sleep(_LOOK)
        finally:
            relay.gone(stream)
        return logins.needed()

    def _interrupted(self) -> set[str]:
        group = self._process.group
        return (
            {runtime.host for runtime in group.runtimes if runtime._connection.state == "interrupted"}
            if group
            else set()
        )


def _as_lists(value: Any) -> Any:
    """Return what JSON can hold of a view: sets become lists."""
    if isinstance(value, Mapping):
        return {key: _as_lists(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_as_lists(one) for one in value]
    return value
