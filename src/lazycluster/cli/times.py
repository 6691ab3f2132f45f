"""Times as people read them."""

from __future__ import annotations

import datetime

__all__ = ["moment", "span"]

_FAR = datetime.timedelta(days=14)
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def moment(seconds: float) -> str:
    """Return a moment, in seconds since 1970, in local time: today's without the date, one that is far without a time.

    Examples:
        >>> len(moment(0))
        10
    """
    then, now = datetime.datetime.fromtimestamp(seconds), datetime.datetime.now()
    if then.date() == now.date():
        return f"{then:%H:%M}"
    return f"{then:%Y-%m-%d}" if abs(then - now) > _FAR else f"{then:%Y-%m-%d %H:%M}"


def span(seconds: float) -> str:
    """Return a length of time in its two largest units.

    Examples:
        >>> span(7200), span(5400), span(45), span(0.5)
        ('2 h', '1 h 30 min', '45 s', '0.5 s')
    """
    if seconds < 10:
        return f"{seconds:g} s"
    left, parts = round(seconds), []
    for size, unit in _UNITS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
