"""This process without what only Linux has, as a Mac's manager is: its calls, constants and /proc."""

from __future__ import annotations

import builtins
import fcntl
import functools
import io
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

_ATTRIBUTES: dict[str, list[tuple[Any, str]]] = {
    "pidfd": [(os, "pidfd_open")],
    "peer credentials": [(socket, "SO_PEERCRED")],
    "pipe size": [(fcntl, "F_SETPIPE_SZ")],
    "noexec": [(os, "ST_NOEXEC")],
    "extended attributes": [(os, "listxattr"), (os, "getxattr"), (os, "setxattr")],
    "memfd": [(os, "memfd_create")],
}
_READERS = [(builtins, "open"), (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir"), (os, "readlink")]

KINDS = [*_ATTRIBUTES, "/proc"]
"""What can be denied."""


def deny(patch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Take something away from this process, the event loop's thread included.

    Args:
        patch: Gives it back.
        *kinds: Some of `KINDS`; none: all of them.
    """
    for kind in kinds or KINDS:
        for module, name in _ATTRIBUTES.get(kind, ()):
            patch.delattr(module, name)
    if not kinds or "/proc" in kinds:
        for module, name in _READERS:
            patch.setattr(module, name, _without_proc(getattr(module, name)))


def _without_proc(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def reader(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsencode(path).startswith(b"/proc"):
            raise FileNotFoundError(2, os.strerror(2), path)
        return function(path, *args, **kwargs)

    return reader
