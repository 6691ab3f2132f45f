"""The packages that extras of this project bring. Package indexes have another project under its name."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from importlib import metadata

__all__ = ["install_command"]


def install_command(extra: str) -> str:
    """Return the command that gives this Python the packages of an extra.

    Args:
        extra: Its name in pyproject.toml.
    """
    packages = _requirements(extra)
    if packages:
        return f"{_installer()} {shlex.join(packages)}"
    return f"{_installer()} '.[{extra}]' in a checkout of lazycluster"


def _installer() -> str:
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):  # as in the environments that uv makes
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"


def _requirements(extra: str) -> list[str]:
    try:
        listed = metadata.requires("lazycluster") or []
    except metadata.PackageNotFoundError:  # it is used from its sources
        return []
    wanted = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    found = (line.partition(";") for line in listed)
    return [package.strip() for package, _, condition in found if wanted.search(condition)]
