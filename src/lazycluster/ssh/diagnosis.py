"""What this machine can tell of a connection that failed, beside what ssh said."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from lazycluster import _loop

from .hosts import hops_of_command

__all__ = ["NOTHING_KNOWN", "Circumstances", "circumstances"]

_LIMIT = 10.0  # seconds for ssh
_WORTH_A_LOOK = re.compile(r"UNKNOWN port")


@dataclass(frozen=True)
class Circumstances:
    """What is known of a failed connection.

    Attributes:
        proxy_is_ssh: Whether the host is reached through another ssh: that tells its own failures in known words.
    """

    proxy_is_ssh: bool = False


NOTHING_KNOWN = Circumstances()


async def circumstances(argv: Sequence[str], said: str) -> Circumstances:
    """Return what can be found out about a connection that failed.

    Args:
        argv: ssh's command line.
        said: What ssh said.
    """
    return await _loop.in_thread(_circumstances, argv) if _WORTH_A_LOOK.search(said) else NOTHING_KNOWN


def _circumstances(argv: Sequence[str]) -> Circumstances:
    values = _values(argv)
    command = " ".join(values.get("proxycommand", []))
    jumps = [jump for jump in values.get("proxyjump", []) if jump.lower() != "none"]
    return Circumstances(proxy_is_ssh=bool(jumps or hops_of_command(command)))


def _values(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return what ssh makes of its command line and the configuration: for each option its values."""
    values: dict[str, list[str]] = {}
    for line in _said_by(argv[0], "-G", *argv[1:]).splitlines():
        option, _, value = line.partition(" ")
        values.setdefault(option, []).append(value)
    return values


def _said_by(*argv: str) -> str:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_LIMIT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")
