"""What this machine can tell of a connection that failed, beside what ssh said: its way, authorities, certificates."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lazycluster.core import event_loop

from .config_hosts import hops_of_command

__all__ = ["NOTHING_KNOWN", "Circumstances", "circumstances"]

_LIMIT = 10.0  # seconds for ssh or ssh-keygen
_MOST_FILES = 20
_WORTH_A_LOOK = re.compile(r"Permission denied|UNKNOWN port|Host key verification|authenticity of host")
_NAME = re.compile(r"authenticity of host '(?P<asked>.*?)(?: \(.*?\))?' can't|host key is known for (?P<known>\S+) and")
_SINCE = re.compile(r"^\s*Valid: (?:from|after) (\d\S+)", re.MULTILINE)
_UNTIL = re.compile(r"^\s*Valid: .*(?:to|before) (\d\S+)", re.MULTILINE)
_PRINCIPALS = re.compile(r"^\s*Principals:[ \t]*(.*(?:\n {16,}.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Circumstances:
    """What is known of a failed connection.

    Attributes:
        proxy_is_ssh: Whether the host is reached through another ssh: that tells its own failures in known words.
        authority: The file that names a certificate authority for the host; empty if none does.
        certificates: What is wrong with the user's own certificates for it.
    """

    proxy_is_ssh: bool = False
    authority: str = ""
    certificates: tuple[str, ...] = ()


NOTHING_KNOWN = Circumstances()


async def circumstances(argv: Sequence[str], said: str, asked: Sequence[str]) -> Circumstances:
    """Return what can be found out about a connection that failed.

    Args:
        argv: ssh's command line.
        said: What ssh said.
        asked: What it asked and was not told.
    """
    text = "\n".join([said, *asked])
    return await event_loop.in_thread(_circumstances, argv, text) if _WORTH_A_LOOK.search(text) else NOTHING_KNOWN


def _circumstances(argv: Sequence[str], said: str) -> Circumstances:
    values = _values(argv)
    name = _NAME.search(said)
    command = " ".join(values.get("proxycommand", []))
    jumps = [jump for jump in values.get("proxyjump", []) if jump.lower() != "none"]
    return Circumstances(
        proxy_is_ssh=bool(jumps or hops_of_command(command)),
        authority=_authority((name["asked"] or name["known"]) if name else _known_name(values), values),
        certificates=tuple(_defects(values)) if "Permission denied" in said else (),
    )


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


def _known_name(values: dict[str, list[str]]) -> str:
    host = (values.get("hostkeyalias") or values.get("hostname") or [""])[0]
    port = (values.get("port") or ["22"])[0]
    return host if port == "22" else f"[{host}]:{port}"


def _authority(name: str, values: dict[str, list[str]]) -> str:
    """Return the file of known hosts that names an authority for a host; ssh-keygen knows which line is for whom."""
    files = " ".join([*values.get("userknownhostsfile", []), *values.get("globalknownhostsfile", [])]).split()
    for file in files[:_MOST_FILES]:
        path = Path(file).expanduser() if file.startswith("~") else Path(file)
        found = _said_by("ssh-keygen", "-F", name, "-f", str(path)) if name and path.is_file() else ""
        if re.search(r"^# Host .* CA ?$", found, re.MULTILINE):
            return str(path)
    return ""


def _defects(values: dict[str, list[str]]) -> list[str]:
    """Return what is wrong with the certificates that ssh offers: the host says no more than that it takes none."""
    files = [*values.get("certificatefile", []), *(f"{file}-cert.pub" for file in values.get("identityfile", []))]
    user = (values.get("user") or [""])[0]
    defects = []
    for file in dict.fromkeys(files[:_MOST_FILES]):
        path = Path(file).expanduser() if file.startswith("~") else Path(file)
        shown = _said_by("ssh-keygen", "-L", "-f", str(path)) if path.is_file() else ""
        if shown and (defect := _defect(shown, user)):
            defects.append(f"the certificate {path} {defect}")
    return defects


def _defect(shown: str, user: str) -> str:
    if " host certificate" in shown:
        return "is that of a host, not of a user"
    now = datetime.datetime.now()  # ssh-keygen shows local times
    if (until := _UNTIL.search(shown)) and datetime.datetime.fromisoformat(until[1]) <= now:
        return f"has expired ({until[1]})"
    if (since := _SINCE.search(shown)) and datetime.datetime.fromisoformat(since[1]) > now:
        return f"is not valid before {since[1]}"
    principals = _PRINCIPALS.search(shown)
    names = principals[1].split() if principals else []
    if names and names != ["(none)"] and user and user not in names:
        return f"names {', '.join(names[:5])} as principals, not {user}"
    return ""
