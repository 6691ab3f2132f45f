"""What a host has: Python interpreters, the packages of one of them, a network. Runs in a zygote's child.

Its imports are in the functions: every zygote loads this module, and few are ever asked.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

_CONDA = ("miniconda3", "anaconda3", "miniforge3", "mambaforge")
_PROBE = "import sys; print(*sys.version_info[:3]); print(sys.prefix)"
_PROBE_LIMIT = 5.0  # seconds
_CONNECT_LIMIT = 2.0  # seconds


def answer(request: Dict[str, Any]) -> Dict[str, Any]:
    """Answer a question; `kind` says which."""
    if request["kind"] == "packages":
        return packages(request["names"])
    if request["kind"] == "reachable":
        return {"reachable": reachable(request["addresses"])}
    wanted = request.get("wanted")
    found = interpreters() if wanted is None else matching(wanted)
    return {"interpreters": [{"path": path, "version": version} for path, version in found]}


def packages(names: Sequence[str]) -> Dict[str, Any]:
    """Return the versions of packages without importing them; None for one that is not installed."""
    from importlib import metadata

    found: Dict[str, Optional[str]] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {"version": list(sys.version_info[:3]), "executable": sys.executable, "packages": found}


def interpreters() -> Iterator[Tuple[str, List[int]]]:
    """Yield (path, version) of each interpreter, those on the PATH first."""
    import glob
    import re

    seen: Set[Tuple[str, ...]] = set()
    for directory in _places():
        for path in sorted(glob.glob(directory + "/python3*"), key=lambda name: (len(name), name)):
            file = (os.path.realpath(directory), os.path.realpath(path))
            # What pyenv puts on the PATH is a script that starts one of those that are found anyway.
            if file in seen or not re.match(r".*/python3(\.\d+)?$", path) or "/shims/" in path:
                continue
            seen.add(file)
            version, prefix = _version(path)
            if version and (prefix,) not in seen:  # the same program is another interpreter in another environment
                seen.add((prefix,))
                yield path, version


def matching(wanted: Sequence[int]) -> Iterator[Tuple[str, List[int]]]:
    """Yield (path, version) of the first interpreter of a minor version; it is looked for in more places.

    Those that can be seen to be virtual environments are passed over: they may go at any time.
    """
    import glob

    name = "python{}.{}".format(*wanted)
    near = [path for directory in _places() for path in (directory + "/" + name, directory + "/python3")]
    far = [directory + "/" + name for directory in _far_places()]
    seen: Set[str] = set()
    for pattern in near + far:
        for path in sorted(glob.glob(pattern)):
            real = os.path.realpath(path)
            environment = os.path.exists(os.path.join(os.path.dirname(os.path.dirname(path)), "pyvenv.cfg"))
            if environment:
                path = real
            if real in seen or "/shims/" in path:
                continue
            seen.add(real)
            version, _ = _version(path)
            if version[:2] == list(wanted):
                yield path, version
                return


def _far_places() -> List[str]:
    import glob

    home = glob.escape(os.path.expanduser("~"))
    roots = ["/opt", "/usr/local", "/usr/lib", "/srv", "/apps", "/sw", "/software", "/scratch", "/data", home]
    places = ["{}/{}/bin".format(root, depth) for root in roots for depth in ("*", "*/*", "*/*/*")]
    places += ["{}/{}/bin".format(home, depth) for depth in (".*", ".*/*", ".asdf/installs/python/*")]
    return places + [
        home + "/.local/share/mise/installs/python/*/bin",
        home + "/.cache/lazycluster/python/*/bin",
        "/home/linuxbrew/.linuxbrew/bin",
        "/usr/lib64/*/bin",
    ]


def reachable(addresses: Sequence[Sequence[Any]]) -> List[List[Any]]:
    """Return those addresses (host, port) that answer within a moment, tried all at once."""
    import socket
    import threading

    found: List[List[Any]] = []

    def attempt(host: str, port: int) -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_LIMIT).close()
            found.append([host, port])
        except OSError:
            pass

    threads = [threading.Thread(target=attempt, args=tuple(address), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_CONNECT_LIMIT)  # the name server may take longer
    return list(found)


def _places() -> List[str]:
    import glob

    home = os.path.expanduser("~")
    places = [glob.escape(part) for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    places += ["/usr/bin", "/usr/local/bin", "/opt/*/bin", "/opt/conda/envs/*/bin"]
    home = glob.escape(home)
    for conda in _CONDA:
        places += ["{}/{}/bin".format(home, conda), "{}/{}/envs/*/bin".format(home, conda)]
    return places + [
        home + "/.local/bin",
        home + "/.pyenv/versions/*/bin",
        home + "/.local/share/uv/python/*/bin",
    ]


def _version(path: str) -> Tuple[List[int], str]:
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
