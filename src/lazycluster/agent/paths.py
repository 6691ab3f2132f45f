"""Directories and paths on the host."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Mapping

from .expand import absolute
from .session import Channel


def meant(path: str, cwd: str, env: Mapping[str, str]) -> str:
    """Return the absolute path that is meant: see `expand.absolute`."""
    return os.fsdecode(os.path.abspath(absolute(os.fsencode(path), os.fsencode(cwd), env)))


def _path(channel: Channel) -> str:
    params = channel.params
    return meant(params["path"], params.get("cwd") or "", params.get("env") or {})


def mkdir(channel: Channel) -> None:
    """Handle the request `mkdir`: make a directory and its parents."""
    path = _path(channel)
    if os.path.lexists(path) and not os.path.isdir(path):
        channel.fail("os", "not a directory: {}".format(path))
        return
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
