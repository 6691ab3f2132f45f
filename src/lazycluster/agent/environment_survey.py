"""Survey of a host for an environment: the right interpreter, a way to the packages. Runs in a child of the agent."""

from __future__ import annotations

import glob
import os
import socket
import threading
import time
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Set, Tuple

from .interpreters import interpreter_directories, version_of

_CONNECT_LIMIT = 2.0  # seconds


def survey(
    wanted: Sequence[int], addresses: Sequence[Sequence[Any]], env: Mapping[str, str], root: str
) -> Dict[str, Any]:
    """Return what there is.

    Args:
        wanted: The minor version of Python; empty if none is looked for.
        addresses: What has to be reached, as (host, port).
        env: Variables that hold beside the host's own.
        root: Where environments are kept.
    """
    os.environ.update(env)
    reached = _Attempts(addresses)
    found = list(matching(wanted, root)) if wanted else []
    return {
        "interpreters": [{"path": path, "version": version} for path, version in found],
        "reachable": reached.result(),
    }


def matching(wanted: Sequence[int], root: str) -> Iterator[Tuple[str, List[int]]]:
    """Yield (path, version) of the first interpreter of a minor version; it is looked for in more directories.

    Those that can be seen to be virtual environments are passed over: they may go at any time.
    """
    name = "python{}.{}".format(*wanted)
    near = [
        path for directory in interpreter_directories() for path in (directory + "/" + name, directory + "/python3")
    ]
    far = [directory + "/" + name for directory in _far_directories(root)]
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
            version, _ = version_of(path)
            if version[:2] == list(wanted):
                yield path, version
                return


def _far_directories(root: str) -> List[str]:
    home = glob.escape(os.path.expanduser("~"))
    roots = ["/opt", "/usr/local", "/usr/lib", "/srv", "/apps", "/sw", "/software", "/scratch", "/data", home]
    found = [glob.escape(root) + "/python/*/bin"]
    found += ["{}/{}/bin".format(top, depth) for top in roots for depth in ("*", "*/*", "*/*/*")]
    found += ["{}/{}/bin".format(home, depth) for depth in (".*", ".*/*", ".asdf/installs/python/*")]
    return found + [
        home + "/.local/share/mise/installs/python/*/bin",
        "/home/linuxbrew/.linuxbrew/bin",
        "/usr/lib64/*/bin",
    ]


class _Attempts:
    """Attempts to connect to addresses, all at once."""

    def __init__(self, addresses: Sequence[Sequence[Any]]) -> None:
        self._found: List[List[Any]] = []
        self._threads = [threading.Thread(target=self._attempt, args=tuple(one), daemon=True) for one in addresses]
        self._deadline = time.monotonic() + _CONNECT_LIMIT
        for thread in self._threads:
            thread.start()

    def _attempt(self, host: str, port: int) -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_LIMIT).close()
            self._found.append([host, port])
        except OSError:
            pass

    def result(self) -> List[List[Any]]:
        """Return those that answer within a moment."""
        for thread in self._threads:  # the name server may take longer than any connecting
            thread.join(max(0.0, self._deadline - time.monotonic()))
        return list(self._found)
