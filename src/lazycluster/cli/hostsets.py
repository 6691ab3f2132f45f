"""Sets of hosts as people write them: ``node[01-12]``, ``gpu-*``, commas, files, and back again."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["HostSetError", "expand", "fold", "from_lines", "match"]

ALL = "@all"
MOST = 100_000
"""Names that one set may have: more is a slip of the hand."""

_GLOB = re.compile(r"[*?]|\[[^\]]*[^\]\d,/-][^\]]*\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:/(\d+))?)?")
_STEPS = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_NUMBER = re.compile(r"\d+")


class HostSetError(ValueError):
    """A set of hosts makes no sense."""


def expand(text: str) -> list[str]:
    """Return the names of a set.

    Args:
        text: Names with commas between. ``[01-12]`` and ``[1,5-9/2]`` count as in ClusterShell, ``{a,b}`` and
            ``{1..3}`` as in bash.

    Returns:
        The names, each once, in order. Patterns such as ``gpu-*`` are left as they are, see :func:`match`.

    Raises:
        HostSetError: If it makes no sense.

    Examples:
        >>> expand("node[08-10],gpu{a,b}")
        ['node08', 'node09', 'node10', 'gpua', 'gpub']
    """
    names: dict[str, None] = {}
    for part in _split(text, text):
        if not part.strip():
            continue
        for name in _expand_one(part.strip(), text):
            names[name] = None
            if len(names) > MOST:
                raise HostSetError(f"{text!r} stands for more than {MOST} hosts")
    return list(names)


def _split(text: str, whole: str) -> list[str]:
    """Split at the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        if char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
        if depth < 0:
            break
    if depth != 0:
        raise HostSetError(f"{whole!r}: a bracket has no partner")
    return [*parts, text[start:]]


def _expand_one(part: str, whole: str) -> Iterator[str]:
    for place, char in enumerate(part):
        if char not in "[{":
            continue
        end = _partner(part, place)
        values = _alternatives(char, part[place + 1 : end], whole)
        if values is None:
            continue
        for value in values:
            for rest in _expand_one(part[end + 1 :], whole):
                yield part[:place] + value + rest
        return
    yield part


def _partner(part: str, start: int) -> int:
    depth = 0
    for place in range(start, len(part)):
        depth += (part[place] in "[{") - (part[place] in "]}")
        if depth == 0:
            return place
    return len(part)  # not reached: _split has counted them


def _alternatives(bracket: str, inside: str, whole: str) -> Iterable[str] | None:
    """Return what a bracket stands for; None if it is none of ours, as that of an IPv6 address or a pattern."""
    if bracket == "[":
        if re.fullmatch(r"[\d,/-]+", inside) is None:
            return None
        return [name for piece in inside.split(",") for name in _numbers(_RANGE.fullmatch(piece), whole)]
    steps = _STEPS.fullmatch(inside)
    if steps:
        return _numbers(steps, whole)
    return [name for piece in _split(inside, whole) for name in _expand_one(piece, whole)]


def _numbers(found: re.Match[str] | None, whole: str) -> list[str]:
    if found is None:
        raise HostSetError(f"{whole!r}: a range is written as 1-9, 01-12 or 0-10/2")
    first, last, step = found.group(1), found.group(2) or found.group(1), int(found.group(3) or 1)
    start, end = int(first), int(last)
    if step == 0 or end < start:
        raise HostSetError(f"{whole!r}: {found.group(0)} is an empty range")
    if (end - start) // step >= MOST:
        raise HostSetError(f"{whole!r} stands for more than {MOST} hosts")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(start, end + 1, step)]


def from_lines(text: str) -> list[str]:
    """Return the names in a text: one or more sets to a line, with ``#`` before comments."""
    names: dict[str, None] = {}
    for line in text.splitlines():
        for word in line.partition("#")[0].split():
            names.update(dict.fromkeys(expand(word)))
    return list(names)


def match(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Put hosts in the place of patterns.

    Args:
        names: From :func:`expand`; ``@all`` stands for all.
        known: The hosts that there are.

    Raises:
        HostSetError: If a pattern fits none.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == ALL:
            found.update(dict.fromkeys(known))
        elif _GLOB.search(name) and "@" not in name:
            fitting = [host for host in known if fnmatch.fnmatchcase(host, name)]
            if not fitting:
                have = f"there are: {fold(known)}" if known else "it names no hosts"
                raise HostSetError(f"no host of the ssh configuration fits {name!r}; {have}")
            found.update(dict.fromkeys(fitting))
        elif name.startswith("@"):
            raise HostSetError(f"{name!r} is not known; {ALL} stands for all hosts of the ssh configuration")
        else:
            found[name] = None
    return list(found)


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
