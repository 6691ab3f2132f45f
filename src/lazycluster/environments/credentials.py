"""Credentials in addresses that requirements name: no command line has them, and no file.

uv and git would repeat the address of a repository in the command lines of programs that they start, which everybody
on the machine can read. So they get it without its credentials, for which git asks a helper (gitcredentials(7)): a line
for the shell that git finds in its environment, and that prints what is in two other variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from .subprocesses import run_here

__all__ = ["Credential", "expanded", "for_git", "logins_in", "plain", "with_passwords"]

_ADDRESS = re.compile(r"(?P<git>git\+)?(?P<scheme>https?://)(?P<login>[^/\s\"'<>]+)@(?P<rest>[^\s\"'<>#;]+)")
_TOKEN = re.compile(r"gh[a-z]_|github_pat_|glpat-|gl[a-z]+-")  # as the large servers of repositories write them
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_HELPER = (
    '!answer() {{ test "$1" = get && printf "username=%s\\npassword=%s\\n" "${0}_USER" "${0}_PASSWORD"; }}; answer'
)
_QUIET = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GCM_INTERACTIVE": "never"}


@dataclass(frozen=True)
class Credential:
    """Name and password for an address.

    Attributes:
        address: The address, without them.
        user: The name; often all there is, and a token.
        password: The password; None if the address has none.
    """

    address: str
    user: str = field(repr=False)
    password: str | None = field(repr=False)

    @property
    def is_secret(self) -> bool:
        """Whether there is more than a name."""
        return self.password is not None or _TOKEN.match(self.user) is not None


def expanded(text: str) -> str:
    """Return requirements with the values of variables that they name, as installers have it: ``${TOKEN}``."""
    return _VARIABLE.sub(lambda found: os.environ.get(found[1], found[0]), text)


def logins_in(text: str, *, git_only: bool = False) -> list[Credential]:
    """Return the credentials of the addresses in a text, each once."""
    found = {}
    for match in _ADDRESS.finditer(text):
        if match["git"] or not git_only:
            user, colon, password = match["login"].partition(":")
            address = match["scheme"] + match["rest"].partition("@")[0]  # what follows is a branch or commit
            found[address] = Credential(address, unquote(user), unquote(password) if colon else None)
    return list(found.values())


def plain(text: str) -> str:
    """Return requirements with the addresses of repositories in them without credentials."""
    whole = expanded(text)
    if not logins_in(whole, git_only=True):
        return text
    return _ADDRESS.sub(lambda found: f"git+{found['scheme']}{found['rest']}" if found["git"] else found[0], whole)


def for_git(logins: Iterable[Credential], env: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables by which git knows credentials.

    Args:
        logins: The credentials.
        env: The variables that it has beside.
    """
    number = int(env["GIT_CONFIG_COUNT"]) if env.get("GIT_CONFIG_COUNT", "").isdigit() else 0
    variables: dict[str, str] = {}
    for login in logins:
        secret = f"LAZYCLUSTER_LOGIN_{number}"
        variables |= {f"{secret}_USER": login.user, f"{secret}_PASSWORD": login.password or ""}
        # The first entry forgets the helpers that the user has configured: they are not to keep these.
        for value in ("", _HELPER.format(secret)):
            variables[f"GIT_CONFIG_KEY_{number}"] = f"credential.{login.address}.helper"
            variables[f"GIT_CONFIG_VALUE_{number}"] = value
            number += 1
    return {**variables, "GIT_CONFIG_COUNT": str(number), **_QUIET} if variables else {}


async def with_passwords(logins: Iterable[Credential]) -> tuple[Credential, ...]:
    """Return credentials with the passwords that the user's git knows, where an address has a name only."""
    return tuple([await _known(login) if login.password is None else login for login in logins])


async def _known(login: Credential) -> Credential:
    question = f"url={login.address}\nusername={login.user}\n\n"
    try:
        answer = await run_here(["git", "credential", "fill"], {**os.environ, **_QUIET}, stdin=question)
    except OSError:  # who needs it says so
        return login
    lines = dict(line.partition("=")[::2] for line in answer.output.splitlines())
    return replace(login, password=lines["password"]) if answer.status == 0 and lines.get("password") else login
