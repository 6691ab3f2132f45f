"""What loads do on the hosts, which have neither the library nor its tests."""

from __future__ import annotations

import hashlib
import mmap
import time
from typing import Any


def touched(size: int) -> int:
    """Take so many bytes from the system, which an allocator might have in stock, and give them back."""
    with mmap.mmap(-1, size) as memory:
        return memory.write(bytes(size))


def digest(number: int) -> str:
    """Something that takes a second, and memory."""
    found = hashlib.sha256()
    for _ in range(20):
        found.update(bytes([number % 256]) * 3_000_000)
        time.sleep(0.05)
    print("digested", number, flush=True)
    return found.hexdigest()


def square(number: int) -> tuple[int, int]:
    """Something that takes a moment, and sometimes memory."""
    time.sleep(0.002)
    return number * number, touched(2_000_000) if number % 50 == 0 else 0


def part(number: int, rows: int, keys: int, salt: int) -> Any:
    """A part of a table, in which each key is as often as each other one."""
    import numpy
    import pandas

    time.sleep(0.3)
    values = numpy.arange(rows)
    return pandas.DataFrame({"key": values * 7919 % keys, "value": values, "number": number, "salt": salt})


def sums(part: Any) -> Any:
    """The sum of the values of each key."""
    time.sleep(0.2)
    return part.groupby("key", as_index=False)["value"].sum()


def objective(x: float) -> float:
    """Something that takes a moment, and memory."""
    time.sleep(0.15)
    return (x - 1) ** 2 + 0 * touched(2_000_000)
