"""The packages that extras of this project bring. Package indexes have another project under its name."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Sequence

__all__ = ["install_command", "pip_command"]


def install_command(extra: str) -> str:
    """Return the command that gives this Python the packages of an extra.

    Args:
        extra: Its name in pyproject.toml.
    """
    packages = _requirements(extra)
    if packages:
        return f"{_installer()} {shlex.join(packages)}"
    return f"{_installer()} '.[{extra}]' in a checkout of lazycluster"


def pip_command(executable: str, is_managed: bool, packages: Sequence[str]) -> str:
    """Return what installs packages for a host's interpreter.

    Args:
        executable: The interpreter.
        is_managed: Whether pip refuses to install into it, since it belongs to the system (PEP 668).
        packages: The packages.
    """
    if not is_managed:
        return f"{executable} -m pip install {' '.join(packages)}"
    return (
        f"{executable} -m venv ~/venv && ~/venv/bin/pip install {' '.join(packages)}, and then "
        'python="~/venv/bin/python3" (pip installs nothing into a Python of the system)'
    )


def _installer() -> str:
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):  # as in the environments that uv makes
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"


def _requirements(extra: str) -> list[str]:
    from importlib import metadata

    try:
        listed = metadata.requires("lazycluster") or []
    except metadata.PackageNotFoundError:  # it is used from its sources
        return []
    wanted = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    found = (line.partition(";") for line in listed)
    return [package.strip() for package, _, condition in found if wanted.search(condition)]
