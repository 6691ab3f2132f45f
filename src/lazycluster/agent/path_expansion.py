"""What a path means, on the host and on the manager."""

from __future__ import annotations

import os
import re
from typing import Mapping

_VARIABLE = re.compile(rb"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def home(env: Mapping[str, str]) -> bytes:
    """Return the user's home directory."""
    return _raw(env.get("HOME", "")) or os.path.expanduser(b"~")


def expand(path: bytes, env: Mapping[str, str]) -> bytes:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` replaced as a shell does.

    A variable that is not set stays as it is, since a dollar sign may stand in a file's name.
    """

    def value(match: "re.Match[bytes]") -> bytes:
        name = (match.group(1) or match.group(2)).decode("ascii")
        return _raw(env[name]) if name in env else os.environb.get(_raw(name), match.group(0))

    # First the tilde: one that comes out of a variable is a name, as in a shell.
    if path == b"~" or path.startswith(b"~/"):
        return home(env) + _VARIABLE.sub(value, path[1:])
    if path.startswith(b"~"):
        path = os.path.expanduser(path)
    return _VARIABLE.sub(value, path)


def absolute(path: bytes, cwd: bytes, env: Mapping[str, str]) -> bytes:
    """Return an absolute path: expanded, relative to `cwd`, which is relative to the home directory."""
    return os.path.join(home(env), expand(cwd, env), expand(path, env))


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
