"""How many workers each host gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lazycluster.exceptions import NoRuntimesError

if TYPE_CHECKING:
    from lazycluster.runtimes import Runtime

__all__ = ["gpus_of", "worker_counts"]


def worker_counts(
    runtimes: Sequence[Runtime], max_workers: int | None, per_host: int | Mapping[str, int] | None
) -> dict[str, int | None]:
    """Return how many workers each host gets; None: as many as it has cores.

    Args:
        runtimes: The hosts.
        max_workers: How many in all. They are spread by how many cores each host has.
        per_host: How many on each, or on single hosts by their names.

    Raises:
        TypeError, ValueError: If an argument makes no sense.
        NoRuntimesError: If there is no host.
    """
    if not runtimes:
        raise NoRuntimesError("the group is empty: add a runtime with add_runtime()")
    hosts = [runtime.host for runtime in runtimes]
    if max_workers is not None:
        if per_host is not None:
            raise ValueError("either max_workers or workers_per_host can be given, not both")
        count = _checked(max_workers, "max_workers")
        return _spread(_cores(runtimes, count), count)
    if isinstance(per_host, Mapping):
        unknown = [host for host in per_host if host not in hosts]
        if unknown:
            raise ValueError(f"workers_per_host: {unknown[0]!r} is not in the group; its hosts are: {', '.join(hosts)}")
        return {host: _checked(per_host[host]) if host in per_host else None for host in hosts}
    return dict.fromkeys(hosts, None if per_host is None else _checked(per_host))


def gpus_of(per_call: float | None, idle: bool) -> dict[str, Any] | None:
    """Return what the agent is told of GPUs.

    Args:
        per_call: How many each worker has; of parts of one, a whole number must make one.
        idle: Whether only those that nobody else uses.

    Raises:
        TypeError, ValueError: If it makes no sense.
    """
    if per_call is None:
        if idle:
            raise ValueError("idle_gpus says nothing without gpus_per_call: say how many")
        return None
    if isinstance(per_call, bool) or not isinstance(per_call, (int, float)):
        raise TypeError(f"gpus_per_call must be a number, not {type(per_call).__name__}")
    if 0 < per_call < 1 and abs(1 / per_call - round(1 / per_call)) < 1e-6:
        return {"count": 1, "workers": round(1 / per_call), "idle": idle}
    if per_call < 1 or per_call != int(per_call):
        raise ValueError(f"gpus_per_call must be a whole number, or 1/2, 1/3, ... of one, not {per_call:g}")
    return {"count": int(per_call), "workers": 1, "idle": idle}


def _spread(cores: Mapping[str, int], count: int) -> dict[str, int | None]:
    counts = dict.fromkeys(cores, 0)
    for _ in range(count):
        host = min(cores, key=lambda host: (counts[host] + 1) / cores[host])
        counts[host] += 1
    return {**counts}


def _cores(runtimes: Sequence[Runtime], count: int) -> dict[str, int]:
    """Return the cores of some hosts, asked at once; where there is one host only, they do not matter."""
    if len(runtimes) > 1:
        for runtime in runtimes:
            runtime.fill_info_buffer()
        return {runtime.host: int(runtime.info["cpu_cores"]) for runtime in runtimes}
    return {runtimes[0].host: count}


def _checked(count: int, name: str = "workers_per_host") -> int:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} must be an integer, not {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name} must be greater than 0, not {count}")
    return count
