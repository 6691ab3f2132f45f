r"""Text of an ssh configuration, taken apart as ssh does it.

For ssh only a line feed ends a line, and only spaces, tabs and carriage returns separate words. ``str.split()``,
``str.splitlines()`` and ``\s`` know many more: a form feed, U+0085, U+2028, a no-break space.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

__all__ = ["BOM_HINT", "Word", "keyword_of", "lines_of", "option_values", "split_words"]

BOM_HINT = (
    "it begins with a byte order mark, which ssh takes for a part of the first word: "
    "save it as UTF-8 without one, or remove it with: sed -i '1s/^\\xEF\\xBB\\xBF//'"
)
"""Message about a file that begins with a byte order mark, with the fix; the file's name goes behind it."""

_BLANKS = " \t\r"
_KEYWORD = re.compile(r'[ \t\r]*(?:"([^"]*)"|([^ \t\r"=]+))[ \t\r]*(?:=[ \t\r]*)?(.*)', re.DOTALL)


class Word(NamedTuple):
    """A word of a line: its text without quotes, and the span of the text with them."""

    text: str
    start: int
    end: int


def lines_of(content: bytes) -> tuple[list[str], bool]:
    """Return the lines of a file without their ends, and whether a byte order mark was left out."""
    has_mark = content.startswith(codecs.BOM_UTF8)
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    return text.split("\n"), has_mark


def keyword_of(line: str) -> tuple[str, int] | None:
    """Return the keyword of a line, in small letters, and where its arguments begin.

    Args:
        line: The line. What follows a null character does not count, as for ssh.

    Returns:
        None if the line is empty, a comment, or has no arguments, which ssh itself reports.
    """
    found = _KEYWORD.fullmatch(line.partition("\0")[0].rstrip(_BLANKS + "\f"))
    if found is None or not found[3]:
        return None
    keyword = (found[1] or found[2] or "").lower()
    return None if not keyword or keyword.startswith("#") else (keyword, found.start(3))


def split_words(line: str, start: int = 0) -> list[Word]:
    """Return the words of a line up to a comment.

    Args:
        line: The line.
        start: Where the words begin.

    Returns:
        The words. An empty list if a quote is not closed, which ssh itself reports.
    """
    line = line.partition("\0")[0].rstrip(_BLANKS + "\f")
    words: list[Word] = []
    at = start
    while at < len(line):
        if line[at] in " \t":
            at += 1
        elif line[at] == "#":
            break
        else:
            word = _word(line, at)
            if word is None:
                return []
            words.append(word)
            at = word.end
    return words


def _word(line: str, start: int) -> Word | None:
    text, quote, at = "", "", start
    while at < len(line):
        char = line[at]
        following = line[at + 1 : at + 2]
        if char == "\\" and following and (following in "'\"\\" or (following == " " and not quote)):
            text += following
            at += 1
        elif not quote and char in " \t":
            break
        elif not quote and char in "'\"":
            quote = char
        elif char == quote:
            quote = ""
        else:
            text += char
        at += 1
    return None if quote else Word(text, start, at)


def option_values(output: bytes) -> dict[str, list[str]]:
    """Return what ``ssh -G`` has printed: for each option, in small letters, its values in order."""
    values: dict[str, list[str]] = {}
    for line in output.decode(errors="replace").split("\n"):
        option, _, value = line.partition(" ")
        if option:
            values.setdefault(option, []).append(value)
    return values
