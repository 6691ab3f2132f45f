"""Errors of calls on hosts about files that are on the manager."""

from __future__ import annotations

import errno
import os

__all__ = ["path_hint", "tell_path"]

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM)


def path_hint(error: object) -> str:
    """Return the next step for an error of a host about a path that this machine has; "" if it is another error.

    Args:
        error: The error.
    """
    if not isinstance(error, OSError) or not isinstance(error.filename, (str, bytes, os.PathLike)):
        return ""
    here = error.errno in _NOT_THERE and os.path.lexists(error.filename)
    here = here or (error.errno in _NOT_ALLOWED and os.access(error.filename, os.R_OK))
    if not here:
        return ""
    return (
        "this machine has that file, but functions see the files of their host: send it there with send_file(), "
        "or read it here and pass what it holds"
    )


def tell_path(error: object) -> None:
    """Have an error of a host that is raised here say so in its text, if it is about a path that this machine has."""
    hint = path_hint(error)
    if hint and isinstance(error, OSError) and isinstance(error.strerror, str) and hint not in error.strerror:
        error.strerror += f" ({hint})"
        error.args = (error.errno, error.strerror)
