"""Files in memory, for what can be loaded from a path only: keys that shall be in no file that stays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["in_memory", "memory_file"]


def memory_file(text: str) -> int | None:
    """Return the descriptor of a file in memory with a text; None where the system has no such thing."""
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():
        return None
    fd = os.memfd_create("tls")
    with open(fd, "w", closefd=False) as file:
        file.write(text)
    return fd


@contextlib.contextmanager
def in_memory(text: str) -> Iterator[str]:
    """Have a text under a path that only this process can open; where there is no such thing, it is the text itself."""
    fd = memory_file(text)
    if fd is None:
        yield text
        return
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
