"""A process without what only Linux has, as on a Mac: its calls, constants and /proc."""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import functools
import io
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

_ATTRIBUTES: dict[str, list[tuple[Any, str]]] = {
    "pidfd": [(os, "pidfd_open")],
    "peer credentials": [(socket, "SO_PEERCRED")],
    "pipe size": [(fcntl, "F_SETPIPE_SZ")],
    "noexec": [(os, "ST_NOEXEC")],
    "extended attributes": [(os, "listxattr"), (os, "getxattr"), (os, "setxattr")],
    "memfd": [(os, "memfd_create")],
    "sigtimedwait": [(signal, "sigtimedwait"), (signal, "sigwaitinfo")],
}
_READERS = [
    (builtins, "open"), (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir"), (os, "readlink"), (os, "stat"),
]  # fmt: skip

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


def interpreter(path: Path) -> str:
    """Write a program that runs an agent without all of it, and without subreapers; return its path."""
    tests = str(Path(__file__).parent)
    path.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {tests!r})\nimport otherunix\ndel sys.path[0]\n"
        "otherunix.deny_for_good()\nexec(sys.argv[2])\n"
    )
    path.chmod(0o755)
    return str(path)


def deny_for_good() -> None:
    """Take everything away from this process and its forked children."""
    for module, name in (place for places in _ATTRIBUTES.values() for place in places):
        if hasattr(module, name):
            delattr(module, name)
    for module, name in _READERS:
        setattr(module, name, _without_proc(getattr(module, name)))
    ctypes.CDLL = _Library  # type: ignore[assignment, misc]


class _Library:
    """A C library without any of the functions that are asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass
