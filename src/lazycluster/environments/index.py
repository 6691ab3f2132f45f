"""The package index: the settings of the manager's uv, or else of its pip, and credentials.

Credentials stay in memory: they go to programs in environment variables, and are in no message.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import netrc
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from lazycluster.core import toml
from lazycluster.utils import absolute, expanded

from .spec import hide

__all__ = [
    "Credential",
    "IndexSettings",
    "bare",
    "expand_variables",
    "for_git",
    "logins_in",
    "plain",
    "read_settings",
]


def bare(url: str) -> str:
    """Return a URL without credentials."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@dataclass(frozen=True)
class IndexSettings:
    """The settings of the package index.

    Attributes:
        env: Environment variables for uv, in addition to its own configuration files.
        urls: The addresses of indexes, with their credentials.
        ca_file: The file of trusted certificates; None: those of the system.
        logins: The credentials of addresses that requirements name.
    """

    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    urls: tuple[str, ...] = field(default=(), repr=False)
    ca_file: str | None = None
    logins: tuple[Credential, ...] = field(default=(), repr=False)

    def credentials(self, url: str) -> tuple[str, str] | None:
        """Return user name and password for a file: its own, else those of an index on its server, or of .netrc."""
        host = urlsplit(bare(url)).netloc
        for login in self.logins:
            if unquote(login.address) == unquote(bare(url)):
                return login.user, login.password or ""
        for index in self.urls:
            parts = urlsplit(index)
            if "@" in parts.netloc and parts.netloc.rpartition("@")[2] == host:
                return unquote(parts.username or ""), unquote(parts.password or "")
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc().authenticators(urlsplit(url).hostname or "")
            if found is not None:
                return found[0], found[2] or ""
        return None

    @property
    def stamp(self) -> str:
        """A key for caches, without credentials."""
        return repr([hide(url) for url in self.urls])


def read_settings() -> IndexSettings:
    """Return the settings of the manager's uv, or else of its pip."""
    env = dict(os.environ)
    uv = _uv_urls(env)
    if uv or any(name in env for name in ("UV_NO_INDEX", "UV_CONFIG_FILE")):
        return IndexSettings(urls=tuple(uv), ca_file=_ca_file(env, {}))
    return _from_pip(env)


def _uv_urls(env: Mapping[str, str]) -> list[str]:
    urls = []
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"):
        # An index may have a name: `name=url`.
        urls += [re.sub(r"^[\w.-]+=(?=\w+:)", "", word) for word in re.split(r"[\s,]+", env.get(name, "")) if word]
    for values in _uv_files(env):
        urls += _urls_of(values, env) + _urls_of(values.get("pip", {}), env)
    return list(dict.fromkeys(urls))


def _urls_of(values: Mapping[str, Any], env: Mapping[str, str]) -> list[str]:
    found = []
    for key in ("index-url", "extra-index-url", "find-links"):
        value = values.get(key, [])
        found += [value] if isinstance(value, str) else list(value)
    found += [_named(entry, env) for entry in values.get("index", []) if "url" in entry]
    return [str(url) for url in found]


def _named(entry: Mapping[str, Any], env: Mapping[str, str]) -> str:
    """Return the address of an index, with the credentials that environment variables of its name hold."""
    url = str(entry["url"])
    name = re.sub(r"\W", "_", str(entry.get("name", ""))).upper()
    user, password = (env.get(f"UV_INDEX_{name}_{what}", "") for what in ("USERNAME", "PASSWORD"))
    if not name or not (user or password):
        return url
    parts = urlsplit(bare(url))
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{parts.netloc}"))


def _uv_files(env: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    if env.get("UV_CONFIG_FILE") or env.get("UV_NO_CONFIG"):
        yield from _toml(Path(env.get("UV_CONFIG_FILE", "")))
        return
    config = expanded(env.get("XDG_CONFIG_HOME") or "~/.config")
    for path in (config / "uv/uv.toml", Path("/etc/xdg/uv/uv.toml"), Path("/etc/uv/uv.toml")):
        yield from _toml(path)
    here = absolute(".")
    for folder in (here, *here.parents):
        if (folder / "uv.toml").is_file():
            yield from _toml(folder / "uv.toml")
            return
        for values in _toml(folder / "pyproject.toml"):
            if "uv" in values.get("tool", {}):
                yield values["tool"]["uv"]
                return


def _toml(path: Path) -> list[dict[str, Any]]:
    return [dict(values)] if (values := _parsed(str(path), _stamp(path))) else []


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=64)
def _parsed(path: str, stamp: int) -> Mapping[str, Any]:
    if not stamp:
        return {}
    try:
        return toml.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError):
        return {}  # uv itself reports what is wrong with it


# --- pip ------------------------------------------------------------------------------------------
def _from_pip(env: Mapping[str, str]) -> IndexSettings:
    values = _pip_values(env)
    variables: dict[str, str] = {}
    urls: list[str] = []
    if values.get("index-url"):
        variables["UV_DEFAULT_INDEX"] = values["index-url"].strip()
        urls.append(variables["UV_DEFAULT_INDEX"])
    extra = values.get("extra-index-url", "").split()
    if extra:
        variables["UV_INDEX"] = " ".join(extra)
        # With pip, indexes have no order: the best version of all counts.
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
        urls += extra
    links = values.get("find-links", "").split()
    if links:
        variables["UV_FIND_LINKS"] = ",".join(links)
        urls += links
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        variables["UV_NO_INDEX"] = "1"
    hosts = values.get("trusted-host", "").split()
    if hosts:
        variables["UV_INSECURE_HOST"] = " ".join(hosts)
    return IndexSettings(variables, tuple(urls), _ca_file(env, values))


def _pip_values(env: Mapping[str, str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for path in _pip_files(env):
        values.update(_pip_file(str(path), _stamp(path)))
    for name, value in env.items():
        if name.startswith("PIP_") and value:
            values[name[4:].lower().replace("_", "-")] = value
    return values


def _pip_files(env: Mapping[str, str]) -> list[Path]:
    only = env.get("PIP_CONFIG_FILE")
    if only == os.devnull:
        return []
    config = expanded(env.get("XDG_CONFIG_HOME") or "~/.config")
    paths = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), expanded("~/.pip/pip.conf")]
    paths += [config / "pip/pip.conf", Path(sys.prefix) / "pip.conf"]
    return [*paths, Path(only)] if only else paths


@functools.lru_cache(maxsize=32)
def _pip_file(path: str, stamp: int) -> Mapping[str, str]:
    if not stamp:
        return {}
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    found: dict[str, str] = {}
    for section in ("global", "install"):
        if parser.has_section(section):
            found.update({key.replace("_", "-"): value for key, value in parser.items(section)})
    return found


def _ca_file(env: Mapping[str, str], pip: Mapping[str, str]) -> str | None:
    for value in (env.get("SSL_CERT_FILE"), pip.get("cert"), env.get("PIP_CERT"), env.get("REQUESTS_CA_BUNDLE")):
        if value and Path(value).is_file():
            return value
    return None


# --- credentials in requirements ------------------------------------------------------------------
_ADDRESS = re.compile(r"(?P<git>git\+)?(?P<scheme>https?://)(?P<login>[^/\s\"'<>]+)@(?P<rest>[^\s\"'<>#;]+)")
_TOKEN = re.compile(r"gh[a-z]_|github_pat_|glpat-|gl[a-z]+-")  # prefixes of GitHub's and GitLab's tokens
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_HELPER = (
    '!answer() {{ test "$1" = get && printf "username=%s\\npassword=%s\\n" "${0}_USER" "${0}_PASSWORD"; }}; answer'
)
NO_PROMPTS = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "GCM_INTERACTIVE": "never"}


@dataclass(frozen=True)
class Credential:
    """User name and password for an address.

    Attributes:
        address: The address, without them.
        user: The user name; a token often stands alone.
        password: The password; None if the address has none.
    """

    address: str
    user: str = field(repr=False)
    password: str | None = field(repr=False)

    @property
    def is_secret(self) -> bool:
        """True if there is more than a plain user name."""
        return self.password is not None or _TOKEN.match(self.user) is not None


def expand_variables(text: str) -> str:
    """Return requirements with their variables expanded, as installers do: ``${TOKEN}``."""
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
    """Return requirements with the credentials removed from addresses of repositories."""
    whole = expand_variables(text)
    if not logins_in(whole, git_only=True):
        return text
    return _ADDRESS.sub(lambda found: f"git+{found['scheme']}{found['rest']}" if found["git"] else found[0], whole)


def for_git(logins: Iterable[Credential], env: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables that give git credentials.

    uv and git would repeat the address of a repository in the command lines of programs that they start, which
    everybody on the machine can read. So they get it without credentials, for which git asks a helper
    (gitcredentials(7)): a line of shell in its environment that prints two other variables.

    Args:
        logins: The credentials.
        env: Its other variables.
    """
    number = int(env["GIT_CONFIG_COUNT"]) if env.get("GIT_CONFIG_COUNT", "").isdigit() else 0
    variables: dict[str, str] = {}
    for login in logins:
        secret = f"LAZYCLUSTER_LOGIN_{number}"
        variables |= {f"{secret}_USER": login.user, f"{secret}_PASSWORD": login.password or ""}
        # The first entry removes the helpers that the user has configured: they must not store these.
        for value in ("", _HELPER.format(secret)):
            variables[f"GIT_CONFIG_KEY_{number}"] = f"credential.{login.address}.helper"
            variables[f"GIT_CONFIG_VALUE_{number}"] = value
            number += 1
    return {**variables, "GIT_CONFIG_COUNT": str(number), **NO_PROMPTS} if variables else {}
