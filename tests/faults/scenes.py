"""Where loads run and faults strike: real hosts, a group on them, clusters; and which process is which."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazycluster import Runtime, RuntimeGroup
from lazycluster.ssh import workspace
from sshhosts import Hosts, procfs


class NobodyThereError(Exception):
    """What was to be hit is not there at the moment: it has ended, is being started, or its host is off."""


class UnavailableError(Exception):
    """What a fault needs cannot be had on this machine; the message says what."""


@dataclass
class Scene:
    """Hosts at work, and who can be hit there.

    Attributes:
        hosts: The hosts.
        group: All of them; the number of a host is its place in `hosts`.
        folder: A directory for whatever is needed on the manager.
        dask: A cluster on the group, if there is one.
        hyperopt: The same.
    """

    hosts: Hosts
    group: RuntimeGroup
    folder: Path
    dask: Any = None
    hyperopt: Any = None

    def runtime(self, number: int) -> Runtime:
        """The runtime of a host."""
        return self.group.get_runtime(self.hosts[number].name)

    def ssh(self, number: int) -> list[int]:
        """The ssh process of the manager that leads to a host."""
        process = self.runtime(number)._connection._process
        return [process.pid] if process is not None and process.pid else []

    def sessions(self, number: int) -> list[int]:
        """The processes of sshd on a host that serve connections."""
        return [found.pid for found in self._host(number).sessions()]

    def agent(self, number: int) -> list[int]:
        """The agent on a host."""
        return self._here(number, [self.runtime(number)._connection.agent_info.pid])

    def services(self, number: int) -> list[int]:
        """What a cluster's workers are watched by on a host: Dask's nannies, Hyperopt's workers."""
        name = self.hosts[number].name
        clusters = [cluster for cluster in (self.dask, self.hyperopt) if cluster is not None]
        workers = [worker for cluster in clusters for worker in cluster.workers if worker.host == name]
        return self._here(number, [worker.pid for worker in workers if worker.state == "ready"])

    def workers(self, number: int) -> list[int]:
        """The processes on a host that evaluate what clusters are given."""
        services = set(self.services(number))
        return [found.pid for found in self._host(number).processes() if found.parent in services]

    def functions(self, number: int) -> list[int]:
        """The processes on a host that carry out functions of tasks and of `group.map`."""
        agent = self.agent(number)
        below = procfs.descendants(agent[0]) if agent else []
        served = {found.pid for service in self.services(number) for found in procfs.descendants(service)}
        own = {*agent, *self.services(number)}
        parents = {found.parent for found in below}
        leaves = [found for found in below if found.pid not in parents and found.name.startswith("python")]
        return [found.pid for found in leaves if found.parent not in own and found.pid not in served | own]

    def zygotes(self, number: int) -> list[int]:
        """The processes on a host that those are forked from."""
        functions = set(self.functions(number))
        own = {*self.agent(number), *functions}
        return list({found.parent for found in self._host(number).processes() if found.pid in functions} - own)

    def master(self, cluster: Any) -> list[int]:
        """The process of a cluster's master."""
        found = cluster.master if cluster is not None else None
        if found is None or not found.pid or found.state != "ready":
            return []
        if found.host == "localhost":
            return [found.pid]
        return self._here(self.hosts.names.index(found.host), [found.pid])

    def keeper(self) -> list[int]:
        """The agent beside the manager."""
        return [space.keeper.agent_info.pid for space in workspace._spaces.values() if space.keeper.state == "open"]

    def _host(self, number: int) -> Any:
        host = self.hosts[number]
        if not host.pid:
            raise NobodyThereError(f"{host.name} is off")
        return host

    def _here(self, number: int, inner: Iterable[int | None]) -> list[int]:
        wanted = set(inner)
        return [found.pid for found in self._host(number).processes() if found.inner_pid in wanted]


def hit(pids: Iterable[int], number: signal.Signals) -> list[int]:
    """Send a signal to processes, some of which may just have ended; returns those that got it.

    Raises:
        NobodyThereError: None did.
    """
    reached = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            reached.append(pid)
    if not reached:
        raise NobodyThereError("no process was there")
    return reached
