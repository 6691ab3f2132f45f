"""A program that tells which software is on a host, for engines whose own programs do not."""

from __future__ import annotations

import shutil
import sys

from . import messages


def main() -> None:
    """Tell it, and end."""
    settings = messages.read_settings()
    programs = {name: shutil.which(name) for name in settings["programs"]}
    packages = messages.versions(settings["packages"])
    version = list(sys.version_info[:3])
    messages.emit("versions", python=version, executable=sys.executable, packages=packages, programs=programs)
    messages.emit("ready")
