"""A Dask cluster from names of hosts, for programs that make clusters from a configuration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, Literal, overload

from lazycluster.core import event_loop
from lazycluster.core.hostsets import expand
from lazycluster.runtime_mgmt import RuntimeGroup

from .cluster import DaskCluster

__all__ = ["ssh_cluster"]


@overload
def ssh_cluster(
    hosts: str | Iterable[str] | None = ...,
    *,
    worker_count: int | None = ...,
    group: Mapping[str, Any] | None = ...,
    asynchronous: Literal[False] = ...,
    **options: Any,
) -> DaskCluster: ...


@overload
def ssh_cluster(
    hosts: str | Iterable[str] | None = ...,
    *,
    worker_count: int | None = ...,
    group: Mapping[str, Any] | None = ...,
    asynchronous: bool,
    **options: Any,
) -> DaskCluster | Awaitable[DaskCluster]: ...


def ssh_cluster(
    hosts: str | Iterable[str] | None = None,
    *,
    worker_count: int | None = None,
    group: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
    **options: Any,
) -> DaskCluster | Awaitable[DaskCluster]:
    """Connect hosts, and start a cluster on them; its end disconnects them. All arguments can stand in a configuration.

    Args:
        hosts: The hosts, as a list of names, or a set such as ``"node[1-4]"``; without it, those of ``settings`` in
            `group`.
        worker_count: How many workers; by default one per host, or one per GPU with `gpus_per_worker`.
        group: Further arguments of :class:`RuntimeGroup`, e.g. ``{"environment": "manager"}``.
        asynchronous: Whether to return an awaitable: awaited, it starts the cluster, and blocks no event loop.
        **options: Further arguments of `DaskCluster`.

    Returns:
        The cluster, which runs, or an awaitable of it.

    Raises:
        InvalidRuntimeError: If a host cannot be used.
        ClusterError: If the cluster does not start.
        ValueError: If an argument makes no sense.

    Examples:
        >>> with ssh_cluster("node[1-4]", nthreads=2) as cluster:               # doctest: +SKIP
        ...     client = cluster.get_client()
    """
    names = (
        None
        if hosts is None
        else [name for text in ([hosts] if isinstance(hosts, str) else hosts) for name in expand(text)]
    )

    def start() -> DaskCluster:
        members = RuntimeGroup(hosts=names, **(group or {}))
        try:
            cluster = DaskCluster(members, asynchronous=asynchronous, **options)
            cluster._owns_group = True
            cluster.start(worker_count)
        except BaseException:
            members.cleanup()
            raise
        return cluster

    return _started(start) if asynchronous else start()


async def _started(start: Any) -> DaskCluster:
    starting = asyncio.ensure_future(event_loop.in_thread(start))
    try:
        cluster: DaskCluster = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):  # nobody waits for it any more
            await event_loop.in_thread((await starting).cleanup)
        raise
    return await cluster
