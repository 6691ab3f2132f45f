"""Directories and paths on the host."""

from __future__ import annotations

import os

from .deletion import RefusedError
from .deletion import remove as delete
from .ownership import make
from .path_expansion import absolute, home

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Mapping

    from .session import RequestChannel

_OPEN = 0o755  # whatever the umask lets through, others may not write


def trusts_group(channel: RequestChannel) -> bool:
    """Return whether the user allows directories that their group may write to."""
    return bool(channel.params.get("trust_group"))


def meant(path: str, cwd: str, env: Mapping[str, str]) -> str:
    """Return the absolute path that is meant: see `expand.absolute`. It has no ``.`` and ``..`` in it.

    After a link, ``..`` is what it is to the system, and so to commands: the directory above the one that it leads to.
    """
    found = b"/"
    for part in absolute(os.fsencode(path), os.fsencode(cwd), env).split(b"/"):
        if part == b"..":
            found = os.path.dirname(os.path.realpath(found))
        elif part not in (b"", b"."):
            found = os.path.join(found, part)
    return os.fsdecode(found)


def _path(channel: RequestChannel) -> str:
    params = channel.params
    return meant(params["path"], params.get("cwd") or "", params.get("env") or {})


def mkdir(channel: RequestChannel) -> None:
    """Handle the request `mkdir`: make a directory and its parents; `checked`: nobody else may write to it."""
    path = _path(channel)
    if os.path.lexists(path) and not os.path.isdir(path):
        channel.fail("os", "not a directory: {}".format(path))
        return
    created = not os.path.isdir(path)
    if channel.params.get("checked"):
        make(path, _OPEN, trusts_group(channel))
    else:
        os.makedirs(path, exist_ok=True)
    channel.result(path=path, created=created, writable=os.access(path, os.W_OK | os.X_OK))


def mkdtemp(channel: RequestChannel) -> None:
    """Handle the request `mkdtemp`: make a directory that is removed when the agent ends."""
    path = os.path.join(channel.agent.directory, "tmp-" + os.urandom(4).hex())
    os.mkdir(path, 0o700)
    channel.result(path=path)


def remove(channel: RequestChannel) -> None:
    """Handle the request `remove`: remove a directory with all that it holds, or (unless `folder` is set) a file.

    What must not go is the error "value": see `deletion.remove`. So must the working directory `cwd`, the paths `kept`
    and the agent's own directory, and what these are in.
    """
    params = channel.params
    env = params.get("env") or {}
    kept = {"the home directory": os.fsdecode(home(env)), "the directory of this connection": channel.agent.directory}
    kept.update(params.get("kept") or {})
    if params.get("cwd"):
        kept["the working directory"] = meant("", params["cwd"], env)
    path = _path(channel)
    try:
        error = delete(path, kept, bool(params.get("folder")))
    except RefusedError as refused:
        channel.fail("value", str(refused))
        return
    if error is not None:
        raise error
    channel.result(path=path)


def expanded(channel: RequestChannel) -> None:
    """Handle the request `expand`: tell what a path means, and what is there."""
    path = _path(channel)
    try:
        inode = os.stat(path)
        channel.result(path=path, directory=os.path.isdir(path), identity=[inode.st_dev, inode.st_ino])
    except FileNotFoundError:
        channel.result(path=path, directory=None, identity=None)
