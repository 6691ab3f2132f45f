"""Logs of clusters in the background, and of their processes."""

from __future__ import annotations

import codecs
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lazycluster.background import state
from lazycluster.exceptions import LazyclusterError

if TYPE_CHECKING:
    from lazycluster.background.state import Named

__all__ = ["show_cluster_logs"]

_STAMP = re.compile(r"-\d{8}-\d{6}-\d{6}-\d+-\d+\.log$")
_AGAIN = 0.2  # seconds between two looks at a file that is followed
_TAIL = 1024 * 1024  # bytes at the end of a file that are shown


def show_cluster_logs(found: Named, worker: str | None, follow: bool) -> None:
    """Print the log of a cluster, or the last log of one of its processes.

    Args:
        found: The cluster.
        worker: The name of the process, or the number of a worker.
        follow: Whether to go on with what is logged from now on, until the cluster is gone.

    Raises:
        LazyclusterError: If there is no such process.
    """
    from lazycluster.cli.console import tell

    path = found.path / state.LOG if worker is None else _of_process(found, worker)
    if follow and found.is_elsewhere and not found.gone and found.record is not None:
        where = f"the cluster {found.name!r} runs on {found.record.host}"
        tell(f"{where}: if its process is killed there, that is not seen here; Ctrl-C ends this", err=True)
    while _show(found, path, follow):
        pass


def _of_process(found: Named, worker: str) -> Path:
    """Return the last log of a process."""
    from urllib.parse import unquote

    paths: dict[str, Path] = {}
    for path in sorted((found.path / state.LOGS).glob("*/*.log"), key=lambda path: path.stat().st_mtime):
        paths[unquote(_STAMP.sub("", path.name))] = path
    named = [name for name in paths if worker in (name, name.rpartition(" ")[2])]
    if not named:
        have = ", ".join(sorted(paths)) or "none"
        raise LazyclusterError(f"the cluster {found.name!r} has no process {worker!r}; its processes are: {have}")
    return paths[named[-1]]


def _show(found: Named, path: Path, follow: bool) -> bool:
    """Print a log to its end; return whether another was begun in its place meanwhile."""
    from lazycluster.exceptions import printable

    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        if size > _TAIL:
            file.readline()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two parts
        is_complete = not follow
        while True:
            data = file.read(65536)
            if data:
                sys.stdout.write(printable(decoder.decode(data)))
                continue
            if is_complete:
                break
            sys.stdout.flush()
            # What was written just before is read once more.
            is_complete = _is_replaced(path, file.fileno()) or _is_gone(found)
            if not is_complete:
                time.sleep(_AGAIN)
        sys.stdout.write(printable(decoder.decode(b"", final=True)))
        sys.stdout.flush()
        return follow and _is_replaced(path, file.fileno())


def _is_replaced(path: Path, fd: int) -> bool:
    """Return whether a new log was begun."""
    try:
        return not os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _is_gone(found: Named) -> bool:
    """Return whether a cluster is not there any more, and writes nothing."""
    again = state.find(found.name)
    return again is None or bool(again.gone)
