"""Sets of hosts as people write them: ``node[01-12]``, ``gpu{a,b}``, ``gpu-*``, with commas between."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
import re
from collections.abc import Iterable

__all__ = ["MOST", "HostSetError", "expand", "fits", "fold", "is_pattern", "selected"]

MOST = 100_000
"""Names that one set may have: more is a slip of the hand."""

_LONGEST = 1024  # characters of a name: ssh takes no longer ones
_DEEPEST = 16  # braces within braces
_DIGITS = 18  # of a number
_SHOWN = 60  # characters of a set in an error

_BLANKS = " \t\r\n"  # what looks like one elsewhere, as a no-break space, is a part of a name, which is then refused
_LITERAL = re.compile(rf"[^\[\]{{}},{_BLANKS}&!^]+")
_BETWEEN = re.compile(rf"[,{_BLANKS}]*")
_BRACKET = re.compile(r"\[([^\[\]{}]*)\]")
_ADDRESS = re.compile(r"[0-9a-f.]*:[0-9a-f:.]*(?:%[\w.-]+)?", re.IGNORECASE)
_NUMBERS = re.compile(rf"[0-9,/{_BLANKS}-]+")
_RANGE = re.compile(r"_*([0-9]+)(?:_*-_*([0-9]+)(?:_*/_*([0-9]+))?)?_*".replace("_", f"[{_BLANKS}]"))
_CLASS = re.compile(r"(!?)((?:[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|[\w.])+)", re.ASCII)
_SEQUENCE = re.compile(rf"\{{([^{{}},\[\]{_BLANKS}]*\.\.[^{{}},\[\]{_BLANKS}]*)\}}")
_STEPS = re.compile(r"(?:([+-]?[0-9]+)\.\.([+-]?[0-9]+)|([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z]))(?:\.\.([+-]?[0-9]+))?")
_PATTERN = re.compile(r"[*?]|\[[^\]:]*\]")
_CHARACTERS = re.compile(r"\[[0-9]+\]")
_NUMBER = re.compile(r"[0-9]{1,18}")


class HostSetError(ValueError):
    """A set of hosts makes no sense."""


def expand(text: str, *, words: bool = False) -> list[str]:
    """Return the names of a set.

    Args:
        text: Names with commas between. ``[01-12]`` and ``[1, 5-9/2]`` count as in ClusterShell, ``{a,b}`` and
            ``{1..3}`` as in bash.
        words: Whether blanks stand between names, too.

    Returns:
        The names, each once, in order. Patterns such as ``gpu-*`` and ``gpu[ab]`` are left as they are.

    Raises:
        HostSetError: If it is neither a set nor a pattern, or stands for too many hosts.

    Examples:
        >>> expand("node[08-10],gpu{a,b}")
        ['node08', 'node09', 'node10', 'gpua', 'gpub']
    """
    return list(dict.fromkeys(_Parser(text).names(words)))


def is_pattern(name: str) -> bool:
    """Return whether a name, from `expand`, stands for those of the known hosts that it fits."""
    return _PATTERN.search(name) is not None


def selected(pattern: str) -> tuple[str, ...]:
    """Return the names and patterns that are meant by one that is given in Python.

    Args:
        pattern: A name, set or pattern. Unlike in `expand`, ``[13]`` is one of these characters, as in a shell.

    Raises:
        HostSetError: If it is neither a set nor a pattern, or stands for too many hosts.
    """
    return _selected(pattern)


@functools.lru_cache(maxsize=256)
def _selected(pattern: str) -> tuple[str, ...]:
    if not _CHARACTERS.search(pattern):
        return tuple(expand(pattern))
    if len(expand(_CHARACTERS.sub("[a]", pattern))) > 1:
        raise HostSetError(f"{pattern!r}: in a set, numbers in brackets have commas between them: [1,3]")
    return (pattern,)


def fits(host: str, pattern: str) -> bool:
    """Return whether a host is meant by a name, set or pattern that is given in Python, see `selected`."""
    return host == pattern or any(
        host == one or (is_pattern(one) and fnmatch.fnmatchcase(host, one)) for one in selected(pattern)
    )


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


class _Parser:
    """One text, and how much of it has been read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def names(self, words: bool) -> list[str]:
        names: list[str] = []
        self._skip()
        while self._at < len(self._text):
            if self._text[self._at] == "-":
                raise self._error("a host's name begins with '-', which ssh would take for an option")
            names += filter(None, self._name(0))
            self._limit(len(names))
            end = self._at
            self._skip()
            if not words and self._at < len(self._text) and "," not in self._text[end : self._at]:
                raise self._error("hosts have commas between them, not blanks")
        return names

    def _skip(self) -> None:
        found = _BETWEEN.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _name(self, depth: int) -> list[str]:
        """Read up to a comma or blank, or the end of the braces."""
        choices: list[list[str]] = []
        length = 0
        while self._at < len(self._text) and self._text[self._at] not in _BLANKS + ",}":
            values = self._piece(depth)
            length += max(map(len, values), default=0)
            if length > _LONGEST:
                raise self._error(f"a name is longer than {_LONGEST} characters")
            if choices and len(choices[-1]) == len(values) == 1:
                choices[-1] = [choices[-1][0] + values[0]]
            else:
                choices.append(values)
            self._limit(math.prod(map(len, choices)))
        if depth == 0 and self._text[self._at : self._at + 1] == "}":
            raise self._error("a bracket has no partner")
        return ["".join(parts) for parts in itertools.product(*choices)]

    def _piece(self, depth: int) -> list[str]:
        if literal := _LITERAL.match(self._text, self._at):
            self._at = literal.end()
            return [literal.group()]
        char = self._text[self._at]
        if char == "{":
            return self._braces(depth + 1)
        if char == "[":
            return self._bracket()
        if char == "]":
            raise self._error("a bracket has no partner")
        if char == "^" and (self._at == 0 or self._text[self._at - 1] in _BLANKS + ","):
            raise self._error("a file with hosts is given by itself: ^FILE, or --hostfile FILE")
        hint = "all hosts that are wanted are named with -w, and those to leave out with -x (in Python: exclude_hosts)"
        raise self._error(f"{char!r} cannot stand in a set: {hint}")

    def _bracket(self) -> list[str]:
        found = _BRACKET.match(self._text, self._at)
        if found is None:
            closed = "]" in self._text[self._at :]
            raise self._error("brackets cannot hold brackets" if closed else "a bracket has no partner")
        inside, is_first = found.group(1), self._at == 0 or self._text[self._at - 1] in _BLANKS + "@/{,"
        self._at = found.end()
        if is_first and _ADDRESS.fullmatch(inside):
            return [found.group()]
        if inside.strip(_BLANKS) and _NUMBERS.fullmatch(inside):
            return self._numbers(inside)
        if (characters := _CLASS.fullmatch(inside)) and _is_ascending(characters[2]):
            return [found.group()]
        if inside.startswith("^"):
            hint = f"[!{inside[1:]}] is any one character but these; -x leaves hosts out"
        elif "," in inside and re.fullmatch(r"[\w.,-]+", inside):
            hint = f"words are written in braces: {{{inside}}}"
        else:
            hint = "brackets hold numbers, as [1-9], [01,05] or [0-10/2], or the characters of a pattern, as [a-c]"
        raise self._error(f"{found.group()} is not valid: {hint}")

    def _numbers(self, inside: str) -> list[str]:
        numbers: list[str] = []
        for piece in inside.split(","):
            found = _RANGE.fullmatch(piece)
            if found is None:
                raise self._error("a range is written as 1-9, 01-12 or 0-10/2")
            first, last, step = found[1], found[2] or found[1], found[3] or "1"
            start, end, every = self._integer(first), self._integer(last), self._integer(step)
            if every == 0 or end < start:
                raise self._error(f"{piece.strip(_BLANKS)} is an empty range")
            is_padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
            if is_padded and len(first) != len(last):
                raise self._error(
                    f"{piece.strip(_BLANKS)} has zeros before one of its numbers: give both the same length"
                )
            self._limit(len(numbers) + (end - start) // every + 1)
            numbers += [str(number).zfill(len(first)) for number in range(start, end + 1, every)]
        return numbers

    def _braces(self, depth: int) -> list[str]:
        if depth > _DEEPEST:
            raise self._error(f"braces are nested more than {_DEEPEST} deep")
        if found := _SEQUENCE.match(self._text, self._at):
            self._at = found.end()
            return self._sequence(found.group(1))
        names: list[str] = []
        alternatives = 0
        while alternatives == 0 or self._text[self._at] == ",":
            self._at += 1
            names += self._name(depth)
            self._limit(len(names))
            alternatives += 1
            if self._at == len(self._text):
                raise self._error("a bracket has no partner")
            if self._text[self._at] in _BLANKS:
                raise self._error("braces hold no blanks: {a,b}")
        self._at += 1
        if alternatives == 1:
            raise self._error("braces hold words with commas between, {a,b}, or a range, {1..3}")
        if any(".." in name for name in names):
            raise self._error("a range beside words has braces of its own: {{1..3},a}")
        return names

    def _sequence(self, inside: str) -> list[str]:
        found = _STEPS.fullmatch(inside)
        if found is None:
            raise self._error(f"{{{inside}}} is not valid: a range is written as {{1..9}}, {{01..10..3}} or {{a..c}}")
        first, last, *letters, step = found.groups()
        every = abs(self._integer(step or "1")) or 1
        if first is not None:
            start, end = self._integer(first), self._integer(last)
        else:
            start, end = (ord(letter) for letter in letters if letter)
        self._limit(abs(end - start) // every + 1)
        numbers = range(start, end + 1, every) if start <= end else range(start, end - 1, -every)
        if first is None:
            return [chr(number) for number in numbers]
        # As in bash: a zero in front of one of the two pads all, to the length of the longer one.
        is_padded = any(re.match(r"-?0[0-9]", end) for end in (first, last))
        width = max(len(first), len(last)) if is_padded else 0
        return [str(number).zfill(width) for number in numbers]

    def _integer(self, digits: str) -> int:
        if len(digits) > _DIGITS:
            raise self._error(f"a number has more than {_DIGITS} digits")
        return int(digits)

    def _limit(self, count: int) -> None:
        if count > MOST:
            raise self._error(f"it stands for more than {MOST} hosts")

    def _error(self, text: str) -> HostSetError:
        shown = self._text if len(self._text) <= _SHOWN else self._text[:_SHOWN] + "..."
        return HostSetError(f"{shown!r}: {text}")


def _is_ascending(characters: str) -> bool:
    """Return whether each range of a class holds something."""
    return all(first <= last for first, last in re.findall(r"(.)-(.)", characters))
