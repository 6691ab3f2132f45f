"""Discovery of the hosts in the user's ssh configuration, with the reasons why some cannot be used."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence

from lazycluster.core import event_loop
from lazycluster.core.hostsets import fits, is_pattern, selected
from lazycluster.core.suggestions import suggestion
from lazycluster.exceptions import (
    InvalidRuntimeError,
    InvalidRuntimesError,
    LazyclusterError,
    NoRuntimesDetectedError,
    NoRuntimesError,
)
from lazycluster.output import progress
from lazycluster.runtime.filters import HostFilter, unmet
from lazycluster.runtime.session import HostSession
from lazycluster.runtimes import Runtime
from lazycluster.ssh.config_hosts import CONFIG_VARIABLE, configured_hosts

from .members import close_all, connect_all
from .settings import GroupSettings, listed

__all__ = ["choose_hosts", "detect", "open_again", "select"]


def detect(
    settings: GroupSettings, config_file: str | os.PathLike[str] | None
) -> tuple[dict[str, HostSession], dict[str, str]]:
    """Connect all hosts of an ssh configuration at once.

    Args:
        settings: Their settings.
        config_file: The configuration, by default the user's.

    Returns:
        The sessions by host, and for each other name why there is none.

    Raises:
        NoRuntimesDetectedError: If there is not one session; says why for each host.
    """
    inactive: dict[str, str] = {}
    names = []
    for host in configured_hosts(config_file):
        if host.skipped:
            inactive[host.name] = host.skipped
        else:
            names.append(host.name)
    specs = settings.specs(names)
    with progress.shown(settings.progress):
        connected = event_loop.run(connect_all(specs))
    sessions: dict[str, HostSession] = {}
    aliases = []
    for spec, item in zip(specs, connected, strict=True):
        if not isinstance(item, HostSession):
            inactive[spec.host] = str(item).removeprefix(f"{spec.host}: ")
        elif other := _alias_of(sessions, item):
            inactive[spec.host] = f"another name of {other}: the same account on the same machine"
            aliases.append(item)
        else:
            sessions[spec.host] = item
    if aliases:
        event_loop.run(close_all(aliases))
    if not sessions:
        raise NoRuntimesDetectedError(_nothing_detected(inactive, config_file))
    return sessions, inactive


def _alias_of(sessions: Mapping[str, HostSession], session: HostSession) -> str | None:
    return next((host for host, other in sessions.items() if other.identity == session.identity), None)


def _nothing_detected(inactive: Mapping[str, str], config_file: str | os.PathLike[str] | None) -> str:
    where = os.fspath(config_file) if config_file is not None else os.environ.get(CONFIG_VARIABLE) or "~/.ssh/config"
    if not inactive:
        return f"{where} names no hosts: add one, e.g.\n  Host my-host\n    HostName 192.0.2.1\n    User me"
    lines = [f"  {host}: {reason}" for host, reason in inactive.items()]
    return "\n".join([f"none of the hosts in {where} can be used:", *lines])


def choose_hosts(
    active: Sequence[str],
    inactive: Mapping[str, str],
    include_hosts: str | Iterable[str] | None,
    exclude_hosts: str | Iterable[str] | None,
) -> list[str]:
    """Return the hosts that are asked for by name or pattern, in the order of the configuration.

    Args:
        active: The hosts that can be used.
        inactive: Those that cannot, with the reasons.
        include_hosts: Names, sets such as ``node[01-12]``, or patterns such as ``gpu-*``.
        exclude_hosts: The same.

    Raises:
        ValueError: If both are given, or a name is not known, or a host that is to be included cannot be used, or a set
            makes no sense.
    """
    included, excluded = listed(include_hosts), listed(exclude_hosts)
    if included and excluded:
        raise ValueError("either include_hosts or exclude_hosts can be given, not both")
    names = [name for text in included or excluded for name in ([text] if text in active else selected(text))]
    for name in names:
        if name in active or is_pattern(name):
            continue
        if name not in inactive:
            raise ValueError(f"{name!r} was not detected{suggestion(name, active)}")
        if included:
            raise ValueError(f"{name!r} cannot be used: {inactive[name]}")
    if included:
        return [host for host in active if any(fits(host, text) for text in included)]
    return [host for host in active if not any(fits(host, text) for text in excluded)]


async def select(sessions: Sequence[HostSession], wanted: HostFilter) -> list[HostSession]:
    """Return the sessions whose hosts meet conditions.

    Args:
        sessions: The candidates, which are all asked at once.
        wanted: The conditions.

    Raises:
        NoRuntimesError: If none does; says for each why not.
    """
    reasons = await asyncio.gather(*(_why_not(session, wanted) for session in sessions))
    chosen = [session for session, reason in zip(sessions, reasons, strict=True) if reason is None]
    if not chosen:
        lines = [f"  {session.host}: {reason}" for session, reason in zip(sessions, reasons, strict=True)]
        raise NoRuntimesError("\n".join(["no runtime meets the conditions:", *lines]))
    return chosen


async def _why_not(session: HostSession, wanted: HostFilter) -> str | None:
    try:
        context = session.context(session.spec.env, Runtime.WORKING_DIR_ENV_VAR_NAME)
        return await unmet(session, context, wanted)
    except LazyclusterError as error:
        return str(error)


async def open_again(sessions: Sequence[HostSession], settings: GroupSettings) -> list[HostSession]:
    """Return further sessions on connections that are open, each with a working directory of its own.

    Args:
        sessions: The present ones.
        settings: Those of the new ones.
    """
    opening = [HostSession.open(settings.spec(session.host), session) for session in sessions]
    opened = await asyncio.gather(*opening, return_exceptions=True)
    errors = [item for item in opened if isinstance(item, BaseException)]
    good = [item for item in opened if isinstance(item, HostSession)]
    if errors:
        await close_all(good)
        unusable = [error for error in errors if isinstance(error, InvalidRuntimeError)]
        raise InvalidRuntimesError(unusable) if len(unusable) == len(errors) > 1 else errors[0]
    return good
