"""Runs the user's `mongod`: starts it, makes the user, and ends with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from typing import Any

from . import messages

_PR_SET_PDEATHSIG = 1
_STEP = 0.05  # seconds between two looks at a program that says nothing when it is ready
_ANSWER_LIMIT = 2000  # milliseconds


def main() -> None:
    """Run `mongod` until one of the two is asked to end."""
    import pymongo  # noqa: F401  (imported while the manager gets ready to send the settings)

    os.umask(0o077)
    while True:
        settings = messages.read_settings()
        port = settings["ports"]["master"]
        if _is_free(port):
            break
        messages.emit("port_taken", port=port)
    process = subprocess.Popen(settings["argv"], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    _wait_until_it_answers(process, port)
    _make_user(port, settings["user"], settings["password"])
    messages.emit("ready", port=port, mongod=process.pid)
    status = process.wait()
    raise SystemExit(status if status >= 0 else 128 - status)


def _die_with_parent() -> None:
    # The files are safe: MongoDB has a journal. A `mongod` that nobody watches would keep them locked.
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((messages.LOOPBACK, port))
        except OSError:
            return False
    return True


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until it accepts connections; the manager's deadline ends this."""
    while True:
        status = process.poll()
        if status is not None:
            raise SystemExit(f"mongod has ended with status {status}; what it said stands above")
        try:
            socket.create_connection((messages.LOOPBACK, port), 1).close()
        except OSError:
            time.sleep(_STEP)
        else:
            return


def _make_user(port: int, user: str, password: str) -> None:
    """Make the user, or find it made: whoever comes from the same machine may make the first one."""
    from pymongo import MongoClient
    from pymongo.errors import OperationFailure

    options: dict[str, Any] = {"serverSelectionTimeoutMS": 30_000, "directConnection": True}
    options["socketTimeoutMS"] = _ANSWER_LIMIT
    client: Any = MongoClient(messages.LOOPBACK, port, **options)
    try:
        client.admin.command("createUser", user, pwd=password, roles=["root"], mechanisms=["SCRAM-SHA-256"])
    except OperationFailure:
        # There is one already, and only those who have logged in may make others.
        known: Any = MongoClient(messages.LOOPBACK, port, username=user, password=password, **options)
        try:
            known.admin.command("listDatabases")
        except OperationFailure as error:
            raise SystemExit(
                f"mongod does not let us in with the password that is kept beside its files: {error}"
            ) from None
        finally:
            known.close()
    finally:
        client.close()
