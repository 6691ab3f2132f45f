"""Descriptors that a forked child must not hold: ends of streams, whose end the other sides wait for.

`multiprocessing` forks, on Linux. A child may outlive this process, and what it has inherited stays open as long: ssh
and the agents would not see that nobody is there any more, and a port or a connection would not close.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["close_in_children"]

_ours: dict[int, tuple[int, int]] = {}


def close_in_children(*fds: int) -> None:
    """Have descriptors closed in children that are forked from now on.

    Nobody has to say when they are closed here: a file that comes to have the number of one is told from it.
    """
    for fd in fds:
        _ours[fd] = _identity(fd)


def _identity(fd: int) -> tuple[int, int]:
    inode = os.fstat(fd)
    return inode.st_dev, inode.st_ino


def _fill(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if null != fd:
        os.dup2(null, fd, inheritable=False)
        os.close(null)


def _in_child() -> None:
    for fd, identity in _ours.items():
        with contextlib.suppress(OSError):
            if _identity(fd) == identity:
                os.close(fd)
                # There are objects that will close this number when they are collected: it must not be another's.
                _fill(fd)
    _ours.clear()


# No lock is taken before a fork: the hooks of others take theirs, in an order that nobody knows.
os.register_at_fork(after_in_child=_in_child)
