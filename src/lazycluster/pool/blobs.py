"""What several calls need, and is sent to each host once: functions with what is bound into them, large arrays."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

from .packing import Packed, pack

__all__ = ["Blob", "Blobs"]

_KEPT = 256 * 1024 * 1024  # bytes of blobs that no call needs at the moment, kept for the next ones
_KEPT_COUNT = 64


class Blob:
    """Something that several calls need.

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


class Blobs:
    """The blobs of a pool. Thread-safe.

    Attributes:
        dropped: The numbers of those that hosts need not keep any more; whoever tells the hosts takes them away.
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

    def use(self, number: int) -> None:
        """Note one more user."""
        with self._lock:
            self._use(self._by_number[number])

    def _use(self, blob: Blob) -> None:
        blob.users += 1
        self._unused.pop(blob.number, None)

    def release(self, number: int) -> None:
        """Note one user less. What nobody uses is kept for a while, since the next calls may need it."""
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


class Sharing:
    """Gives the large arrays in the arguments of a series of calls their blobs, which it uses until it is closed.

    Args:
        blobs: The pool's blobs.
        by_identity: Whether an array that was seen before is taken for the same without a look at what it holds: for
            series whose caller promises not to change them meanwhile.
    """

    def __init__(self, blobs: Blobs, by_identity: bool = False) -> None:
        self._blobs = blobs
        self._by_identity = by_identity
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.used: list[int] = []

    def share(self, array: Any) -> int | None:
        """Return the number of an array's blob."""
        known = self._known.get(id(array)) if self._by_identity else None
        if known is not None and known[0]() is array:
            number = known[1]
            self._blobs.use(number)
        else:
            number = self._blobs.take(pack(array)).number
            if self._by_identity:
                self._known[id(array)] = weakref.ref(array), number
                self._blobs.use(number)  # as long as the series lasts
        self.used.append(number)
        return number

    def taken(self) -> tuple[int, ...]:
        """Return what was shared since the last time; whoever takes it releases it."""
        used, self.used = self.used, []
        return tuple(used)

    def close(self) -> None:
        """Let go of the arrays that were remembered."""
        for _, number in self._known.values():
            self._blobs.release(number)
        self._known.clear()
