"""A worker of a Hyperopt cluster, as a program.

This process only watches two others, copies of itself: one evaluates trials, the other one tells the database that the
worker lives. So imports are done once, an objective that ends its process costs one trial and a few milliseconds, and
whoever evaluates has no second task.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ....cluster.sent import messages
from . import trials

PACKAGES = ("hyperopt", "pymongo", "cloudpickle", "numpy")
# To have an effect these must be set before numpy is imported. Several workers share the host's cores.
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PR_SET_PDEATHSIG = 1
# A program that crashes would do so again; one that was killed was killed by somebody.
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS}


def main() -> None:
    """Evaluate trials until asked to end."""
    messages.emit_versions(PACKAGES)
    for name in _ONE_THREAD:
        os.environ.setdefault(name, "1")
    # Imported while the server starts; the settings come when it answers.
    from . import compat, evaluator, heartbeat

    settings = messages.read_settings()
    if settings["authority"]:
        authority = Path(os.environ["LAZYCLUSTER_SCRATCH"], "database.pem")  # it is no secret
        authority.write_text(settings["authority"], "ascii")
        compat.trust(messages.LOOPBACK, settings["port"], str(authority))
    children: set[int] = set()
    _end_with(children)
    beating = _fork(lambda: heartbeat.beat(settings), children)
    # What an earlier life of this worker left behind is put back first.
    left = {"owner": settings["name"], "reason": "its worker died", "final": False}
    while True:
        owner = f"{settings['name']}#{secrets.token_hex(6)}"
        reading, writing = os.pipe()
        working = _fork(lambda: evaluator.serve(settings, owner, left, writing), children)  # noqa: B023
        os.close(writing)
        ready = os.read(reading, 1) == trials.READY
        status = None
        while status is None:
            ended, how = os.wait()
            children.discard(ended)
            if ended == working:
                status = os.waitstatus_to_exitcode(how)
            elif ended == beating:
                beating = _fork(lambda: heartbeat.beat(settings), children)
        if not ready:
            raise SystemExit(f"the process that evaluates trials did not get ready ({_how(status)})")
        left = _what_is_left(owner, status, _last_words(reading))
        os.close(reading)
        print(f"lazycluster: {left['reason']}", file=sys.stderr, flush=True)  # noqa: T201


def _what_is_left(owner: str, status: int, words: bytes) -> dict[str, Any]:
    """Return whose trial is to be put back, why, and whether it has failed for good."""
    if words == trials.CUT_OFF:
        return {"owner": owner, "reason": "the database could not be reached", "final": False}
    final = status >= 0 or -status in _CRASHES
    return {"owner": owner, "reason": f"the objective ended its process ({_how(status)})", "final": final}


def _last_words(reading: int) -> bytes:
    os.set_blocking(reading, False)  # processes that the objective left behind may hold the other end
    try:
        return os.read(reading, 1)
    except BlockingIOError:
        return b""


def _end_with(children: set[int]) -> None:
    """Have this process end its children at once when it is asked to end."""

    def end(number: int, frame: Any) -> None:
        for pid in children:  # a trial is put back at the next start, so there is nothing to wait for
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _fork(work: Callable[[], NoReturn], children: set[int]) -> int:
    """Have a copy of this process do something for ever."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        children.add(pid)
        return pid
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        _die_with(parent)
        work()
    except BaseException:  # noqa: BLE001 - a copy must never go on in what it was copied from
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _die_with(parent: int) -> None:
    """Have this process killed when the one that watches it dies, however it dies."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    names = {number.value: number.name for number in signal.Signals}  # those of real time have none
    return f"signal {names.get(-status, -status)}"
