"""Limits of the system that keep this process from starting or opening something."""

from __future__ import annotations

import errno
import re
import resource
import threading

from lazycluster.exceptions import LazyclusterError

__all__ = ["limit_hint", "limit_hint_in", "start_thread"]

_ERRNO = re.compile(r"\[Errno (\d+)\]")


def limit_hint(error: BaseException) -> str:
    """Return the next step for an error of the system whose cause is a limit; "" for other errors.

    Args:
        error: What starting a process or thread, or opening something, has raised.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return f"allow this process more open files{_known('RLIMIT_NOFILE', '-n')}: each host takes seven"
    if number == errno.EAGAIN or (isinstance(error, RuntimeError) and "start new thread" in str(error)):
        return (
            f"allow this account more processes and threads{_known('RLIMIT_NPROC', '-u')}, in a container more of them "
            "(pids limit), or end some: each host takes one process, and this one has about ten threads"
        )
    return ""


def limit_hint_in(said: str) -> str:
    """Return the next step for what another process of this account has said at its end, see `limit_hint`.

    Args:
        said: The traceback of a Python program, or nothing like that.
    """
    last = said.strip().rpartition("\n")[2]
    if found := _ERRNO.search(last):
        return limit_hint(OSError(int(found[1]), last))
    return limit_hint(RuntimeError(last))


def _known(name: str, option: str) -> str:
    limit = resource.getrlimit(getattr(resource, name))[0] if hasattr(resource, name) else resource.RLIM_INFINITY
    return f" (ulimit {option})" if limit == resource.RLIM_INFINITY else f" (ulimit {option}, now {limit})"


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        LazyclusterError: If the system allows no more; it says which limit that is.
    """
    try:
        thread.start()
    except RuntimeError as error:
        if not (hint := limit_hint(error)):
            raise
        raise LazyclusterError(f"this process cannot start a thread: {error}\n  Next step: {hint}") from None
