"""A file from which another process of the same user connects to a cluster: a notebook, say.

It holds the secrets of the cluster. Whoever can read it can run anything on the cluster's hosts, so it is made for its
owner's eyes only, and is not read if somebody else could have written it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .exceptions import ClusterError

__all__ = ["read", "remove", "write"]

_FORMAT = 1
_MOST = 1024 * 1024


def write(path: str | os.PathLike[str], engine: str, content: Mapping[str, Any], owner: str) -> Path:
    """Write a file that only its owner can read, in the place of what was there.

    Args:
        path: Where.
        engine: The name of the cluster's class.
        content: What is needed to connect.
        owner: What the cluster is told by from all others.

    Returns:
        The absolute path.

    Raises:
        OSError: If it cannot be written.
    """
    file = Path(path).expanduser().absolute()
    document = {"format": _FORMAT, "engine": engine, "owner": owner, **content}
    fd, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)  # mode 0600
    try:
        with os.fdopen(fd, "w") as stream:
            json.dump(document, stream, indent=2)
            stream.write("\n")
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return file


def read(path: str | os.PathLike[str], engine: str) -> dict[str, Any]:
    """Read what another process has written.

    Args:
        path: The file.
        engine: The name of the cluster's class.

    Returns:
        What was written.

    Raises:
        ClusterError: If there is no such file, it is not this user's own, others may read it, or it is of another kind.
    """
    file = Path(path).expanduser()
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ClusterError(
            f"there is no connection file {file}\n  Next step: see whether the cluster still runs; it goes with it"
        ) from None
    except OSError as error:
        raise ClusterError(f"the connection file {file} cannot be read: {error.strerror}") from error
    try:
        _check(file, os.fstat(fd))
        text = os.read(fd, _MOST)
    finally:
        os.close(fd)
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ClusterError(f"{file} is no connection file of this version of lazycluster")
    if document.get("engine") != engine:
        raise ClusterError(f"{file} is of a {document.get('engine')}, not of a {engine}")
    return document


def _check(file: Path, inode: os.stat_result) -> None:
    if not stat.S_ISREG(inode.st_mode):
        raise ClusterError(f"{file} is no file")
    if inode.st_uid != os.geteuid():
        raise ClusterError(f"the connection file {file} belongs to another user: it is not trusted")
    if inode.st_mode & 0o077:
        raise ClusterError(
            f"others can read the connection file {file}, and its secrets\n"
            f"  Next step: end the cluster and start a new one; keep its file to yourself (chmod 600)"
        )


def remove(path: Path, owner: str) -> None:
    """Remove a file that a cluster has written, unless another cluster's has taken its place."""
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and document.get("owner") == owner:
            path.unlink()
