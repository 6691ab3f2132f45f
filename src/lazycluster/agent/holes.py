"""Holes of sparse files: where they are, and the checksum of what they read as. Used on the host and on the manager."""

from __future__ import annotations

import errno
import os
import zlib
from typing import Iterator, List, Optional, Tuple

_BLOCK = 512  # bytes, what st_blocks counts
_AT_ONCE = 256 * 1024  # bytes
_SEEK_DATA = getattr(os, "SEEK_DATA", None)
_SEEK_HOLE = getattr(os, "SEEK_HOLE", None)

# What 2**n null characters do to a CRC-32, as a constant and a column for each of its bits: it is an affine map.
_Map = Tuple[int, List[int]]
_maps: List[_Map] = []


def extents(fd: int, start: int, end: int) -> Iterator[Tuple[int, int]]:
    """Return the parts of an open file: for each how much of a hole there is, and how much data behind it, in bytes.

    The file is read at the right place if its data is read before the next part is asked for. Where the system, or the
    file system, does not tell of holes, all is data.

    Args:
        fd: The file.
        start: Where to begin.
        end: Where to end, at most the file's size.
    """
    inode = os.fstat(fd)
    if _SEEK_DATA is None or _SEEK_HOLE is None or inode.st_blocks * _BLOCK >= inode.st_size:
        os.lseek(fd, start, os.SEEK_SET)
        yield 0, end - start
        return
    while start < end:
        data = min(end, _seek(fd, start, _SEEK_DATA, start, end))
        hole = min(end, _seek(fd, data, _SEEK_HOLE, end, end)) if data < end else end
        if hole <= start:  # what one of the two tells makes no sense
            hole = end
        os.lseek(fd, data, os.SEEK_SET)
        yield data - start, hole - data
        start = hole


def _seek(fd: int, start: int, what: int, untold: int, none: int) -> int:
    try:
        return os.lseek(fd, start, what)
    except OSError as error:
        # ENXIO: nothing but a hole up to the end.
        return none if error.errno == errno.ENXIO else untold


def filled_blocks(fd: int) -> Iterator[Tuple[int, bytes]]:
    """Return the blocks of an open file that are not blank, each with its place; the same wherever holes are."""
    size = os.fstat(fd).st_size
    blank = bytes(_AT_ONCE)
    start = done = 0
    for hole, data in extents(fd, 0, size):
        start += hole
        for place in range(max(done, start - start % _AT_ONCE), start + data, _AT_ONCE):
            block = os.pread(fd, _AT_ONCE, place)
            if block != blank[: len(block)]:
                yield place, block
            done = place + _AT_ONCE
        start += data


def after_zeros(checksum: int, count: int) -> int:
    """Return the CRC-32 of what has a checksum, followed by so many null characters; takes no time, however many."""
    power = 0
    while count:
        if count & 1:
            checksum = _mapped(_map(power), checksum)
        count >>= 1
        power += 1
    return checksum


def beginning_checksum(fd: int, count: int) -> Optional[int]:
    """Return the CRC-32 of the first bytes of an open file, None if it has fewer.

    Args:
        fd: The file; it is read at another place afterwards.
        count: How many bytes.
    """
    if os.fstat(fd).st_size < count:
        return None
    block = memoryview(bytearray(_AT_ONCE))
    checksum = 0
    for hole, data in extents(fd, 0, count):
        checksum = after_zeros(checksum, hole)
        while data:
            read = os.readv(fd, [block[:data]])
            if not read:
                return None
            checksum = zlib.crc32(block[:read], checksum)
            data -= read
    return checksum


def _map(power: int) -> _Map:
    if not _maps:
        constant = zlib.crc32(b"\0")
        _maps.append((constant, [zlib.crc32(b"\0", 1 << bit) ^ constant for bit in range(32)]))
    while len(_maps) <= power:
        half = _maps[-1]
        constant = _mapped(half, half[0])
        _maps.append((constant, [_mapped(half, _mapped(half, 1 << bit)) ^ constant for bit in range(32)]))
    return _maps[power]


def _mapped(half: _Map, value: int) -> int:
    result, columns = half
    for bit in range(32):
        if value >> bit & 1:
            result ^= columns[bit]
    return result
