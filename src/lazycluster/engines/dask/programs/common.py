"""What the programs of a Dask cluster share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

MARKER = "\x1elazycluster "
LOOPBACK = "127.0.0.1"
PACKAGES = ("dask", "distributed", "cloudpickle", "msgpack", "tornado", "toolz", "lz4")


class PortTakenError(Exception):
    """A port that the settings name is in use."""

    def __init__(self, port: int) -> None:
        self.port = port
        super().__init__(f"port {port} is in use")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.port,)


def emit(event: str, **fields: Any) -> None:
    """Tell the manager something."""
    data = (MARKER + json.dumps({"event": event, **fields}) + "\n").encode()
    os.write(1, data)  # at once and in one piece: other processes print to the same pipe


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that have to match, without importing them."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_ports(ports: Iterable[int]) -> None:
    """Find out by binding whether ports are free.

    Raises:
        PortTakenError: One is not.
    """
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
                probe.listen(1)
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                raise PortTakenError(port) from None


def read_settings() -> dict[str, Any]:
    """Return the settings, once the manager sends them."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit("the manager ended before it sent the settings")
    settings: dict[str, Any] = json.loads(line)
    return settings


def configure(changes: dict[str, Any]) -> None:
    """Have the manager's Dask configuration here, before the host's own."""
    import dask
    from distributed.config import initialize_logging

    dask.config.update(dask.config.global_config, changes, priority="new")
    if "logging" in changes or "logging" in changes.get("distributed", {}):
        initialize_logging(dask.config.global_config)


def run(serve: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]) -> None:
    """Serve with the settings that come; if a port is taken, say so and wait for others."""
    while True:
        settings = read_settings()
        try:
            check_ports(settings["ports"].values())
            asyncio.run(serve(settings))
        except PortTakenError as error:
            emit("port_taken", port=error.port)
        except Exception as error:  # noqa: BLE001 - whatever it is, the manager shows the end of what is printed
            cause = root_of(error)
            traceback.print_exception(type(cause), cause, cause.__traceback__, chain=False)
            raise SystemExit(1) from None
        else:
            return


def root_of(error: BaseException) -> BaseException:
    """Return the first cause of an error: distributed wraps it in several that say only that something failed."""
    while True:
        deeper = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if deeper is None:
            return error
        error = deeper


def stop_signal() -> asyncio.Event:
    """Return an event that is set when this process is asked to end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def is_alone() -> bool:
    """Whether the agent that has started this process is gone, which would hold the other end of its input."""
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
