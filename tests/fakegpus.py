"""A stand-in for `nvidia-smi`: the machines of the tests have no GPU. Its answers have the form of the real one's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NAME = "NVIDIA A100-SXM4-40GB"

_SCRIPT = """#!/bin/sh
here={directory}
echo "$*" >> "$here/calls" 2>/dev/null
case "$*" in
*mig.mode.current*) if [ -e "$here/old" ]; then
        echo 'Field "mig.mode.current" is not a valid field to query.'; exit 2
    fi; sed 's/$/, Disabled/; s/\\(.*\\)#divided, Disabled/\\1, Enabled/' "$here/gpus" ;;
*--query-gpu=*) cat "$here/gpus" ;;
*--query-compute-apps=*) cat "$here/apps" ;;
-L) cat "$here/list" ;;
*) echo "what is $*?"; exit 6 ;;
esac
"""


def uuid(index: int) -> str:
    """Return the identity of a GPU."""
    return f"GPU-0000000{index}-aaaa-bbbb-cccc-dddddddddddd"


def row(index: int, used: int | str = 3, *, divided: bool = False) -> str:
    """Return what is said of a GPU."""
    return f"{index}, {NAME}, {uuid(index)}, 40960, {used}, 0, 550.54.15" + ("#divided" if divided else "")


def stand_in(
    directory: Path, gpus: int | Sequence[str] = 2, apps: Sequence[str] = (), parts: str = "", at: str = ""
) -> Path:
    """Write a program `nvidia-smi` into a directory.

    Args:
        directory: The directory, which is made.
        gpus: How many GPUs it tells of, or a `row` for each.
        apps: The identities of the GPUs that programs compute on.
        parts: What it lists with -L.
        at: The path of the directory where the program runs, if it is another there.
    """
    directory.mkdir(exist_ok=True)
    rows = [row(index) for index in range(gpus)] if isinstance(gpus, int) else list(gpus)
    for name, lines in (("gpus", rows), ("apps", apps)):
        (directory / name).write_text("".join(line + "\n" for line in lines))
    (directory / "list").write_text(parts)
    return program(directory, _SCRIPT.format(directory=at or directory))


def program(directory: Path, text: str) -> Path:
    """Write any program by the name of nvidia-smi; returns the directory."""
    directory.mkdir(exist_ok=True)
    path = directory / "nvidia-smi"
    path.write_text(text)
    path.chmod(0o755)
    return directory
