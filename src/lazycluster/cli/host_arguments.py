"""Sets of hosts on a command line: those that are there for a pattern, files with sets, and sets from names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from lazycluster.core.hostsets import MOST, HostSetError, expand, is_pattern
from lazycluster.ssh.destination import parse_destination

__all__ = ["HostSetError", "expand", "fold", "from_lines", "is_pattern", "match", "without"]

ALL = "@all"

_NUMBER = re.compile(r"[0-9]{1,18}")


def from_lines(text: str) -> list[str]:
    """Return the names in a text: one or more sets to a line, with ``#`` before comments."""
    names: dict[str, None] = {}
    for line in text.splitlines():
        names.update(dict.fromkeys(expand(line.partition("#")[0], words=True)))
        if len(names) > MOST:
            raise HostSetError(f"more than {MOST} hosts are named")
    return list(names)


def match(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Put hosts in the place of patterns.

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


def fold(names: Iterable[str]) -> str:
    """Write names as a set, in order.

    Examples:
        >>> fold(["node1", "node2", "node3", "gpu"])
        'node[1-3],gpu'
    """
    groups: dict[tuple[str, str, int], list[int]] = {}
    for name in names:
        numbers = list(_NUMBER.finditer(name))
        if not numbers:
            groups.setdefault((name, "", -1), [])
            continue
        last = numbers[-1]
        digits = last.group()
        width = len(digits) if digits.startswith("0") and len(digits) > 1 else 0
        key = (name[: last.start()], name[last.end() :], width)
        groups.setdefault(key, []).append(int(digits))
    return ",".join(_folded(*key, numbers) for key, numbers in groups.items())


def _folded(head: str, tail: str, width: int, numbers: list[int]) -> str:
    if not numbers:
        return head
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])

    def shown(number: int) -> str:
        return str(number).zfill(max(width, 0))

    pieces = [shown(a) if a == b else f"{shown(a)}-{shown(b)}" for a, b in runs]
    inside = ",".join(pieces)
    return f"{head}{inside}{tail}" if len(pieces) == 1 and "-" not in inside else f"{head}[{inside}]{tail}"
