"""The name of a host as a user writes it, taken apart."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Destination", "check_user", "parse_destination"]

# A name may reach a shell through the %h and %r of the user's ProxyCommand or "Match exec": the characters that newer
# versions of ssh refuse themselves are refused here for all versions.
_HOSTILE = re.compile(r"[\x00-\x20\x7f\s'`\"$\\;&<>|(){}\[\]!*?,#^]")
_HOSTILE_USER = re.compile(r"[\x00-\x20\x7f\s'`\";&<>|(){}]")


class Destination(NamedTuple):
    """A host as named on a command line, taken apart; None where the user's ssh configuration decides."""

    user: str | None
    host: str
    port: int | None


def parse_destination(text: str) -> Destination:
    """Take a host's name apart as ``ssh`` does, and a little more.

    Args:
        text: An alias, a name or address, ``user@host``, ``user@host:port``, ``ssh://user@host:port``, or an IPv6
            address, in brackets where a port follows.

    Returns:
        Its parts.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it cannot be a host's name.
    """
    if not isinstance(text, str):
        raise TypeError(f"a host must be a string, not {type(text).__name__}")
    if not text:
        raise ValueError("the name of a host is empty")
    rest = text
    if rest.lower().startswith("ssh://"):
        rest = rest[6:].rstrip("/")
    user, at, rest = rest.rpartition("@")
    if at:
        check_user(text, user)
    name, port = _split_port(text, rest)
    if not name:
        raise ValueError(f"{text!r} names no host")
    if name.startswith("-"):
        raise ValueError(f"{text!r} is not a host: its name begins with '-', which ssh would take for an option")
    if found := _HOSTILE.search(name):
        raise ValueError(f"{text!r} is not a host: its name contains {found.group()!r}")
    if not name.isprintable():
        raise ValueError(f"{text!r} is not a host: its name contains characters that cannot be seen")
    return Destination(user or None, name, port)


def _split_port(text: str, rest: str) -> tuple[str, int | None]:
    if rest.startswith("["):
        name, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise ValueError(f"{text!r} is not a host: an address in brackets is written [address] or [address]:port")
        return name, _port_from_text(text, tail[1:]) if tail else None
    if rest.count(":") == 1:
        name, _, tail = rest.partition(":")
        return name, _port_from_text(text, tail)
    return rest, None


def _port_from_text(text: str, port: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not a host: {port!r} is not a port (1 to 65535)")
    return int(port)


def check_user(where: str, user: str) -> None:
    """Raise ValueError, beginning with ``where``, if it cannot be a user's name."""
    if not user:
        raise ValueError(f"{where!r}: the user's name is empty")
    if user.startswith("-"):
        raise ValueError(f"{where!r}: a user's name cannot begin with '-'")
    if found := _HOSTILE_USER.search(user):
        raise ValueError(f"{where!r}: a user's name cannot contain {found.group()!r}")
    if not user.isprintable():
        raise ValueError(f"{where!r}: a user's name cannot contain characters that cannot be seen")
