"""Runs the user's `mongod`: starts it, makes the user, and ends with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from ....cluster.sent import memory_file, messages

_PR_SET_PDEATHSIG = 1
_STEP = 0.05  # seconds between two looks at a program that says nothing when it is ready
_ANSWER_LIMIT = 2000  # milliseconds
_PORT_TAKEN = 48
# What MongoDB's documentation says of its exit statuses, and what is to be done about it.
_MEANINGS = {
    2: "an option that it does not know: this may be a very old or a very new mongod",
    62: "the files are of another version of MongoDB: use the mongod that made them, or another dbpath",
    100: "the files cannot be used: if another mongod uses them, end that one, or pass another dbpath",
}


def main() -> None:
    """Run `mongod` until one of the two is asked to end."""
    import pymongo  # noqa: F401  (imported while the manager gets ready to send the settings)

    os.umask(0o077)
    while True:
        settings = messages.read_settings()
        port = settings["ports"]["master"]
        argv, files = _with_tls(settings)
        if _is_free(port):
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent, pass_fds=files)
            _end_with(process)
            if _answers(process, port):
                break
        messages.emit("port_taken", port=port)
    _make_user(port, settings)
    messages.emit("ready", port=port, mongod=process.pid)
    status = process.wait()
    raise SystemExit(status if status >= 0 else 128 - status)


def _with_tls(settings: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return the command with the options for TLS, and the descriptors of the files in memory that they name.

    Where there are no such files, they are in this program's directory, which is removed when it ends.
    """
    tls = settings["tls"]
    texts = {"--tlsCertificateKeyFile": tls["certificate"] + tls["key"], "--tlsCAFile": settings["authority"]}
    argv, files = [*settings["argv"], "--tlsMode", "requireTLS"], []
    for option, text in texts.items():
        fd = memory_file.memory_file(text)
        if fd is None:
            path = Path(os.environ["LAZYCLUSTER_SCRATCH"], option.strip("-"))
            path.write_text(text, "ascii")
        else:
            path = Path(f"/proc/self/fd/{fd}")
            files.append(fd)
        argv += [option, str(path)]
    # Who comes shows that he knows the password; it is the server that shows a certificate.
    return [*argv, "--tlsAllowConnectionsWithoutCertificates"], files


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


def _end_with(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until it accepts connections; tells whether it could get its port. The manager's deadline ends this."""
    while True:
        status = process.poll()
        if status == _PORT_TAKEN:
            return False
        if status is not None:
            meaning = f": {_MEANINGS[status]}" if status in _MEANINGS else ""
            raise SystemExit(f"mongod has ended with status {status}{meaning}; its output is above")
        if _listens(process.pid, port):
            return True
        time.sleep(_STEP)


def _listens(pid: int, port: int) -> bool:
    """Tell whether it is this very process that listens: somebody else who does shall not be told a password."""
    table = Path("/proc/self/net/tcp")
    if not table.exists():  # no Linux
        with contextlib.suppress(OSError):
            socket.create_connection((messages.LOOPBACK, port), 1).close()
            return True
        return False
    lines = [line.split() for line in table.read_text().splitlines()[1:]]
    inodes = {line[9] for line in lines if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port}
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(entry.readlink())[len("socket:[") : -1] in inodes:
                    return True
    return False


def _make_user(port: int, settings: dict[str, Any]) -> None:
    """Make the user, or find it made: whoever comes from the same machine may make the first one."""
    from pymongo import MongoClient
    from pymongo.errors import OperationFailure

    user, password = settings["user"], settings["password"]
    authority = Path(os.environ["LAZYCLUSTER_SCRATCH"], "authority.pem")
    authority.write_text(settings["authority"], "ascii")
    options: dict[str, Any] = {"serverSelectionTimeoutMS": 30_000, "directConnection": True}
    options |= {"socketTimeoutMS": _ANSWER_LIMIT, "tls": True, "tlsCAFile": str(authority)}
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
