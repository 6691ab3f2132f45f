"""The interpreter that an environment is made with: one that the host has, else one that is sent there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lazycluster.exceptions import AgentError, EnvironmentBuildError
from lazycluster.ssh import transfer
from lazycluster.utils import private_directory

from .index import IndexSettings
from .plan import Target
from .uv import run_uv

if TYPE_CHECKING:
    from .build_host import BuildHost

__all__ = ["base_interpreter"]

logger = logging.getLogger("lazycluster")

_ANSWER_LIMIT, _SEARCH_LIMIT = 60.0, 120.0  # seconds


async def base_interpreter(place: BuildHost, target: Target, root: str, settings: IndexSettings, found: str) -> str:
    """Return the path of an interpreter of the wanted minor version on a host.

    Args:
        place: The host.
        target: What is wanted.
        root: Where environments are kept there.
        settings: Where packages come from.
        found: One that the host has; empty if it has none.

    Raises:
        EnvironmentBuildError: If the host has none, and none can be had.
    """
    if place.python is not None:
        return await _named(place, target, place.python)
    if found:
        return found
    logger.info("%s: has no Python %s; one is fetched", place.host, target.version)
    try:
        return await _sent(place, target, root, settings)
    except EnvironmentBuildError as error:
        raise await _none(place, target, error) from error


async def _named(place: BuildHost, target: Target, python: str) -> str:
    try:
        answer = await place.connection.request(
            "packages", within=_ANSWER_LIMIT, python=python, env=dict(place.env), names=[]
        )
    except AgentError as error:
        raise EnvironmentBuildError(
            place.host, error.message, "", 'name a Python that is there: python="..."'
        ) from None
    if tuple(answer["version"][:2]) != target.python:
        version = ".".join(map(str, answer["version"]))
        raise EnvironmentBuildError(
            place.host,
            f"{python} is Python {version}, but the environment is for {target.version}",
            "python",
            f'name a Python {target.version} with python=, or choose EnvironmentSpec(..., python="{version[:4]}")',
        )
    return str(answer["executable"])


async def _sent(place: BuildHost, target: Target, root: str, settings: IndexSettings) -> str:
    """Have uv fetch an interpreter for the host's platform to the manager, and send it."""
    system = {"linux": "linux", "darwin": "macos"}.get(target.system, target.system)
    libc = {"glibc": "gnu", "musl": "musl"}.get(target.libc, "none")
    name = f"cpython-{target.version}-{system}-{target.machine}-{libc}"
    store = private_directory("environments", "python") / name
    arguments = ["python", "install", "--no-bin", "--install-dir", str(store), name]
    await run_uv(arguments, settings, what=f"fetching Python {target.version}")
    folder = next((path for path in sorted(store.glob("cpython-*")) if path.is_dir() and not path.is_symlink()), None)
    if folder is None:
        raise EnvironmentBuildError(place.host, f"uv fetched no Python {target.version}", "python")
    path = f"{root}/python/{folder.name}"
    await transfer.send(place.connection, folder, path, cwd="", env={})
    return f"{path}/bin/python{target.version}"


async def _none(place: BuildHost, target: Target, error: EnvironmentBuildError) -> EnvironmentBuildError:
    answer = await place.connection.request("interpreters", within=_SEARCH_LIMIT, env=dict(place.env))
    found = answer["interpreters"]
    have = ", ".join(f"{'.'.join(map(str, one['version']))} ({one['path']})" for one in found) or "none"
    return EnvironmentBuildError(
        place.host,
        f"no Python {target.version} was found; the host has: {have}. It cannot be fetched, either: {error.problem}",
        "python",
        f"install Python {target.version} there, name its path with python=, or use another version: "
        'EnvironmentSpec(..., python="3.x")',
        error.output,
    )
