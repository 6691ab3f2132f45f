"""The environments in a host's cache: listing and removing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lazycluster.exceptions import AgentError, LazyclusterError

from .spec import ROOT, check_cache_dir

__all__ = ["Host", "HostCache", "KeptEnvironment", "Removal", "list_on", "prune_on", "remove_on"]

_LIMIT = 300.0  # seconds: removing much takes long on some file systems


class Host(Protocol):
    """The part of a connection that is used here."""

    host: str

    async def request(self, op: str, **params: Any) -> dict[str, Any]:
        """Send its agent a request."""


@dataclass(frozen=True)
class KeptEnvironment:
    """An environment on a host.

    Attributes:
        host: The host.
        id: Its name; the same on all hosts where it is the same.
        path: Its directory.
        source: The specification that it was made from, in short.
        python: The interpreter that it was made with.
        packages: The versions of its packages.
        size: Its bytes; files that it shares with others count for each.
        age: Seconds since it was made; None if unknown.
        unused: Seconds since it was last used.
        in_use: True while a process uses it.
        problem: The reason why it cannot be used; None if it can.
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
    """The environments that a host has.

    Attributes:
        host: The host.
        path: The directory.
        environments: The environments.
        size: The bytes of all, packages and uv included.
    """

    host: str
    path: str
    environments: tuple[KeptEnvironment, ...]
    size: int


@dataclass(frozen=True)
class Removal:
    """The result of a removal on a host.

    Attributes:
        host: The host.
        removed: Names of environments.
        in_use: Names of environments that stay because they are in use.
        unknown: Names of which there is no environment.
        freed: Bytes; None if not measured.
    """

    host: str
    removed: tuple[str, ...]
    in_use: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    freed: int | None = None


async def list_on(host: Host, cache_dir: str = ROOT) -> HostCache:
    """Return the environments of a host."""
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
    answer = await _ask(host, "remove", root=cache_dir, ids=list(ids))
    return Removal(host.host, tuple(answer["removed"]), tuple(answer["in_use"]), tuple(answer["unknown"]))


async def prune_on(
    host: Host, size_limit: int | None = None, unused_for: float | None = None, cache_dir: str = ROOT
) -> Removal:
    """Remove the least recently used, and leftovers of failed builds; never an environment in use.

    Args:
        host: The host.
        size_limit: The bytes that may remain.
        unused_for: Remove those that were not used for so many seconds.
        cache_dir: The directory.
    """
    answer = await _ask(host, "prune", root=cache_dir, limit=size_limit, age=unused_for)
    freed = max(0, answer["before"] - answer["after"])
    return Removal(host.host, tuple(answer["removed"]), tuple(answer["in_use"]), freed=freed)


async def _ask(host: Host, action: str, root: str, **params: Any) -> dict[str, Any]:
    check_cache_dir(root)
    try:
        return await host.request("environment", within=_LIMIT, action=action, root=root, **params)
    except AgentError as error:
        raise LazyclusterError(f"{host.host}: {error.message}") from None
