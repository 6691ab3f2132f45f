"""Environments that hosts have: which ones there are, and removing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lazycluster.exceptions import AgentError, LazyclusterError

from .spec import ROOT, check_cache_dir

__all__ = ["Host", "HostCache", "KeptEnvironment", "Removal", "list_on", "prune_on", "remove_on"]

_LIMIT = 300.0  # seconds: removing much takes long on some file systems


class Host(Protocol):
    """What is needed of a host: a connection will do."""

    host: str

    async def request(self, op: str, **params: Any) -> dict[str, Any]:
        """Ask its agent."""


@dataclass(frozen=True)
class KeptEnvironment:
    """An environment on a host.

    Attributes:
        host: The host.
        id: Its name; the same on all hosts where it is the same.
        path: Where it is.
        source: What it was made from, in short.
        python: The interpreter that it was made with.
        packages: The versions of its packages.
        size: Its bytes; what it shares with others of the host counts for each.
        age: Seconds since it was made; None if that is not known.
        unused: Seconds since it was last used.
        in_use: Whether it is used now.
        problem: Why it cannot be used; None if it can.
    """

    host: str
    id: str
    path: str
    source: str
    python: str
    packages: dict[str, str] = field(repr=False)
    size: int
    age: float | None
    unused: float
    in_use: bool
    problem: str | None = None


@dataclass(frozen=True)
class HostCache:
    """What a host keeps for environments.

    Attributes:
        host: The host.
        path: Where it is.
        environments: The environments.
        size: The bytes of all, packages and installer included.
    """

    host: str
    path: str
    environments: tuple[KeptEnvironment, ...]
    size: int


@dataclass(frozen=True)
class Removal:
    """What was removed from a host.

    Attributes:
        host: The host.
        removed: Names of environments.
        in_use: Names of environments that stay, since they are used.
        unknown: Names that were asked for, and are none.
        freed: Bytes; None if that was not measured.
    """

    host: str
    removed: tuple[str, ...]
    in_use: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    freed: int | None = None


async def list_on(host: Host, cache_dir: str = ROOT) -> HostCache:
    """Return what a host keeps."""
    found = await _ask(host, "list", root=cache_dir)
    now = found["now"]
    environments = tuple(
        KeptEnvironment(
            host.host,
            one["id"],
            one["path"],
            one["source"] or "",
            one["python"] or "",
            one["packages"],
            one["size"] or 0,
            max(0.0, now - one["made"]) if one["made"] else None,
            max(0.0, now - one["last_used"]),
            one["in_use"],
            one["problem"],
        )
        for one in found["environments"]
    )
    return HostCache(host.host, found["root"], environments, found["size"])


async def remove_on(host: Host, ids: Sequence[str], cache_dir: str = ROOT) -> Removal:
    """Remove environments from a host; those in use stay."""
    told = await _ask(host, "remove", root=cache_dir, ids=list(ids))
    return Removal(host.host, tuple(told["removed"]), tuple(told["in_use"]), tuple(told["unknown"]))


async def prune_on(
    host: Host, size_limit: int | None = None, unused_for: float | None = None, cache_dir: str = ROOT
) -> Removal:
    """Remove what was used longest ago, and what broken builds left; never an environment in use.

    Args:
        host: The host.
        size_limit: Until all together takes no more bytes than this.
        unused_for: All that was not used for so many seconds.
        cache_dir: Where environments are kept.
    """
    told = await _ask(host, "prune", root=cache_dir, limit=size_limit, age=unused_for)
    freed = max(0, told["before"] - told["after"])
    return Removal(host.host, tuple(told["removed"]), tuple(told["in_use"]), freed=freed)


async def _ask(host: Host, action: str, root: str, **params: Any) -> dict[str, Any]:
    check_cache_dir(root)
    try:
        return await host.request("environment", within=_LIMIT, action=action, root=root, **params)
    except AgentError as error:
        raise LazyclusterError(f"{host.host}: {error.message}") from None
