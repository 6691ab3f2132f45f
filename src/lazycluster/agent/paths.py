"""Directories and paths on the host."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from typing import Mapping

from .session import Channel

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def expand(path: str, cwd: str, env: Mapping[str, str]) -> str:
    """Return an absolute path: `~`, `~user`, `$NAME` and `${NAME}` as in a shell, relative to `cwd`.

    A variable that is not set stays as it is, since a dollar sign may stand in a file's name.
    """

    def value(match: "re.Match[str]") -> str:
        name = match.group(1) or match.group(2)
        return env.get(name, os.environ.get(name, match.group(0)))

    path = _VARIABLE.sub(value, path)
    home = env.get("HOME") or os.path.expanduser("~")
    if path == "~" or path.startswith("~/"):
        path = home + path[1:]
    return os.path.normpath(os.path.join(home, cwd, os.path.expanduser(path)))


def _path(channel: Channel) -> str:
    params = channel.params
    return expand(params["path"], params.get("cwd") or "", params.get("env") or {})


def mkdir(channel: Channel) -> None:
    """Handle the request `mkdir`: make a directory and its parents."""
    path = _path(channel)
    created = not os.path.isdir(path)
    os.makedirs(path, exist_ok=True)
    channel.result(path=path, created=created, writable=os.access(path, os.W_OK | os.X_OK))


def mkdtemp(channel: Channel) -> None:
    """Handle the request `mkdtemp`: make a directory that is removed when the agent ends."""
    channel.result(path=tempfile.mkdtemp(prefix="tmp-", dir=channel.agent.directory))


def remove(channel: Channel) -> None:
    """Handle the request `remove`: remove a directory with all that it holds, or a file."""
    path = _path(channel)
    if path in ("/", os.path.expanduser("~")):
        channel.fail("value", "{} is not removed: it is too much".format(path))
        return
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
    channel.result(path=path)


def expanded(channel: Channel) -> None:
    """Handle the request `expand`: tell what a path means, and what is there."""
    path = _path(channel)
    try:
        inode = os.stat(path)
        channel.result(path=path, directory=os.path.isdir(path), identity=[inode.st_dev, inode.st_ino])
    except FileNotFoundError:
        channel.result(path=path, directory=None, identity=None)
