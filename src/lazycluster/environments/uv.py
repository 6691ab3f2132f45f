"""Running uv, which resolves, builds and installs: https://docs.astral.sh/uv."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lazycluster._extras import install_command
from lazycluster.exceptions import EnvironmentBuildError

from .index import IndexSettings, hide
from .problems import explained
from .programs import run_here

__all__ = ["MANAGER", "find_uv", "run_uv", "uv_version"]

MANAGER = "manager"


@functools.lru_cache(maxsize=1)
def find_uv() -> str:
    """Return the path of uv on this machine.

    Raises:
        EnvironmentBuildError: If there is none.
    """
    with contextlib.suppress(ImportError, OSError):
        return str(importlib.import_module("uv").find_uv_bin())
    found = shutil.which("uv")
    if found is None:
        raise EnvironmentBuildError(
            MANAGER,
            "uv, which makes environments, is not installed here",
            "uv",
            install_command("environments"),
        )
    return found


@functools.lru_cache(maxsize=1)
def _stamp() -> tuple[str, int]:
    path = Path(find_uv()).resolve()
    return str(path), path.stat().st_mtime_ns


async def uv_version() -> str:
    """Return the version of uv on this machine."""
    _stamp()
    global _version
    if not _version:
        _version = (await run_uv(["--version"], IndexSettings())).split()[1]
    return _version


_version = ""


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
    variables = {**os.environ, **settings.env, **(env or {}), "UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    variables.pop("VIRTUAL_ENV", None)
    if settings.ca_file:
        variables.setdefault("SSL_CERT_FILE", settings.ca_file)
    try:
        ended = await run_here([find_uv(), *arguments], variables, stdin=stdin, cwd=cwd)
    except OSError as error:
        raise EnvironmentBuildError(MANAGER, f"uv cannot be run: {error}", "uv", "install it anew") from error
    if ended.status != 0:
        raise explained(MANAGER, what or f"uv {arguments[0]}", hide(ended.errors), package)
    return ended.output
