"""Hosts on which the processes of a cluster may run: those of a group, as the launchers see them."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lazycluster.exceptions import ConnectionLostError, LazyclusterError
from lazycluster.runtime.network import network_of

from .exceptions import ClusterError

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup
    from lazycluster.runtimes import Runtime
    from lazycluster.ssh.connection import Connection
    from lazycluster.tasks.context import Context

MANAGER = "localhost"


@dataclass(frozen=True)
class WorkerHost:
    """A host and what holds there for every process.

    Attributes:
        host: The host, as the user named it.
        connection: The connection to it.
        python: The interpreter to be used; None for the one that the environment finds.
        env: Environment variables beside the host's own.
        cwd: The working directory.
        problem: Why nothing can run there, None if it can.
        address: Where other hosts reach it, if the user has said so.
    """

    host: str
    connection: Connection
    python: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    cwd: str = ""
    problem: LazyclusterError | None = None
    address: str | None = None

    @property
    def network(self) -> Hashable:
        """The network of the host, equal for two hosts exactly if a port of one is a port of the other."""
        return network_of(self.connection)


def places_of(group: RuntimeGroup) -> list[WorkerHost]:
    """Return the places of a group's runtimes, in the group's order, those with a problem included."""
    places = []
    for runtime in group.runtimes:
        try:
            context = runtime._context()
            if runtime._connection.state == "interrupted":
                # What has to be ready within some time cannot wait for as long as a link is given to come back.
                raise ConnectionLostError(runtime.host, f"the link is interrupted: {runtime._connection.why}")
            if runtime._connection.unanswered is not None:
                raise runtime._connection.unanswered
        except LazyclusterError as error:
            places.append(WorkerHost(runtime.host, runtime._connection, problem=error))
        else:
            places.append(_of(runtime, context))
    return places


def _of(runtime: Runtime, context: Context) -> WorkerHost:
    address = runtime._session.spec.address
    return WorkerHost(context.host, context.connection, context.python, dict(context.env), context.cwd, address=address)


async def place_again(group: RuntimeGroup, connection: Connection) -> WorkerHost:
    """Return the place at a connection whose host has lost all that was prepared there, once it is prepared again.

    Raises:
        LazyclusterError: If it cannot be, or the host is not in the group any more.
    """
    for runtime in group.runtimes:
        if runtime._connection is connection:
            await runtime._prepare_async()
            return _of(runtime, runtime._context())
    raise ClusterError(f"{connection.host} has left the group, and lost what ran there")


async def prepared_places(group: RuntimeGroup) -> list[WorkerHost]:
    """Return the places of a group's runtimes once they answer, and their Python environments are made, all at once."""

    async def ready(runtime: Runtime) -> None:
        await runtime._prepare_async()
        if runtime._connection.state == "open":
            await runtime._connection.request("ping")

    made = await asyncio.gather(*(ready(runtime) for runtime in group.runtimes), return_exceptions=True)
    places = places_of(group)
    for index, error in enumerate(made):
        if isinstance(error, LazyclusterError):
            if places[index].problem is None:
                places[index] = replace(places[index], problem=error)
        elif isinstance(error, BaseException):
            raise error
    return places


def usable(places: Sequence[WorkerHost]) -> list[WorkerHost]:
    """Return those places where something can run."""
    return [place for place in places if place.problem is None]
