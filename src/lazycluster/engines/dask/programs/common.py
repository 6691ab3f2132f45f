"""Parts that the programs of a Dask cluster share."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import select
from collections.abc import Coroutine
from typing import Any

# What Dask itself wants to be the same everywhere, since it sends pickles and its own messages.
SAME_PACKAGES = ("dask", "distributed", "cloudpickle")
PACKAGES = ("dask", "distributed", "cloudpickle", "msgpack", "tornado", "toolz", "lz4")


EARLY_IMPORTS = "LAZYCLUSTER_EARLY_IMPORTS"  # the variable with names of modules, with blanks between


def import_early() -> list[str]:
    """Import the modules that the environment names, and return their names.

    Those that fail, as do the user's own, which are not sent yet, are left to the worker process: it imports all of
    them, and tells of errors.
    """
    names = os.environ.pop(EARLY_IMPORTS, "").split()
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return names


def configure(changes: dict[str, Any]) -> None:
    """Have the manager's Dask configuration here, before the host's own."""
    import dask
    from distributed.config import initialize_logging

    dask.config.update(dask.config.global_config, changes, priority="new")
    if "logging" in changes or "logging" in changes.get("distributed", {}):
        initialize_logging(dask.config.global_config)


def listening_host(settings: dict[str, Any], port: str) -> str:
    """Return the address on which a port listens, as Dask writes it."""
    return _written(settings["hosts"][port])


def contact_address(settings: dict[str, Any], port: str) -> str | None:
    """Return the address by which others know a port, if it is another one than that which listens."""
    host = settings["address"]
    if host == settings["hosts"][port]:
        return None
    return f"{settings['protocol']}://{_written(host)}:{settings['ports'][port]}"


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_alone() -> bool:
    """Tell whether the agent that has started this process has ended, which would hold the other end of its input."""
    poll = select.poll()
    poll.register(0, 0)
    return bool(poll.poll(0))


async def first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of several is over."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    for task in done:
        task.result()
