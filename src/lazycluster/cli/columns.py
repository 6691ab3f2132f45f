"""Which columns of a table there is room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["GAP", "fitting"]

GAP = 2  # spaces between columns


def fitting(widths: Mapping[str, int], room: int, dispensable: Sequence[str]) -> list[str]:
    """Return the columns that fit.

    Args:
        widths: The width of each column.
        room: The width of the terminal.
        dispensable: The columns that may be left out, in the order in which they are, if need be.

    Returns:
        The names of the columns, in order. Those that are not dispensable are always among them.
    """
    names = list(widths)
    for name in dispensable:
        if sum(widths[name] + GAP for name in names) - GAP <= room:
            break
        if name in names:
            names.remove(name)
    return names
