"""A worker of a pool: takes chunks of calls from the pool's queue, one after the other, until that is closed.

It is forked from a zygote like the process of a single call, and lives as long as the pool. Functions, and large
objects that several calls share, are mapped from memory that all workers of the host have in common.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import time
import types
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

from . import call_process, descriptors, filenames, localmodules
from .pool_protocol import (
    ANSWER,
    BROKEN,
    CHUNK,
    GIVEN,
    LARGE,
    MISSING,
    MIXED,
    NEED,
    READY,
    RECORD,
    RETURNED,
    SLOT,
    SLOT_SIZE,
    SMALL,
    UNFIT,
)

_MOST_KEPT = 32  # blobs that a worker keeps loaded; what is dropped comes again when it is needed
_PLAIN = (int, float, str, bytes, bool, type(None))
_LAYOUT = struct.Struct("!QI")  # at the start of a blob: bytes of its pickles, number of buffers
_BUFFER = struct.Struct("!QQ")  # of each buffer: where, how long


class _Namespaces:
    """The globals of functions that came by value: each pickle has its own, so that what one changes harms no other.

    What the initializer assigns is meant for all, though, as where a worker has the whole script.
    """

    def __init__(self) -> None:
        self._fresh: List[Dict[str, Any]] = []
        self._assigned: Dict[str, Dict[str, Any]] = {}  # by the name of the script or module

    def make_function(self, code: Any, namespace: Dict[str, Any], *more: Any) -> Any:
        """Do what cloudpickle does, and note the namespace."""
        from cloudpickle import cloudpickle

        if isinstance(namespace, dict) and all(namespace is not other for other in self._fresh):
            self._fresh.append(namespace)
        return cloudpickle._make_function(code, namespace, *more)

    def settle(self) -> None:
        """Have the functions that were loaded see what the initializer has assigned."""
        for namespace in self._fresh:
            namespace.update(self._assigned.get(namespace.get("__name__", ""), {}))
        self._fresh.clear()

    def initialize(self, load: Callable[[], Callable[[], Any]]) -> None:
        """Load the initializer, call it, and note what it assigns."""
        function = load()
        before = [(namespace, dict(namespace)) for namespace in self._fresh]
        function()
        for namespace, old in before:
            changed = {name: new for name, new in namespace.items() if name not in old or old[name] is not new}
            self._assigned.setdefault(namespace.get("__name__", ""), {}).update(changed)
        self._fresh.clear()


_namespaces = _Namespaces()


class _ArgumentsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_make_function" and module.startswith("cloudpickle"):
            return _namespaces.make_function
        if module in (localmodules.__name__, __name__):  # the package that they are of on the manager is on no host
            return getattr(localmodules if module == localmodules.__name__ else sys.modules[__name__], name)
        return super().find_class(module, name)


class _ResultPickler:
    """Pickles results; classes that came from the manager become its own again."""

    def __init__(self) -> None:
        from cloudpickle import cloudpickle

        known = self.known = {}  # type: Dict[Any, str]
        self._tracked: Any = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS

        class Pickler(filenames.FileNames, cloudpickle.Pickler):  # type: ignore[misc]
            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, type) and obj in known:
                    return localmodules.tracked_class, (known[obj],)
                if isinstance(obj, BaseException):
                    return localmodules.reduced_error(obj)
                return super().reducer_override(obj)

        self._class: Callable[..., Any] = Pickler

    def load(self, load: Callable[[], Any]) -> Any:
        """Call `load`, which unpickles what came from the manager, and note the classes that came."""
        before = len(self._tracked)
        value = load()
        if len(self._tracked) != before:
            self.known.update(list(self._tracked.items())[before:])
        return value

    def dump(self, value: Any) -> List[Any]:
        """Return the pickle in parts; the large ones are the memory of the objects themselves."""
        if type(value) is list and len(value) == 1 and type(value[0]) in _PLAIN:
            return [pickle.dumps(value, 5)]
        file = call_process.Chunks()
        with localmodules.found_by_name():
            self._class(file, protocol=5).dump(value)
        return file.parts


class _SharedObjects(Dict[int, Any]):
    """The large objects that calls have in common, by number.

    Each is made anew for each call, so that none sees what another one has changed, but from the same memory.
    """

    def __init__(self, fetch: Callable[[int], Any]) -> None:
        super().__init__()
        self._fetch = fetch
        self._fds: OrderedDict[int, int] = OrderedDict()

    def __missing__(self, number: int) -> Any:
        fd = self._fds.pop(number, -1)
        if fd < 0:
            fd = self._fetch(number)
            if len(self._fds) >= _MOST_KEPT:
                os.close(self._fds.popitem(last=False)[1])
        self._fds[number] = fd
        return _load_blob(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))


class PoolWorker:
    """The state of a worker.

    Args:
        own: Its own socket to the agent.
        queue: Where chunks are taken from.
        board: Where it notes what it does.
        slot: Which part of the board is its own.
    """

    def __init__(self, own: socket.socket, queue: socket.socket, board: mmap.mmap, slot: int) -> None:
        self._own, self._queue, self._board = own, queue, board
        self._offset = slot * SLOT_SIZE
        self._functions: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._results = _ResultPickler()
        localmodules.shared_objects = _SharedObjects(self._fetch)

    # --- the pool's life -----------------------------------------------------------------------
    def initialize(self, blob: int) -> bool:
        """Call the pool's initializer, if it has one; returns whether it can go on."""
        try:
            if blob:
                _namespaces.initialize(lambda: self._loaded(blob))
        except BaseException as error:  # noqa: BLE001  (whatever it is, the manager has to know)
            self._answer(UNFIT, 0, 0.0, self._results.dump(call_process.describe_error(error, self._results.known)))
            return False
        self._answer(READY, os.getpid(), 0.0, [])
        return True

    def serve(self) -> None:
        """Run chunks until the queue is closed."""
        room = RECORD.size + SMALL
        while True:
            record, fds = descriptors.receive(self._queue, 1, room)
            if not record:
                return
            kind, blob, number, first, count, size = RECORD.unpack_from(record)
            SLOT.pack_into(self._board, self._offset, number, first)
            data: Any = memoryview(record)[RECORD.size :]
            if kind & LARGE:
                data = _mapped(fds[0])
                kind &= ~LARGE
            self._run(kind, blob, number, first, count, data)
            SLOT.pack_into(self._board, self._offset, 0, 0)

    def _run(self, kind: int, blob: int, number: int, first: int, count: int, data: Any) -> None:
        start = time.perf_counter()
        try:
            function = self._functions.get(blob) or self._function(blob)
            calls, kwargs = self._load(kind, data)
        except BaseException as error:  # noqa: BLE001  (it is the manager's to know)
            told = self._results.dump(self._describe(error, "load"))
            self._answer(BROKEN, number, time.perf_counter() - start, told)
            return
        outcomes: List[Tuple[bool, Any]] = []
        failed = False
        for index in range(first, first + count):
            if count > 1:
                SLOT.pack_into(self._board, self._offset, number, index)
            try:
                value = function(*calls[index], **kwargs)
                if type(value) is types.CoroutineType:
                    value = _awaited(value)
                outcomes.append((True, value))
            except BaseException as error:  # noqa: BLE001  (likewise)
                failed = True
                outcomes.append((False, self._describe(error, "run")))
        calls = ()  # what they hold may be large
        self._send(number, start, outcomes, failed)

    def _send(self, number: int, start: float, outcomes: List[Tuple[bool, Any]], failed: bool) -> None:
        elapsed = time.perf_counter() - start
        if not failed:
            try:
                parts = self._results.dump([value for _, value in outcomes])
            except BaseException:  # noqa: BLE001  (any error of any __reduce__; found out one by one)
                failed = True
            else:
                self._answer(RETURNED, number, elapsed, parts)
                return
        pickled = [self._outcome(good, value) for good, value in outcomes]
        self._answer(MIXED, number, elapsed, [pickle.dumps(pickled, 5)])

    def _outcome(self, good: bool, value: Any) -> Tuple[bool, bytes]:
        """Return an outcome so that one that cannot be pickled harms no other."""
        if not good:
            return False, pickle.dumps(value, 5)
        try:
            return True, b"".join(bytes(part) for part in self._results.dump([value]))
        except BaseException as error:  # noqa: BLE001  (any error of any __reduce__)
            told = self._describe(error, "result")
            told["result_type"] = type(value).__module__ + "." + type(value).__qualname__
            return False, pickle.dumps(told, 5)

    def _describe(self, error: BaseException, phase: str) -> Dict[str, Any]:
        return dict(call_process.describe_error(error, self._results.known), phase=phase, pid=os.getpid())

    def _answer(self, kind: int, number: int, elapsed: float, parts: List[Any]) -> None:
        size = sum(memoryview(part).nbytes for part in parts)
        head = ANSWER.pack(kind, number, elapsed, size)
        if size <= SMALL:
            self._own.sendall(b"".join([head, *parts]))
            return
        self._own.sendall(head)
        for part in parts:
            self._own.sendall(part)

    # --- what it needs -------------------------------------------------------------------------
    def _load(self, kind: int, data: Any) -> Tuple[Any, Dict[str, Any]]:
        file = io.BytesIO(data) if isinstance(data, memoryview) else data

        def load() -> Any:
            unpickler = _ArgumentsUnpickler(file)
            return unpickler.load() if kind == CHUNK else _load_local(file, unpickler)

        calls, kwargs = self._results.load(load)
        _namespaces.settle()
        return calls, kwargs or {}

    def _function(self, blob: int) -> Callable[..., Any]:
        if blob == 0:
            return _call
        found: Optional[Callable[..., Any]] = self._functions.get(blob)
        if found is None:
            found = self._functions[blob] = self._loaded(blob)
            _namespaces.settle()
            while len(self._functions) > _MOST_KEPT:
                self._functions.popitem(last=False)
        return found

    def _loaded(self, blob: int) -> Any:
        mapped = _mapped(self._fetch(blob))
        return self._results.load(lambda: _load_blob(mapped))

    def _fetch(self, blob: int) -> int:
        """Return the descriptor of a blob."""
        self._own.sendall(ANSWER.pack(NEED, blob, 0.0, 0))
        data, fds = descriptors.receive(self._own, 1, GIVEN.size)
        if not data:
            raise EOFError("the pool has ended")
        if GIVEN.unpack(data)[1] == MISSING:
            raise LookupError("what the call needs has been dropped on the host")
        fd: int = fds[0]
        return fd


def _mapped(fd: int) -> mmap.mmap:
    """Map a file, so that what is written there changes this process only."""
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)


def _load_blob(mapped: mmap.mmap) -> Any:
    size, count = _LAYOUT.unpack_from(mapped)
    view = memoryview(mapped)
    places = [_BUFFER.unpack_from(mapped, _LAYOUT.size + index * _BUFFER.size) for index in range(count)]
    buffers = [view[start : start + length] for start, length in places]
    mapped.seek(_LAYOUT.size + count * _BUFFER.size)
    del size
    return _load_local(mapped, _ArgumentsUnpickler(mapped, buffers=buffers))


def _load_local(file: Any, unpickler: pickle.Unpickler) -> Any:
    """Read the sources of local modules, an object, and what modules hold, as `call_process.load_call` does."""
    localmodules.install(pickle.load(file))  # noqa: S301  (what the manager sends)
    value = unpickler.load()
    for portion in iter(unpickler.load, None):
        localmodules.fill(portion)
    return value


def _call(function: Callable[..., Any], args: Iterable[Any], kwargs: Dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def joblib_batch(
    calls: Iterable[Tuple[Callable[..., Any], Tuple[Any, ...], Dict[str, Any]]], nested: bool
) -> List[Any]:
    """Run a batch of joblib's. Unless `nested`, what it wants to be parallel in turn stays in this process."""
    try:
        from joblib import parallel_config
        from joblib.parallel import SequentialBackend, ThreadingBackend
    except ImportError:  # the host does without
        return [function(*args, **kwargs) for function, args, kwargs in calls]
    inner = ThreadingBackend if nested else SequentialBackend
    with parallel_config(backend=inner(nesting_level=1)):
        return [function(*args, **kwargs) for function, args, kwargs in calls]


def _awaited(value: Any) -> Any:
    import asyncio

    return asyncio.run(value)


def main(fds: List[int], request: Dict[str, Any]) -> int:
    """Be a worker; returns its exit status.

    Args:
        fds: Its own socket, the queue, the board.
        request: What the agent says: `task`, `cwd`, `name`, `slot`, `initializer`, `variables`.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    own, queue = socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])
    board = mmap.mmap(fds[2], 0)
    os.close(fds[2])
    os.environ.update(request.get("variables") or {})
    try:
        call_process.prepare(request)
    except OSError as error:
        text = "the working directory {} cannot be used: {}".format(error.filename, error.strerror)
        told = json.dumps({"message": text}).encode("ascii")
        own.sendall(ANSWER.pack(UNFIT, 1, 0.0, len(told)) + told)
        return 1
    worker = PoolWorker(own, queue, board, request["slot"])
    try:
        if not worker.initialize(request.get("initializer") or 0):
            return 1
        worker.serve()
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass  # the agent has ended
    call_process.finish()
    return 0
