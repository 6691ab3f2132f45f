"""Hosts that names, sets and patterns stand for."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from lazycluster.core.hostsets import HostSetError, fold, is_pattern
from lazycluster.ssh.destination import parse_destination

__all__ = ["ALL", "match", "without"]

ALL = "@all"
"""Stands for all hosts of the ssh configuration."""


def match(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Replace patterns by the hosts that match.

    Args:
        names: From :func:`expand`; ``@all`` stands for all.
        known: The hosts that there are.

    Raises:
        HostSetError: If a pattern fits none, or a name cannot be that of a host.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == ALL:
            found.update(dict.fromkeys(known))
        elif name.startswith("@"):
            raise HostSetError(f"{name!r} is not known; {ALL} stands for all hosts of the ssh configuration")
        elif is_pattern(name):
            found.update(dict.fromkeys(_fitting(name, known)))
        else:
            _check(name)
            found[name] = None
    return list(found)


def without(names: Sequence[str], excluded: Sequence[str], known: Sequence[str]) -> list[str]:
    """Leave hosts out.

    Args:
        names: From :func:`match`.
        excluded: From :func:`expand`. One without a user and port leaves a host out for whichever user and port.
        known: The hosts that there are, beside those named.

    Raises:
        HostSetError: As `match` does.
    """
    destinations = {name: parse_destination(name) for name in names}
    there = list(dict.fromkeys([*names, *(destination.host for destination in destinations.values()), *known]))
    left_out = set(match([one for name in excluded for one in (known if name == ALL else [name])], there))
    return [name for name, destination in destinations.items() if not {name, destination.host} & left_out]


def _fitting(pattern: str, known: Sequence[str]) -> list[str]:
    if "@" in pattern:
        raise HostSetError(f"{pattern!r}: a pattern stands for hosts of the ssh configuration, which says the user")
    fitting = [host for host in known if fnmatch.fnmatchcase(host, pattern)]
    if not fitting:
        have = f"there are: {fold(known)}" if known else "it names no hosts"
        raise HostSetError(f"no host of the ssh configuration fits {pattern!r}; {have}")
    return fitting


def _check(name: str) -> None:
    try:
        parse_destination(name)
    except ValueError as error:
        raise HostSetError(str(error)) from None
