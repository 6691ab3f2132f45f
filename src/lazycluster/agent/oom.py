"""Processes that the system has ended because it had no memory left.

This module stands alone: it is sent along with programs of engines, too.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Dict, List, Optional, Tuple

    Counts = Tuple[Optional[int], Optional[int]]

_FRESH = 1.0  # seconds
_latest: List[Tuple[float, "Counts"]] = []


def killed(root: str = "/") -> "Counts":
    """Return how many processes were ended for want of memory: in our control group, on the whole machine.

    None stands for what the system does not tell.
    """
    return _in_group(root), _count(os.path.join(root, "proc/vmstat"), "oom_kill")


def note() -> "Counts":
    """Return the counts as they are before something starts; asked anew once per second at most."""
    now = time.monotonic()
    if not _latest or now - _latest[0][0] > _FRESH:
        _latest[:] = [(now, killed())]
    return _latest[0][1]


def verdict(before: "Counts", after: "Counts") -> str:
    """Return what has run out of memory meanwhile: ``limit`` (a control group), ``host`` or ``""``."""
    for what, one, other in zip(("limit", "host"), before, after):
        if one is not None and other is not None and other > one:
            return what
    return ""


def evidence(before: "Counts") -> Dict[str, str]:
    """Return what is to be told of a process that was killed: ``out_of_memory``, if it can be that."""
    found = verdict(before, killed())
    return {"out_of_memory": found} if found else {}


def _in_group(root: str) -> "Optional[int]":
    counts = []
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        number, names, group = (line.split(":", 2) + ["", ""])[:3]
        if number == "0":
            mount, file = "sys/fs/cgroup", "memory.events"
        elif "memory" in names.split(","):
            mount, file = "sys/fs/cgroup/memory", "memory.oom_control"
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        # In a container the path is often the host's, which cannot be seen: the mount itself is the group then.
        for length in range(len(parts), -1, -1):
            count = _count(os.path.join(root, mount, *(parts[:length] + [file])), "oom_kill")
            if count is not None:
                counts.append(count)
    return max(counts) if counts else None


def _count(path: str, name: str) -> "Optional[int]":
    for line in _lines(path):
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def _lines(path: str) -> "List[str]":
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []
