"""Suggestions in errors about a name that is not known: the one that is meant, or those that there are."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

__all__ = ["suggestion"]

_MOST_COMPARED = 1000
_CUTOFF = 0.5


def suggestion(name: object, known: Iterable[str], *, listed: bool = True, most: int = 1) -> str:
    """Return how an error about an unknown name goes on.

    Args:
        name: The name.
        known: Those that are known.
        listed: Name all of them if none is like it.
        most: How many may be meant at most.

    Returns:
        For instance ``"; did you mean 'node1'?"``, or ``"; there are: node1, node2"``; "" if there is nothing to say.
    """
    import difflib  # only where something is wrong: it takes time to load

    names = list(islice(known, _MOST_COMPARED))
    close = difflib.get_close_matches(str(name).lower(), names, n=most, cutoff=_CUTOFF)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are: {', '.join(names)}" if listed and names else ""
