"""The installer on a host: the manager's own program where it runs there, else the one for the host's platform."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lazycluster.exceptions import EnvironmentBuildError
from lazycluster.ssh import transfer
from lazycluster.utils import private_directory

from .index import IndexSettings
from .plan import Target
from .uv import find_uv, run_uv

if TYPE_CHECKING:
    from .build_host import BuildHost

__all__ = ["send_uv"]


async def send_uv(place: BuildHost, target: Target, root: str, settings: IndexSettings) -> str:
    """Return the path of uv on a host, in the manager's version; it is sent if it is not there.

    Raises:
        EnvironmentBuildError: If there is none for the host's platform.
    """
    here, version = await find_uv()
    path = f"{root}/uv/{version}/uv"
    if target.system == sys.platform and target.machine == os.uname().machine:
        sent = await transfer.send(place.connection, here, path, cwd="", env={})
        if sent.skipped:  # it has run there before
            return path
        try:
            await place.run([path, "--version"], {}, f"running {path}")
            return path
        except EnvironmentBuildError as error:
            await place.connection.request("remove", path=path)
            if "Permission denied" in error.output or target.system != "linux":
                raise
    path = f"{root}/uv/{version}-static/uv"
    await transfer.send(place.connection, await _fetched(version, target, settings), path, cwd="", env={})
    await place.run([path, "--version"], {}, f"running {path}")
    return path


async def _fetched(version: str, target: Target, settings: IndexSettings) -> Path:
    """Return uv for another platform: on Linux the one that needs no libraries."""
    platform = target.platform if target.system != "linux" else f"{target.machine}-unknown-linux-musl"
    store = private_directory("environments", "uv", f"{version}-{platform}")
    binary = store / "bin" / "uv"
    if not binary.is_file():
        arguments = ["pip", "install", "--quiet", "--no-deps", "--target", str(store), "--python-platform", platform]
        await run_uv([*arguments, f"uv=={version}"], settings, what=f"fetching uv for {platform}")
    return binary
