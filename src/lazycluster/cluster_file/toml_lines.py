"""Lines of the keys in a TOML document, which Python's parser does not tell."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence

__all__ = ["KeyLines"]

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
      | (?P<newline>\n)
      | (?P<blank>[ \t\r]+)
      | (?P<long>\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5})
      | (?P<name>"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)
      | (?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)


class KeyLines:
    r"""The line of each key and table of a TOML document.

    Args:
        text: The document; it is one that can be parsed, whose keys have few parts.

    Examples:
        >>> lines = KeyLines("engine = 'dask'\n[host.node1]\nport = 22\n")
        >>> lines.of(("host", "node1", "port")), lines.of(("engine",))
        (3, 1)
    """

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[str, ...], int] = {}
        table: tuple[str, ...] = ()
        for line, names, is_table in _statements(text):
            path = names if is_table else (*table, *names)
            table = names if is_table else table
            for length in range(1, len(path) + 1):
                self._lines.setdefault(path[:length], line)

    def of(self, path: Sequence[str]) -> int | None:
        """Return the line of a key, by its names from the outermost table; that of an inline table for what is in it.

        Args:
            path: The names.
        """
        for length in range(len(path), 0, -1):
            if tuple(path[:length]) in self._lines:
                return self._lines[tuple(path[:length])]
        return None


def _statements(text: str) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    """Yield the line and the names of each key and table, and True for a table."""
    line, depth = 1, 0
    names: list[str] = []
    begun, is_table, in_value = 1, False, False
    for token in _TOKEN.finditer(text):
        kind, shown = token.lastgroup, token.group()
        if kind == "newline" and depth == 0:
            if is_table:
                yield begun, tuple(names), True
            names, is_table, in_value = [], False, False
        elif in_value:
            depth += (shown in "[{") - (shown in "]}") if kind == "mark" else 0
        elif kind == "name":
            begun = begun if names else line
            names.append(_unquoted(shown))
        elif kind == "mark" and shown == "[":
            is_table = True
        elif kind == "mark" and shown == "=":
            in_value = True
            yield begun, tuple(names), False
        line += shown.count("\n")
    if is_table:
        yield begun, tuple(names), True


def _unquoted(name: str) -> str:
    if name[0] == '"':
        with contextlib.suppress(ValueError):  # an escape that JSON does not have
            return str(json.loads(name))
    return name[1:-1] if name[0] in "\"'" else name
