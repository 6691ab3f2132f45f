"""Where packages come from: the settings of the manager's uv, or else of its pip.

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

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lazycluster.utils import expanded

from .credentials import Credential

__all__ = ["IndexSettings", "bare", "hide", "read_settings"]

_USERINFO = re.compile(r"(?<=://)[^/\s]*@")


def hide(text: str) -> str:
    """Return a text without the credentials that URLs in it have."""
    return _USERINFO.sub("***@", text)


def bare(url: str) -> str:
    """Return a URL without credentials."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@dataclass(frozen=True)
class IndexSettings:
    """Where packages come from.

    Attributes:
        env: Environment variables that tell uv so, beside its own configuration files.
        urls: The addresses of indexes, with credentials where they have some.
        ca_file: The file of certificates that servers are checked with; None: those of the system.
        logins: The credentials of addresses that requirements name.
    """

    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    urls: tuple[str, ...] = field(default=(), repr=False)
    ca_file: str | None = None
    logins: tuple[Credential, ...] = field(default=(), repr=False)

    def credentials(self, url: str) -> tuple[str, str] | None:
        """Return name and password for a file: its own, else those of an index on its server or the user's .netrc."""
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
        """What distinguishes these settings from others, without credentials."""
        return repr([hide(url) for url in self.urls])


def read_settings() -> IndexSettings:
    """Return what the manager's configuration says."""
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
    """Return the address of an index with the credentials that its name has in the environment."""
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
    for folder in (Path.cwd(), *Path.cwd().parents):
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
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}  # uv itself says what is wrong with it


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
