"""Records of the detached tasks that were started on this machine: which of their steps are functions.

A host says of a task what it likes; what a function has returned there is unpickled only where this machine knows that
one was started, since unpickling can run any code. A record holds numbers of steps and the host, and no secret.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazycluster.utils import default_directory, private_directory

__all__ = ["DetachedRecord", "directory", "find", "forget", "keep"]

_NAME = "detached-tasks"
_KEPT = 10_000  # records; beyond that the oldest go, since tasks may never be removed
_NEW = ".new"
_ABANDONED = 3600.0  # seconds after which nobody is writing a file any more
_LARGEST = 1024 * 1024  # bytes of a record
_ID = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class DetachedRecord:
    """The record of one detached task.

    Attributes:
        host: The host, as it was named.
        steps: How many steps the task has.
        functions: Which of them are functions.
    """

    host: str
    steps: int
    functions: frozenset[int]


def directory() -> Path:
    """Return where the records are; it need not exist."""
    return default_directory() / _NAME


def keep(task_id: str, host: str, functions: Sequence[bool]) -> DetachedRecord:
    """Write down what is about to be started.

    Args:
        task_id: The name of the task on the host.
        host: The host.
        functions: For each step whether it is a function.

    Returns:
        The record.

    Raises:
        OSError: It cannot be written.
    """
    record = DetachedRecord(host, len(functions), frozenset(n for n, one in enumerate(functions) if one))
    content = json.dumps({"host": host, "steps": record.steps, "functions": sorted(record.functions)})
    if len(content) > _LARGEST:
        raise OSError(f"a task of {record.steps} steps is too long to be recorded")
    folder = private_directory(_NAME, main=default_directory())
    _prune(folder)
    new = folder / f"{task_id}.{secrets.token_hex(4)}{_NEW}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(content)
        new.replace(folder / f"{task_id}.json")
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return record


def find(task_id: str) -> DetachedRecord | None:
    """Return the record of a task; None if there is none.

    Raises:
        ValueError: There is a file that is no record, or that another user could have written; says why.
        OSError: It cannot be read.
    """
    if not _ID.fullmatch(task_id):
        return None
    try:
        fd = os.open(directory() / f"{task_id}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        if not is_file or not _is_own(os.fstat(fd)) or not _is_own(directory().lstat()):
            raise ValueError("it is not a file that you alone can write to")
        content = file.read(_LARGEST + 1)
    return _parsed(content)


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _parsed(content: bytes) -> DetachedRecord:
    try:
        found: Any = json.loads(content)
        host, steps, functions = found["host"], found["steps"], found["functions"]
        good = isinstance(host, str) and isinstance(steps, int) and all(isinstance(one, int) for one in functions)
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise ValueError("it is damaged")
    return DetachedRecord(host, steps, frozenset(functions))


def forget(task_id: str) -> None:
    """Remove the record of a task that has been removed from its host."""
    if _ID.fullmatch(task_id):
        with contextlib.suppress(OSError):
            (directory() / f"{task_id}.json").unlink()


def _prune(folder: Path) -> None:
    """Make room for one more; also remove what those have left that were killed while they wrote."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    records = [name for name in names if name.endswith(".json")]
    unfinished = [name for name in names if name.endswith(_NEW)]
    ages: list[tuple[float, str]] = []
    for name in (records if len(records) >= _KEPT else []) + unfinished:
        with contextlib.suppress(OSError):  # another process has just removed it
            ages.append(((folder / name).lstat().st_mtime, name))
    old = [name for when, name in ages if name.endswith(_NEW) and when < time.time() - _ABANDONED]
    old += [name for _, name in sorted(ages) if name.endswith(".json")][: max(0, len(records) - _KEPT + 1)]
    for name in old:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
