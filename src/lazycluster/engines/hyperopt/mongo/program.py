"""The server as a program of its own, which is told what to do on its standard input."""

from __future__ import annotations

import errno
import os
from typing import Any

from ....cluster.sent import auth_limit, messages


def main() -> None:
    """Serve with the settings that come, until asked to end; if the port is taken, say so and wait for others."""
    from . import dispatch, server  # noqa: F401  (imported while the manager gets ready to send the settings)

    os.umask(0o077)
    messages.run(_serve)


async def _serve(settings: dict[str, Any]) -> None:
    port = settings["ports"]["master"]
    try:
        await serve(settings["dbpath"], port, settings["user"], settings["password"], settings.get("tls"))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise messages.PortTakenError(port) from None


async def serve(
    dbpath: str,
    port: int,
    user: str | None,
    password: str | None,
    tls: dict[str, str] | None = None,
    told: Any = messages.emit,
) -> None:
    """Serve until asked to end.

    Args:
        dbpath: The directory of the documents.
        port: The port on the loopback interface.
        user: Who may log in; None: nobody has to.
        password: The password.
        tls: The server's ``certificate`` and ``key``, as PEM texts; None: nothing is encrypted.
        told: What is called with ``"ready"`` and the port once it listens.

    Raises:
        SystemExit: If the directory cannot be used.
        OSError: If the port cannot.
    """
    from .dispatch import Dispatcher
    from .scram import ScramCredentials
    from .server import Server
    from .store import DocumentStore, StoreError
    from .tls_context import server_context

    auth_limit.limit_lines("asyncio")
    stop = messages.stop_signal()
    try:
        store = DocumentStore(dbpath)
    except StoreError as error:
        raise SystemExit(str(error)) from None
    credentials = ScramCredentials.of(user, password) if user and password else None
    context = server_context(**tls) if tls else None
    server = Server(Dispatcher(store, credentials), credentials is not None, context)
    try:
        told("ready", port=await server.listen(port))
        await stop.wait()
    finally:
        await server.close()
        store.close()
