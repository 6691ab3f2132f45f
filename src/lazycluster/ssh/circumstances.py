"""Facts about a connection that failed which ssh did not state: what this machine and the host can tell."""

from __future__ import annotations

import datetime
import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lazycluster.core import event_loop

from .config_hosts import hops_of_command
from .config_text import option_values
from .key_files import KeyDefect, key_defects

__all__ = ["NOTHING_KNOWN", "Circumstances", "circumstances"]

_REFUSAL_LIMIT = 5.0  # seconds for a host to say why it takes no connection
_LONGEST_LINE = 256  # bytes
_PROGRAM_LIMIT = 10.0  # seconds for ssh or ssh-keygen
_MOST_KEY_FILES = 20
_WORTH_A_LOOK = re.compile(
    r"kex_exchange_identification|Permission denied|UNKNOWN port|Host key verification|authenticity of host"
)
_ABOUT_HOST = re.compile(
    r"authenticity of host '(?P<asked>.*?)(?: \(.*?\))?' can't|host key is known for (?P<known>\S+) and"
)
_VALID_SINCE = re.compile(r"^\s*Valid: (?:from|after) (\d\S+)", re.MULTILINE)
_VALID_UNTIL = re.compile(r"^\s*Valid: .*(?:to|before) (\d\S+)", re.MULTILINE)
_PRINCIPALS = re.compile(r"^\s*Principals:[ \t]*(.*(?:\n {16,}.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Circumstances:
    """Facts about a failed connection that ssh did not state.

    Attributes:
        proxy_is_ssh: Whether the host is reached through another ssh: that tells its own failures in known words.
        authority: The file that names a certificate authority for the host; empty if none does.
        certificates: What is wrong with the user's own certificates for it.
        keys: What is wrong with the key files that ssh could not load.
        refusal: The line with which the host's sshd refuses a connection; empty if it does not.
    """

    proxy_is_ssh: bool = False
    authority: str = ""
    certificates: tuple[str, ...] = ()
    keys: tuple[KeyDefect, ...] = ()
    refusal: str = ""


NOTHING_KNOWN = Circumstances()


async def circumstances(argv: Sequence[str], said: str, asked: Sequence[str], ask_host: bool = True) -> Circumstances:
    """Return what can be found out about a connection that failed.

    Args:
        argv: ssh's command line.
        said: What ssh said.
        asked: What it asked and was not told.
        ask_host: Whether the host may be asked, by a connection more, why it takes none.
    """
    text = "\n".join([said, *asked])
    return (
        await event_loop.in_thread(_circumstances, argv, text, ask_host)
        if _WORTH_A_LOOK.search(text)
        else NOTHING_KNOWN
    )


def _circumstances(argv: Sequence[str], said: str, ask_host: bool) -> Circumstances:
    values = option_values(_output_of(argv[0], "-G", *argv[1:]))
    name = _ABOUT_HOST.search(said)
    command = " ".join(values.get("proxycommand", []))
    jumps = [jump for jump in values.get("proxyjump", []) if jump.lower() != "none"]
    return Circumstances(
        proxy_is_ssh=bool(jumps or hops_of_command(command)),
        authority=_authority_file((name["asked"] or name["known"]) if name else _known_name(values), values),
        certificates=tuple(_certificate_defects(values)) if "Permission denied" in said else (),
        keys=tuple(key_defects(said)),
        refusal=_refusal(values)
        if ask_host and "kex_exchange_identification" in said and not jumps and not command
        else "",
    )


def _refusal(values: dict[str, list[str]]) -> str:
    """Return what a host says to a connection that it does not take: ssh does not show it."""
    address = values.get("hostname", [""])[0], int(values.get("port", ["22"])[0])
    try:
        with socket.create_connection(address, _REFUSAL_LIMIT) as connection:
            line = connection.recv(_LONGEST_LINE).partition(b"\n")[0]
    except OSError:
        return ""
    return "" if line.startswith(b"SSH-") else line.decode("ascii", "replace").strip()


def _output_of(*argv: str) -> bytes:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PROGRAM_LIMIT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout


def _known_name(values: dict[str, list[str]]) -> str:
    host = (values.get("hostkeyalias") or values.get("hostname") or [""])[0]
    port = (values.get("port") or ["22"])[0]
    return host if port == "22" else f"[{host}]:{port}"


def _authority_file(name: str, values: dict[str, list[str]]) -> str:
    """Return the file of known hosts that names an authority for a host; ssh-keygen knows which line is for whom."""
    files = " ".join([*values.get("userknownhostsfile", []), *values.get("globalknownhostsfile", [])]).split(" ")
    for file in files[:_MOST_KEY_FILES]:
        path = Path(file).expanduser() if file.startswith("~") else Path(file)
        found = _output_of("ssh-keygen", "-F", name, "-f", str(path)) if name and path.is_file() else b""
        if re.search(rb"^# Host .* CA ?$", found, re.MULTILINE):
            return str(path)
    return ""


def _certificate_defects(values: dict[str, list[str]]) -> list[str]:
    """Return what is wrong with the certificates that ssh offers: the host says no more than that it takes none."""
    files = [*values.get("certificatefile", []), *(f"{file}-cert.pub" for file in values.get("identityfile", []))]
    user = (values.get("user") or [""])[0]
    defects = []
    for file in dict.fromkeys(files[:_MOST_KEY_FILES]):
        path = Path(file).expanduser() if file.startswith("~") else Path(file)
        shown = _output_of("ssh-keygen", "-L", "-f", str(path)).decode(errors="replace") if path.is_file() else ""
        if shown and (defect := _certificate_defect(shown, user)):
            defects.append(f"the certificate {path} {defect}")
    return defects


def _certificate_defect(shown: str, user: str) -> str:
    if " host certificate" in shown:
        return "is that of a host, not of a user"
    now = datetime.datetime.now()  # ssh-keygen shows local times
    if (until := _VALID_UNTIL.search(shown)) and datetime.datetime.fromisoformat(until[1]) <= now:
        return f"has expired ({until[1]})"
    if (since := _VALID_SINCE.search(shown)) and datetime.datetime.fromisoformat(since[1]) > now:
        return f"is not valid before {since[1]}"
    principals = _PRINCIPALS.search(shown)
    names = principals[1].split() if principals else []
    if names and names != ["(none)"] and user and user not in names:
        return f"names {', '.join(names[:5])} as principals, not {user}"
    return ""
