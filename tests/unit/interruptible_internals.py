"""What `core/interruptible.py` relies on that CPython does not document; run with any Python, whose own it checks.

usage: python interruptible_internals.py PATH_OF_INTERRUPTIBLE_PY
"""

from __future__ import annotations

import _imp
import _thread
import concurrent.futures
import concurrent.futures._base
import importlib.util
import inspect
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_METHODS = {"acquire", "release", "wait", "notify_all"}
_INTERRUPTIONS = 300


def lock_problems() -> Iterator[str]:
    """Check the reentrant lock that conditions are."""
    kind: Any = _thread.RLock
    names = ("acquire", "release", "__enter__", "__exit__", "_is_owned", "_release_save", "_acquire_restore")
    for name in names:
        if not hasattr(kind, name):
            yield f"_thread.RLock has no {name}"
        elif inspect.isfunction(getattr(kind, name)):
            yield f"_thread.RLock.{name} is written in Python: Ctrl-C can come between its lines"
    if not all(hasattr(kind, name) for name in names):
        return
    try:
        lock = type("Subclass", (kind,), {})()
    except TypeError as error:
        yield f"_thread.RLock cannot be subclassed: {error}"
        return
    with lock, lock:
        state = lock._release_save()
        if state != (2, threading.get_ident()):
            yield f"RLock._release_save() returns {state!r}, not (how often it was taken, the thread's identifier)"
        if lock._is_owned() is not False:
            yield "RLock._is_owned() is not False after _release_save()"
        lock._acquire_restore((2, threading.get_ident()))
        if lock._is_owned() is not True:
            yield "RLock._is_owned() is not True after _acquire_restore()"
    if lock._is_owned():
        yield "RLock._acquire_restore((2, thread)) does not take it twice"


def import_problems() -> Iterator[str]:
    """Check the lock of the import system."""
    for name in ("lock_held", "acquire_lock", "release_lock"):
        if not hasattr(_imp, name):
            yield f"_imp has no {name}: the import lock that Ctrl-C leaves behind cannot be given back"
            return
    _imp.acquire_lock()
    if not _imp.lock_held():
        yield "_imp.lock_held() is False though the lock was taken"
    _imp.release_lock()
    if _imp.lock_held():
        yield "_imp.lock_held() is True though nobody has the lock"
    try:
        _imp.release_lock()
        yield "_imp.release_lock() does not raise RuntimeError for a lock that is not this thread's"
    except RuntimeError:
        pass


def future_problems() -> Iterator[str]:
    """Check what futures do with their condition, which is replaced by ours."""
    if not isinstance(vars(concurrent.futures.Future()).get("_condition"), threading.Condition):
        yield "concurrent.futures.Future has no threading.Condition of its own in _condition"
    source = inspect.getsource(concurrent.futures._base)
    if "self._condition" not in source:
        yield "concurrent.futures.Future does not use self._condition"
    if other := sorted(set(re.findall(r"_condition\.(\w+)", source)) - _METHODS):
        yield f"concurrent.futures calls {', '.join(other)} of a future's condition, which Condition does not have"


def behaviour_problems(path: str) -> Iterator[str]:
    """Interrupt waits, and see whether the lock is given back."""
    spec = importlib.util.spec_from_file_location("interruptible", path)
    assert spec is not None
    assert spec.loader is not None
    interruptible = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interruptible)
    future, interrupted, kept = interruptible.Future(), 0, 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(_INTERRUPTIONS):
            try:
                # And once more a second later: one that comes while garbage is collected is lost.
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-4), 1.0)
                while True:
                    future.wait(2e-5)
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                interrupted += 1
            kept += future._condition._is_owned()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if kept or interrupted != _INTERRUPTIONS:
        yield f"of {interrupted} waits that Ctrl-C interrupted, {kept} have kept the lock"
    threading.Timer(0.01, future.set_result, [5]).start()
    end = time.monotonic() + 20
    if future.result(20) != 5 or time.monotonic() > end:
        yield "a wait does not end with what is waited for"
    if list(concurrent.futures.as_completed([future], 5)) != [future]:
        yield "concurrent.futures.as_completed does not return one of our futures"


def problems(path: str) -> list[str]:
    """Return all that is not as `core/interruptible.py` needs it."""
    found = [*lock_problems(), *import_problems(), *future_problems()]
    return found or list(behaviour_problems(path))  # which may stand still where anything of those is


if __name__ == "__main__":
    for problem in (found := problems(sys.argv[1])):
        sys.stderr.write(f"{sys.version.split()[0]}: {problem}\n")
    sys.exit(1 if found else 0)
