"""A virtual environment with the base dependencies of this package alone, as after a plain `pip install .`."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import lazycluster


def make(folder: Path) -> Path:
    """Make one from what is installed here, so that it needs no index; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in {"lazycluster"} | _needed("lazycluster"):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or [] if file.suffix != ".pth"} - {"..", "__pycache__"}
        for top in tops:
            (site / top).symlink_to(str(distribution.locate_file(top)))
    (site / "lazycluster.pth").write_text(str(Path(lazycluster.__file__).parents[1]))
    return folder / "bin" / "python"


def _needed(name: str) -> set[str]:
    """The distributions that one needs, without those of extras, all the way down."""
    found: set[str] = set()
    for text in metadata.requires(name) or []:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            found |= {wanted.name} | _needed(wanted.name)
    return found
