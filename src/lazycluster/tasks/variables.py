"""Environment variables, checked where a user gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["checked_variables"]


def checked_variables(variables: Mapping[str, Any]) -> dict[str, str]:
    """Return environment variables as text.

    Args:
        variables: Names and values; numbers and paths are turned into text.

    Returns:
        A new dictionary.

    Raises:
        TypeError: If it is not a mapping, a name is not a string, or a value is neither text nor a number or path.
        ValueError: If a name is empty or contains ``=``, or anything contains a null character.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"environment variables must be a dictionary, not {type(variables).__name__}")
    checked = {}
    for name, value in variables.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of an environment variable must be a string, not {name!r}")
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"not usable as the name of an environment variable: {name!r}")
        if isinstance(value, bool) or not isinstance(value, (str, int, float, os.PathLike)):
            # The value itself may be a secret.
            raise TypeError(f"environment variable {name} must be text, not {type(value).__name__}")
        text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
        if not isinstance(text, str):
            raise TypeError(f"environment variable {name} must be text, not bytes")
        if "\0" in text:
            raise ValueError(f"the value of the environment variable {name} contains a null character")
        checked[name] = text
    return checked
