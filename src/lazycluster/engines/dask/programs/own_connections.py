"""Training whose workers connect to each other by themselves, past Dask: XGBoost and LightGBM.

Tunnels carry Dask's ports only. Where they are all there is, training on several hosts is refused: XGBoost would fail
with an error that says nothing of the cause, and LightGBM would wait for ever.
"""

from __future__ import annotations

import functools
import importlib.abc
import inspect
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.comm import get_address_host
from distributed.utils import sync

from ....cluster.sent.messages import LOOPBACK

_ANSWERS = 30.0  # seconds for a scheduler to say which workers there are
_KEY = "loopback"  # of what the scheduler is told of a worker


def startup_information() -> dict[str, Callable[[Any], str]]:
    """Return what workers tell the scheduler when they register: whose loopback interface theirs is."""
    return {_KEY: lambda _worker: _loopback()}


def _loopback() -> str:
    """Return a text that is the same for two processes exactly if a port of one is a port of the other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/net').readlink()}"
    except OSError:  # no Linux
        return socket.gethostname()


def prepare_scheduler(scheduler: Any) -> None:
    """Have trackers of XGBoost, which run in the scheduler, at an address that the workers reach, or refuse them."""

    def changed(start: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(start)

        @functools.wraps(start)
        def start_tracker(*arguments: Any, **named: Any) -> Any:
            places = {worker.extra.get(_KEY) for worker in scheduler.workers.values()} | {_loopback()}
            _check("XGBoost", scheduler.address, places)
            given = signature.bind(*arguments, **named)
            host = get_address_host(scheduler.address)
            # XGBoost guesses an address, or takes that of the client's tunnel.
            if given.arguments.get("addr_from_user", ()) is None:
                given.arguments["addr_from_user"] = (host, 0)
            if "addr_from_dask" in given.arguments:
                given.arguments["addr_from_dask"] = host
            return start(*given.args, **given.kwargs)

        return start_tracker

    _change("xgboost.dask", "_start_tracker", changed)


def prepare_worker(worker: Any) -> None:
    """Have LightGBM not train on several hosts where its connections would lead nowhere."""

    def changed(train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def train_part(*arguments: Any, **named: Any) -> Any:
            if named.get("num_machines") != 1 and get_address_host(worker.address) == LOOPBACK:
                found = sync(worker.loop, worker.scheduler.identity, callback_timeout=_ANSWERS)
                _check("LightGBM", worker.address, {one.get(_KEY) for one in found["workers"].values()})
            return train(*arguments, **named)

        return train_part

    _change("lightgbm.dask", "_train_part", changed)


def _check(who: str, address: str, places: set[Any]) -> None:
    """Refuse training.

    Raises:
        RuntimeError: If the processes are in several places, and reach each other through tunnels only.
    """
    if get_address_host(address) == LOOPBACK and len(places) > 1:
        raise RuntimeError(
            f"{who} opens connections of its own between scheduler and workers, which are on several machines here, "
            "and the tunnels between them carry those of Dask only\n"
            '  Next step: DaskCluster(group, network="direct"), where the hosts reach each other'
        )


def _change(module: str, function: str, changed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of a module, now or when it is imported. One that is not there is left alone."""

    def change(found: Any) -> None:
        if hasattr(found, function):
            setattr(found, function, changed(getattr(found, function)))

    if module in sys.modules:
        change(sys.modules[module])
    else:
        sys.meta_path.insert(0, _ChangingFinder(module, change))


class _ChangingFinder(importlib.abc.MetaPathFinder):
    """Finds one module by the other finders, and has something done once it is imported."""

    def __init__(self, module: str, change: Callable[[Any], None]) -> None:
        self._module, self._change = module, change

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find the module; others are left to the other finders."""
        if name != self._module:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: Any) -> None:
                execute(module)
                self._change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
