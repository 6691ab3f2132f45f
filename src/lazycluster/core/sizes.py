"""Sizes as people write them: ``500 MB``, ``20 GiB``."""

from __future__ import annotations

import re

__all__ = ["size"]

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30,
          "ti": 1 << 40}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE | re.ASCII)


def size(text: str) -> float:
    """Return a size in bytes.

    Args:
        text: A number of bytes, or one with a unit: ``"500 MB"``, ``"20GiB"``, ``"4g"``.

    Raises:
        ValueError: If it cannot be read.

    Examples:
        >>> size("2 kB"), size("2KiB")
        (2000.0, 2048.0)
    """
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a size such as '500 MB' or '4 GiB'")
    return float(found[1]) * _UNITS[(found[2] or "").lower()]
