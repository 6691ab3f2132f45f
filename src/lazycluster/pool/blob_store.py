"""Blobs, which are sent to each host once for all calls that need them: functions with bound values, large arrays."""

from __future__ import annotations

import hashlib
import pickle
import threading
import weakref
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from .serialization import Packed, pack

__all__ = ["Blob", "BlobStore"]

_KEPT = 256 * 1024 * 1024  # bytes of blobs that no call needs at the moment, kept for the next ones
_KEPT_COUNT = 64
_LARGE = 1024 * 1024  # bytes from which on an array is sent once to a host for all calls that have it
_LARGE_IF_SAME = 16 * 1024  # likewise, if it needs not be read to know that it is the same


class Blob:
    """Bytes that several calls need.

    Attributes:
        number: What workers call it.
        packed: The bytes.
        users: How many calls, or series of calls, need it.
    """

    __slots__ = ("number", "packed", "users")

    def __init__(self, number: int, packed: Packed) -> None:
        self.number = number
        self.packed = packed
        self.users = 0


class BlobStore:
    """Blobs of a pool. Thread-safe.

    Attributes:
        dropped: Numbers of blobs that hosts need not keep any more; the scheduler tells them, and empties the list.
    """

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self._lock = threading.Lock()
        self._by_digest: dict[bytes, Blob] = {}
        self._by_number: dict[int, Blob] = {}
        self._unused: OrderedDict[int, Blob] = OrderedDict()
        self._next = 1

    def __getitem__(self, number: int) -> Blob:
        return self._by_number[number]

    def take(self, packed: Packed) -> Blob:
        """Return the blob of some bytes, with one more user."""
        with self._lock:
            blob = self._by_digest.get(packed.digest)
            if blob is None:
                blob = Blob(self._next, packed)
                self._next += 1
                self._by_digest[packed.digest] = self._by_number[blob.number] = blob
            self._use(blob)
            return blob

    def take_array(self, array: Any) -> Blob:
        """Return the blob of an array, with one more user; it is copied only if there is none yet."""
        key = _digest_of(array)
        with self._lock:
            blob = self._by_digest.get(key) if key is not None else None
            if blob is not None:
                self._use(blob)
                return blob
        packed = pack(array)
        return self.take(packed if key is None else replace(packed, digest=key))

    def use(self, number: int) -> None:
        """Note one more user."""
        with self._lock:
            self._use(self._by_number[number])

    def _use(self, blob: Blob) -> None:
        blob.users += 1
        self._unused.pop(blob.number, None)

    def release(self, number: int) -> None:
        """Note one user less. Unused blobs are kept for a while, since the next calls may need them."""
        with self._lock:
            blob = self._by_number[number]
            blob.users -= 1
            if blob.users:
                return
            self._unused[number] = blob
            while len(self._unused) > _KEPT_COUNT or (
                self._unused and sum(blob.packed.size for blob in self._unused.values()) > _KEPT
            ):
                old, blob = self._unused.popitem(last=False)
                del self._by_number[old]
                del self._by_digest[blob.packed.digest]
                self.dropped.append(old)


def _digest_of(array: Any) -> bytes | None:
    """Return the digest of an array; None if its memory cannot be read as it is."""
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        return None
    # The type as it is pickled: its text does not tell apart all types, such as those of ml_dtypes.
    kind = pickle.dumps((array.dtype, array.shape, array.strides))
    digest = hashlib.blake2b(kind, digest_size=20)
    # As bytes: not every type has a buffer, dates have none.
    digest.update(array.ravel(order="K").view("u1"))
    return digest.digest()


class SharedArrays:
    """Gives the large arrays in the arguments of a series of calls their blobs, which it uses until it is closed.

    Args:
        blobs: The pool's blobs.
        by_identity: Whether an array that was seen before is taken for the same without a look at what it holds: for
            series whose caller promises not to change them meanwhile.
    """

    def __init__(self, blobs: BlobStore, by_identity: bool = False) -> None:
        self._blobs = blobs
        self._by_identity = by_identity
        self._large = _LARGE_IF_SAME if by_identity else _LARGE
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._used: list[int] = []

    def share(self, array: Any) -> int | None:
        """Return the number of an array's blob, None if it is too small for that."""
        if array.nbytes < self._large:
            return None
        known = self._known.get(id(array)) if self._by_identity else None
        if known is not None and known[0]() is array:
            number = known[1]
            self._blobs.use(number)
        else:
            number = self._blobs.take_array(array).number
            if self._by_identity:
                self._known[id(array)] = weakref.ref(array), number
                self._blobs.use(number)  # as long as the series lasts
        self._used.append(number)
        return number

    def taken(self) -> tuple[int, ...]:
        """Return the blobs that were shared since the last time; the caller releases them."""
        used, self._used = self._used, []
        return tuple(used)

    def close(self) -> list[int]:
        """Return the blobs that were remembered; the caller releases them."""
        known, self._known = self._known, {}
        return [number for _, number in known.values()]
