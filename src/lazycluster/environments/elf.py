"""What compiled code for Linux needs of the system that loads it, read from its ELF header."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Needs", "needs_of"]

_GLIBC = re.compile(rb"^GLIBC_(\d+)\.(\d+)")
_LOAD, _DYNAMIC = 1, 2  # kinds of segments
_NEEDED, _STRTAB, _VERNEED, _VERNEEDNUM = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF  # kinds of entries of the dynamic section
_MOST = 10_000  # entries of a table


class Needs(NamedTuple):
    """What a file needs.

    Attributes:
        libraries: The shared libraries that it names.
        glibc: The oldest version of glibc that has what it uses; (0, 0) if it uses nothing of it.
    """

    libraries: frozenset[str]
    glibc: tuple[int, int]


def needs_of(path: Path) -> Needs | None:
    """Return what a file needs; None if it is no ELF file.

    Raises:
        ValueError: If it is one, but damaged.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _File(data).needs()
            except (struct.error, IndexError, StopIteration) as error:
                raise ValueError(f"{path} is damaged") from error


class _File:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._is_64 = data[4] == 2
        self._order = "<" if data[5] == 1 else ">"
        self._segments = list(self._read_segments())

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + layout, self._data, offset)

    def _read_segments(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield kind, offset, address and size of each segment."""
        start = self._unpack("Q", 32)[0] if self._is_64 else self._unpack("I", 28)[0]
        size, count = self._unpack("HH", 54 if self._is_64 else 42)
        for number in range(count):
            values = self._unpack("IIQQQQ" if self._is_64 else "IIIIII", start + number * size)
            kind, offset, address = (values[0], *values[2:4]) if self._is_64 else values[:3]
            yield kind, offset, address, values[5] if self._is_64 else values[4]

    def _offset(self, address: int) -> int:
        return next(
            offset + address - begin
            for kind, offset, begin, size in self._segments
            if kind == _LOAD and begin <= address < begin + size
        )

    def _text(self, offset: int) -> bytes:
        end = self._data.find(b"\0", offset)
        return self._data[offset:end]

    def _entries(self) -> Iterator[tuple[int, int]]:
        size = 16 if self._is_64 else 8
        for kind, offset, _, length in self._segments:
            if kind == _DYNAMIC:
                for place in range(offset, offset + length - size + 1, size):
                    tag, value = self._unpack("QQ" if self._is_64 else "II", place)
                    yield tag, value

    def needs(self) -> Needs:
        """Return what it needs."""
        entries = list(self._entries())
        single = dict(entries)
        if _STRTAB not in single:
            return Needs(frozenset(), (0, 0))  # linked statically
        names = self._offset(single[_STRTAB])
        libraries = {self._text(names + value).decode("utf-8", "replace") for tag, value in entries if tag == _NEEDED}
        versions = []
        if _VERNEED in single:
            place = self._offset(single[_VERNEED])
            versions = [self._text(names + name) for name in self._versions(place, single.get(_VERNEEDNUM, 0))]
        found = [match for match in map(_GLIBC.match, versions) if match]
        return Needs(frozenset(libraries), max(((int(one[1]), int(one[2])) for one in found), default=(0, 0)))

    def _versions(self, place: int, count: int) -> Iterator[int]:
        """Yield where the names are of the versions of symbols that are needed."""
        for _ in range(min(count, _MOST)):
            _, parts, _, first, following = self._unpack("HHIII", place)
            inner = place + first
            for _ in range(min(parts, _MOST)):
                *_, name, step = self._unpack("IHHII", inner)
                yield name
                inner += step
            place += following
