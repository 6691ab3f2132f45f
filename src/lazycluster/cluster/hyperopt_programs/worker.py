"""A worker of a Hyperopt cluster, as a program.

This process only watches another one, a copy of itself, which evaluates trials: imports are done once, an objective
that ends its process costs one trial and a few milliseconds, and whoever evaluates has no second task.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import sys
from typing import Any, NoReturn

from . import messages

# To have an effect these must be set before numpy is imported. Several workers share the host's cores.
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# A program that crashes would do so again; one that was killed was killed by somebody.
_PR_SET_PDEATHSIG = 1
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS}


def main() -> None:
    """Evaluate trials until asked to end."""
    messages.emit(
        "versions", python=list(sys.version_info[:3]), executable=sys.executable, packages=messages.versions()
    )
    for name in _ONE_THREAD:
        os.environ.setdefault(name, "1")
    # Imported while the server starts; the settings come when it answers.
    from . import evaluator  # noqa: F401

    settings = messages.read_settings()
    # What an earlier life of this worker left behind is put back first.
    left = {"owner": settings["name"], "reason": "its worker died", "final": False}
    while True:
        owner = f"{settings['name']}#{secrets.token_hex(6)}"
        status, was_ready = _run(settings, owner, left)
        if not was_ready:
            raise SystemExit(f"the process that evaluates trials did not get ready ({_how(status)})")
        number = -status
        final = status >= 0 or number in _CRASHES
        left = {"owner": owner, "reason": f"the objective ended its process ({_how(status)})", "final": final}
        print(f"lazycluster: {left['reason']}", file=sys.stderr, flush=True)  # noqa: T201


def _run(settings: dict[str, Any], owner: str, left: dict[str, Any]) -> tuple[int, bool]:
    """Have a copy of this process evaluate trials.

    Returns:
        How it ended (negative: by which signal), and whether it ever was ready.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _evaluate(settings, owner, left, writing, parent)
    os.close(writing)

    def end(number: int, frame: Any) -> None:
        os.kill(pid, signal.SIGKILL)  # its trial is put back at the next start, so there is nothing to wait for
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    ready = os.read(reading, 1) == b"r"
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), ready


def _evaluate(settings: dict[str, Any], owner: str, left: dict[str, Any], writing: int, parent: int) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    _die_with(parent)
    status = 1
    try:
        from . import evaluator

        evaluator.serve(settings, owner, left, writing)
    except BaseException:  # noqa: BLE001 - a copy must never go on in what it was copied from
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _die_with(parent: int) -> None:
    """Have this process killed when the one that watches it dies, however it dies."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _how(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
