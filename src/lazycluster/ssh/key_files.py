"""Private key files that ssh cannot use, and why: it says no more than that it cannot load them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KeyDefect", "key_defects"]

_UNUSABLE = re.compile(
    r"""^(?:Load\ key\ "(?P<loaded>.*)":\ (?P<why>.*)
        |no\ such\ identity:\ (?P<missing>.*):\ .*
        |Warning:\ Identity\ file\ (?P<given>.*)\ not\ accessible:\ .*)$""",
    re.MULTILINE | re.VERBOSE,
)
_PUBLIC = re.compile(rb"(?:ssh-|ecdsa-|sk-)[\w@.-]+ ")
_READ = 64 * 1024  # bytes


@dataclass(frozen=True)
class KeyDefect:
    """A key file that ssh was told to use and cannot.

    Attributes:
        what: What is wrong with it.
        step: What helps.
    """

    what: str
    step: str


def key_defects(said: str) -> list[KeyDefect]:
    """Return what is wrong with the key files that ssh could not load.

    Args:
        said: What ssh said.
    """
    found: dict[str, KeyDefect] = {}
    for match in _UNUSABLE.finditer(said.replace("\r", "")):
        file = match["loaded"] or match["missing"] or match["given"]
        found.setdefault(file, _defect(file, match["why"] or ""))
    return list(found.values())


def _defect(file: str, why: str) -> KeyDefect:
    path, quoted = Path(file), shlex.quote(file)
    name_another = "name the right file: IdentityFile in your ssh configuration or, in Python, key_filename"
    try:
        mode = path.stat().st_mode & 0o777
        with path.open("rb") as opened:
            content = opened.read(_READ)
    except FileNotFoundError:
        return KeyDefect(f"the key file {file} does not exist", name_another)
    except OSError as error:
        return KeyDefect(f"the key file {file} cannot be read: {error.strerror}", name_another)
    if _PUBLIC.match(content):
        return KeyDefect(
            f"{file} is a public key, where ssh needs the private one",
            f"name the private key: {file.removesuffix('.pub')}" if file.endswith(".pub") else name_another,
        )
    if mode & 0o077 and "permissions" in why:
        what = f"others may read the key file {file} (mode {mode:04o}), so ssh does not use it"
        return KeyDefect(what, f"chmod 600 {quoted}")
    if content.startswith(b"PuTTY-User-Key-File"):
        step = f"convert it: puttygen {quoted} -O private-openssh -o {quoted}.openssh"
        return KeyDefect(f"the key file {file} is one of PuTTY's, which ssh cannot read", step)
    if b"\r\n" in content:
        step = f"remove them: sed -i 's/\\r$//' {quoted}"
        return KeyDefect(f"the key file {file} has the line ends of Windows (CRLF), which ssh cannot read", step)
    if b"PRIVATE KEY-----" not in content:
        return KeyDefect(f"{file} is not a private key", name_another)
    step = f"'ssh-keygen -y -f {quoted}' must print its public key"
    return KeyDefect(f"the key file {file} cannot be used: {why}", step)
