"""Words of messages that depend on a number."""

from __future__ import annotations

import signal

__all__ = ["counted"]


def counted(number: float, thing: str) -> str:
    """Return a number of things: ``1 worker``, ``2 workers``.

    Args:
        number: How many.
        thing: What it is called if it is one; several get an ``s``.
    """
    return f"{number:g} {thing}" if number == 1 else f"{number:g} {thing}s"


def signal_name(number: int) -> str:
    """Return the name of a signal, e.g. ``SIGKILL``; ``signal 65`` if it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
