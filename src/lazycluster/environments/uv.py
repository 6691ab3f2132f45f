"""Running uv, which resolves, builds and installs: https://docs.astral.sh/uv."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lazycluster.agent.ownership import make
from lazycluster.core.extras import install_command
from lazycluster.exceptions import EnvironmentBuildError
from lazycluster.utils import Environment

from .index import IndexSettings, hide
from .subprocesses import run_here
from .uv_errors import explained

__all__ = ["LOWEST", "MANAGER", "RETRIES", "Uv", "find_uv", "run_uv"]

MANAGER = "manager"
LOWEST = (0, 11, 15)
"""The version that uv must have; SECURITY.md says what is wrong with older ones."""

# It becomes the name of a directory, and a part of requirements.
_SAYS = re.compile(r"uv (\d{1,9}\.\d{1,9}\.\d{1,9}[0-9A-Za-z.+-]{0,40})(?:\s|$)", re.ASCII)

_chosen: Uv | None = None

RETRIES = {"UV_HTTP_RETRIES": "1", "UV_HTTP_CONNECT_TIMEOUT": "5"}
"""Variables for uv where there is another way if the index cannot be reached; those of the user count more."""


class Uv(NamedTuple):
    """A program uv on this machine.

    Attributes:
        path: Its path.
        version: Its version.
    """

    path: str
    version: str


async def find_uv() -> Uv:
    """Return the uv that is used: that of its package beside this interpreter, else one on the PATH.

    Raises:
        EnvironmentBuildError: If there is none, or only such as are too old.
    """
    global _chosen
    if _chosen is not None:
        return _chosen
    refused = []
    for path in _installed():
        version = await _version_of(path)
        if _numbers(version) >= LOWEST:
            await _check_cache(path)
            _chosen = Uv(path, version)
            return _chosen
        refused.append(f"{path} is uv {version}")
    lowest = ".".join(map(str, LOWEST))
    problem = f"{' and '.join(refused)}; it must be {lowest} or newer" if refused else "uv is not installed here"
    raise EnvironmentBuildError(MANAGER, problem, "uv", install_command("environments"))


def _installed() -> Iterator[str]:
    with contextlib.suppress(ImportError, OSError):
        yield str(importlib.import_module("uv").find_uv_bin())
    on_path = shutil.which("uv")
    if on_path is not None:
        yield on_path


async def _version_of(path: str) -> str:
    try:
        ended = await run_here([path, "--version"], {**os.environ, "NO_COLOR": "1"})
    except OSError as error:
        raise _not_run(error) from None
    found = _SAYS.match(ended.output)
    if ended.status != 0 or found is None:
        said = hide(ended.output or ended.errors)
        raise EnvironmentBuildError(MANAGER, f"{path} does not tell its version", "uv", "install it anew", said)
    return found[1]


async def _check_cache(path: str) -> None:
    """Make sure that nobody else can put something into uv's own cache, whatever names it: what it builds is run."""
    try:
        ended = await run_here([path, "cache", "dir"], {**os.environ, "NO_COLOR": "1"})
    except OSError as error:
        raise _not_run(error) from None
    directory = ended.output.strip()
    if ended.status != 0 or not directory:
        return  # it says by itself what is wrong, when it is used
    try:
        make(directory, 0o700, Environment.trust_group)
    except PermissionError as error:
        problem = f"uv's cache {directory} cannot be used: {error.filename}: {error.strerror}"
        raise EnvironmentBuildError(MANAGER, problem, "uv", "set UV_CACHE_DIR to a directory of your own") from None
    except OSError:
        return  # the same


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _not_run(error: OSError) -> EnvironmentBuildError:
    return EnvironmentBuildError(MANAGER, f"uv cannot be run: {error}", "uv", "install it anew")


async def run_uv(
    arguments: Sequence[str],
    settings: IndexSettings,
    *,
    stdin: str = "",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    what: str = "",
    package: str = "",
) -> str:
    """Run uv on this machine.

    Args:
        arguments: Its arguments.
        settings: Where packages come from.
        stdin: What it reads.
        cwd: Its working directory.
        env: Further environment variables.
        what: What it does, for the error message.
        package: The package that it is about.

    Returns:
        What it printed.

    Raises:
        EnvironmentBuildError: If it fails.
    """
    own = {name: value for name, value in (env or {}).items() if name not in RETRIES or name not in os.environ}
    variables = {**os.environ, **settings.env, **own, "UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    variables.pop("VIRTUAL_ENV", None)
    if settings.ca_file:
        variables.setdefault("SSL_CERT_FILE", settings.ca_file)
    try:
        ended = await run_here([(await find_uv()).path, *arguments], variables, stdin=stdin, cwd=cwd)
    except OSError as error:
        raise _not_run(error) from None
    if ended.status != 0:
        raise explained(MANAGER, what or f"uv {arguments[0]}", hide(ended.errors), package)
    return ended.output
