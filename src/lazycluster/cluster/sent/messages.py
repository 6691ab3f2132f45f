"""Messages between a program that was sent and the manager: its settings, events, and ports that are taken."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

__all__ = [
    "LOOPBACK", "MARKER", "PortTakenError", "check_ports", "emit", "emit_versions", "read_settings", "root_of", "run",
    "stop_signal", "versions",
]  # fmt: skip

MARKER = "\x1elazycluster "
LOOPBACK = "127.0.0.1"


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


def emit_versions(packages: Sequence[str]) -> None:
    """Tell the manager which software is here."""
    emit(
        "versions",
        python=list(sys.version_info[:3]),
        executable=sys.executable,
        managed=is_managed(),
        packages=versions(packages),
    )


def is_managed() -> bool:
    """Return whether pip installs nothing into this Python, which belongs to the system (PEP 668)."""
    import sysconfig

    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    return sys.prefix == sys.base_prefix and os.access(marker, os.F_OK)


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the versions of packages, without importing them; None for those that are missing."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def read_settings() -> dict[str, Any]:
    """Return the settings, once the manager sends them."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit("the manager ended before it sent the settings")
    settings: dict[str, Any] = json.loads(line)
    return settings


def check_ports(ports: Mapping[str, int], hosts: Mapping[str, str]) -> None:
    """Find out by binding whether ports are free.

    Args:
        ports: The ports by name.
        hosts: By name the addresses that listen; by default the loopback interface does.

    Raises:
        PortTakenError: One is not.
    """
    for name, port in ports.items():
        host = hosts.get(name, LOOPBACK)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise SystemExit(f"this host does not have the address {host} any more") from None
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                raise PortTakenError(port) from None


def run(serve: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]) -> None:
    """Serve with the settings that come; if a port is taken, say so and wait for others."""
    import asyncio
    import traceback

    while True:
        settings = read_settings()
        try:
            check_ports(settings["ports"], settings.get("hosts", {}))
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
    """Return the first cause of an error: libraries wrap it in several that say only that something failed."""
    while True:
        deeper = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if deeper is None:
            return error
        error = deeper


def stop_signal() -> Any:
    """Return an `asyncio.Event` that is set when this process is asked to end."""
    import asyncio
    import signal

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
