"""Python interpreters of a host, and the packages of one of them. Runs in a zygote's child.

Its imports are in the functions: every zygote loads this module, and few are ever asked.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from . import bytecode

_CONDA = ("~/miniconda3", "~/anaconda3", "~/miniforge3", "~/mambaforge")
# Patterns of the directories in which interpreters usually are, beside those on the PATH.
USUAL_DIRECTORIES = (
    *("/usr/bin", "/usr/local/bin", "/opt/*/bin", "/opt/conda/envs/*/bin"),
    *(conda + directory for conda in _CONDA for directory in ("/bin", "/envs/*/bin")),
    *("~/.local/bin", "~/.pyenv/versions/*/bin", "~/.local/share/uv/python/*/bin"),
)
_PROBE = "import sys; print(*sys.version_info[:3]); print(sys.prefix)"
_PROBE_LIMIT = 5.0  # seconds


def answer(request: Dict[str, Any]) -> Dict[str, Any]:
    """Answer a question; `kind` says which."""
    if request["kind"] == "packages":
        return packages(request["names"])
    return {"interpreters": [{"path": path, "version": version} for path, version in interpreters()]}


def packages(names: Sequence[str]) -> Dict[str, Any]:
    """Return the versions of packages without importing them; None for one that is not installed."""
    from importlib import metadata

    found: Dict[str, Optional[str]] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    import sysconfig

    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")  # PEP 668: pip installs nothing there
    return {
        "version": list(sys.version_info[:3]),
        "executable": sys.executable,
        "managed": sys.prefix == sys.base_prefix and os.path.exists(marker),
        "packages": found,
        "bytecode": dict(bytecode.found),
    }


def interpreters() -> Iterator[Tuple[str, List[int]]]:
    """Yield (path, version) of each interpreter, those on the PATH first."""
    import glob
    import re

    seen: Set[Tuple[str, ...]] = set()
    for directory in interpreter_directories():
        for path in sorted(glob.glob(directory + "/python3*"), key=lambda name: (len(name), name)):
            file = (os.path.realpath(directory), os.path.realpath(path))
            # What pyenv puts on the PATH is a script that starts one of those that are found anyway.
            if file in seen or not re.match(r".*/python3(\.\d+)?$", path) or "/shims/" in path:
                continue
            seen.add(file)
            version, prefix = version_of(path)
            if version and (prefix,) not in seen:  # the same program is another interpreter in another environment
                seen.add((prefix,))
                yield path, version


def interpreter_directories() -> List[str]:
    """Return patterns of the directories in which interpreters usually are, those on the PATH first."""
    import glob

    home = glob.escape(os.path.expanduser("~"))
    found = [glob.escape(part) for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    return found + [home + usual[1:] if usual[0] == "~" else usual for usual in USUAL_DIRECTORIES]


def version_of(path: str) -> Tuple[List[int], str]:
    """Return version and prefix of an interpreter; no version if it does not work."""
    import subprocess

    try:
        done = subprocess.run(
            [path, "-Ic", _PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_PROBE_LIMIT
        )
        numbers, _, prefix = done.stdout.decode("utf-8", "replace").strip().partition("\n")
        return [int(part) for part in numbers.split()], prefix
    except (OSError, ValueError, subprocess.SubprocessError):
        return [], ""
