"""What the tests of environments do on hosts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lazycluster import Runtime

ROOT = "~/.cache/lazycluster"


def connect(host: Any, environment: Any, **options: Any) -> Runtime:
    """Return a runtime with an environment."""
    settings = {"config_file": host._pool.config_file}
    return Runtime(host.name, connection_kwargs=settings, environment=environment, **options)


def version_of(name: str) -> Any:
    """Return what a package of `wheelhouse` says of itself; to be called on hosts."""
    return importlib.import_module(name).VERSION


def environments(host: Any) -> list[str]:
    """The environments that are there, and whatever else lies beside them."""
    folder = host.path(f"{ROOT}/envs")
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def prefix(host: Any) -> Path:
    """The directory of the only environment, as it is seen from here."""
    (name,) = environments(host)
    return Path(host.path(f"{ROOT}/envs/{name}"))


def everything(host: Any) -> str:
    """All files of the user's home, in one text."""
    return str(host.run(f"find {host.home} -type f -size -200k -print0 | xargs -0 cat -v").stdout)
