"""Waiting for what a test cannot be told of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], what: str, patience: float = 60.0) -> None:
    """Wait until something holds; it is an error that it does not within so many seconds, on a loaded machine."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)
