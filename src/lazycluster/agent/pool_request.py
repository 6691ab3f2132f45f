"""Requests for pools: how many workers, with which GPUs, from which interpreter."""

from __future__ import annotations

from . import gpus, host_info
from .commands import environment, marked_environment
from .functions import keep_library, with_interpreter
from .paths import meant
from .pools import WorkerPool
from .processes import TASK_MARKER

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, List

    from .session import RequestChannel
    from .zygotes import Interpreter

_THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_MOST_WORKERS = 4096


def pool(channel: RequestChannel) -> None:
    """Handle the request `pool`: see `pool_protocol` for what INPUT and OUTPUT are.

    With `gpus`, e.g. {"count": 1, "workers": 2, "idle": true}, there are as many workers as the host has shares of
    `count` GPUs, times `workers` that share one; each sees its own only.
    """
    keep_library(channel)
    most = channel.params.get("workers")
    if most is not None and (not isinstance(most, int) or not 0 < most <= _MOST_WORKERS):
        channel.fail("value", "a host can have 1 to {} workers, not {!r}".format(_MOST_WORKERS, most))
        return
    wanted = gpus.wanted(channel.params)
    if wanted is None:
        _begin(channel, most or host_info.cpu_cores(), [], 1)
        return
    together = max(1, int(channel.params["gpus"].get("workers") or 1))
    shares_wanted = None if most is None else -(-most // together)

    def given(shares: List[gpus.Share], problem: str) -> None:
        if problem:
            channel.fail("gpu", problem)
        else:
            _begin(channel, min(most or _MOST_WORKERS, len(shares) * together), shares, together)

    taking = gpus.take(channel, environment(channel), "a pool", wanted[0], shares_wanted, wanted[1], given)
    channel.on_abandon = taking.cancel


def _begin(channel: RequestChannel, most: int, shares: List[gpus.Share], together: int) -> None:
    params = channel.params
    task = params.get("task") or ""
    env = environment(channel)
    for name in _THREAD_LIMITS:
        env.setdefault(name, str(max(1, host_info.cpu_cores() // most)))
    message = {
        "kind": "pool",
        "cwd": meant(params.get("cwd") or "", "", env),
        "task": marked_environment(channel, {}, task).get(TASK_MARKER, ""),
        "name": params.get("name") or "",
        "initializer": params.get("initializer") or 0,
    }

    def release() -> None:
        for share in shares:
            share.release()

    def renew(then: Callable[[Interpreter], Any], failed: Callable[[], Any]) -> None:
        with_interpreter(channel, env, lambda interpreter: lambda: then(interpreter), failed)

    def begin(interpreter: Interpreter) -> None:
        try:
            if channel.open:
                variables = [shares[slot // together].variables for slot in range(most)] if shares else []
                WorkerPool(channel, interpreter, message, most, variables, renew, release)
                return
        except OSError as error:
            channel.fail("os", "no pool can be made: {}".format(error.strerror), errno=error.errno)
        release()

    channel.on_abandon = lambda: None
    renew(begin, release)
