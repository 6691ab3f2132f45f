"""Settings of a group: for all its hosts, and for single ones in a dictionary or TOML file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lazycluster.core.hostsets import fits
from lazycluster.runtime.session import HostSpec
from lazycluster.utils import expanded

__all__ = ["GroupSettings", "PerHost", "host_names", "listed", "read_settings"]

_logger = logging.getLogger("lazycluster")

PerHost: TypeAlias = Mapping[str, Mapping[str, Any]]

_ONLY_OWN = ("address",)  # of single hosts
_OWN = ("working_dir", "python", "setup", "env", "shell", "environment", "startup_files")


def read_settings(settings: PerHost | str | os.PathLike[str] | None) -> dict[str, dict[str, Any]]:
    """Return settings per host.

    Args:
        settings: A dictionary of dictionaries, or the path of a TOML file with a table for each host.

    Raises:
        TypeError: If it is of another shape.
        ValueError: If the file cannot be read or is no TOML.
    """
    if settings is None:
        return {}
    where = "settings"
    if isinstance(settings, (str, os.PathLike)):
        from lazycluster.core import toml

        where = os.fspath(settings)
        try:
            settings = toml.loads(expanded(where).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
            raise ValueError(f"the settings cannot be read: {where}: {error}") from None
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a dictionary or the path of a TOML file, not {type(settings).__name__}")
    for host, values in settings.items():
        if not isinstance(values, Mapping):
            raise TypeError(f"{where}: the settings of {host!r} must be a table, not {type(values).__name__}")
    return {str(host): dict(values) for host, values in settings.items()}


def listed(value: str | Iterable[str] | None) -> list[str]:
    """Return one text, several, or none as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def host_names(settings: Mapping[str, Any]) -> list[str]:
    """Return the hosts that settings name, sets and patterns left out.

    Raises:
        ValueError: If there is none.
    """
    hosts = [host for host in settings if not set(host) & set("*?[{,")]
    if not hosts:
        raise ValueError(f"the settings name no host, only patterns ({', '.join(settings)}): give hosts, too")
    return hosts


@dataclass(frozen=True)
class GroupSettings:
    """Settings for all hosts, unless those of a host say otherwise; what may be secret is in no `repr`.

    Attributes:
        working_dir, connection_kwargs, python, setup, env, shell, environment, startup_files: See
            :class:`lazycluster.Runtime`.
        settings: Per host, set or pattern such as ``gpu-*``, from :func:`read_settings`; what comes later wins.
        ask: Whether a person may be asked.
        progress: Whether it is shown how far things are; None: as `Environment.progress` says.
    """

    working_dir: str | None = None
    connection_kwargs: Mapping[str, Any] | None = field(default=None, repr=False)
    python: str | None = None
    setup: str | None = None
    env: Mapping[str, Any] | None = field(default=None, repr=False)
    shell: str | None = None
    settings: PerHost | None = field(default=None, repr=False)
    ask: bool = False
    environment: Any = None
    progress: bool | None = None
    startup_files: str = "once"

    def spec(self, host: str) -> HostSpec:
        """Return the settings of a host.

        Raises:
            TypeError, ValueError: If something makes no sense, e.g. an unknown key, which is named.
        """
        own: dict[str, Any] = {name: getattr(self, name) for name in _OWN}
        own["env"] = dict(self.env or {})
        kwargs = dict(self.connection_kwargs or {})
        for pattern, values in (self.settings or {}).items():
            if not fits(host, pattern):
                continue
            for key, value in values.items():
                if key == "env":
                    own["env"].update(value)
                elif key in _OWN or key in _ONLY_OWN:
                    own[key] = value
                else:
                    kwargs[key] = value
        spec = HostSpec(host, connection_kwargs=kwargs, ask=self.ask, **own)
        spec.connection()  # refuses what makes no sense before anything is connected
        return spec

    def specs(self, hosts: Iterable[str]) -> list[HostSpec]:
        """Return the settings of each of some hosts; warns of settings that apply to none."""
        names = list(hosts)
        for pattern in self.settings or {}:
            if not any(fits(name, pattern) for name in names):
                _logger.warning("settings: no host is named %r", pattern)
        return [self.spec(name) for name in names]
