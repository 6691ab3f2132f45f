"""Times as people write them: ``90 s``, ``30 min``, ``1h30m``."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["LONGEST", "duration"]

LONGEST = 10 * 365 * 86400.0
"""Seconds; more is a slip of the hand."""

_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
    **dict.fromkeys(("w", "week", "weeks"), 7 * 86400),
}
_PART = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*([a-z]+)\s*", re.IGNORECASE | re.ASCII)


def duration(value: Any, may_be_zero: bool = False) -> float:
    """Return a time in seconds.

    Args:
        value: A number of seconds, or text such as ``"90 s"``, ``"30 min"``, ``"2 h"``, ``"1 day"`` or ``"1h30m"``.
        may_be_zero: Whether it may be none at all.

    Raises:
        TypeError: If it is neither.
        ValueError: If it cannot be read, is not more than 0, or is longer than ten years.

    Examples:
        >>> duration("30 min"), duration("1h30m"), duration(90)
        (1800.0, 5400.0, 90.0)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"a time must be a number of seconds, or a string such as '30 min', not {type(value).__name__}")
    seconds = _parsed(value) if isinstance(value, str) else float(min(value, 2 * LONGEST))
    if not 0 < seconds <= LONGEST and not (may_be_zero and seconds == 0):
        raise ValueError(f"a time must be greater than 0, and at most ten years, not {value!r}")
    return seconds


def _parsed(text: str) -> float:
    if re.fullmatch(r"\s*[0-9]{1,12}(?:\.[0-9]{1,9})?\s*", text, re.ASCII):
        return float(text)
    seconds, at = 0.0, 0
    while found := _PART.match(text, at):
        unit = _UNITS.get(found[2].lower())
        if unit is None:
            raise ValueError(f"{text!r} is not a time: the unit {found[2]!r} is none of s, min, h, d, w")
        seconds, at = seconds + float(found[1]) * unit, found.end()
    if at != len(text) or not text.strip():
        raise ValueError(f"{text!r} is not a time such as '90 s', '30 min', '2 h', '1 d' or '1h30m'")
    return seconds
