"""The database of a Hyperopt cluster, on the manager: our own small server, or the user's `mongod`."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.contracts import DefaultTimeout
from lazycluster.cluster.engine import Endpoint
from lazycluster.cluster.exceptions import MasterStartError
from lazycluster.cluster.master_launcher import ServiceMasterLauncher
from lazycluster.cluster.sent.messages import LOOPBACK
from lazycluster.cluster.service_spec import ServiceSpec

from .database import make_directory
from .engine import HyperoptEngine, program

if TYPE_CHECKING:
    from lazycluster.runtime_mgmt import RuntimeGroup

__all__ = ["EmbeddedMongoLauncher", "LocalMongoLauncher"]

_DEFAULT_TIMEOUT = DefaultTimeout(0)  # as documented: as soon as it answers
_OURS, _THEIRS = "lazycluster-mongo.sqlite", "WiredTiger"
_PASSWORD = "lazycluster-password"  # noqa: S105  (a file's name)


def default_launcher(dbpath: Path) -> type[EmbeddedMongoLauncher | LocalMongoLauncher]:
    """Return the launcher for a directory: `mongod` if it has made the files, else our own server."""
    if (dbpath / _THEIRS).exists() and not (dbpath / _OURS).exists():
        return LocalMongoLauncher
    return EmbeddedMongoLauncher


class _DatabaseLauncher(ServiceMasterLauncher):
    """Base of the launchers of databases."""

    RESTARTS = 5
    """Number of restarts of a database that dies, within minutes, on the same port; workers wait for it."""

    def __init__(self, runtime_group: RuntimeGroup) -> None:
        self.hyperopt = HyperoptEngine()
        super().__init__(runtime_group, self.hyperopt)

    async def prepare(self, debug: bool) -> None:
        """Start the process, and make the certificates by which the database is known."""
        await super().prepare(debug)
        if self.hyperopt.access.identity is None:
            assert self._space is not None
            self.hyperopt.access.make_identity(self._space.directory)

    async def _stop(self) -> None:
        self.hyperopt.access.forget_identity()
        await super()._stop()

    def start(self, ports: list[int] | int, timeout: int = _DEFAULT_TIMEOUT, debug: bool = False) -> list[int]:
        """Start the database.

        Args:
            ports: Its port; or a list, of which the first port is taken that is free on the manager and in the group.
            timeout: Seconds until it must be there. A number that you give holds as it is; by default the database may
                take as long as it needs, up to a limit of our own.
            debug: Whether its output is printed as it comes.

        Returns:
            The ports of the list that are left; an empty list if a single port was given.

        Raises:
            PortInUseError: If a single port was given, and it is not free on the manager and on all hosts.
            NoPortsLeftError: If no port of the list is free.
            MasterStartError: If it was not there in time; the message has the end of its output.
        """
        return super().start(ports, timeout, debug)

    def _refuse(self, name: str, file: str, maker: str) -> None:
        if (self.hyperopt.dbpath / file).exists():
            problem = f"{self.hyperopt.dbpath} has a database of {maker}"
            raise MasterStartError(name, problem=problem, hint=f"use {maker}, or another dbpath")


class EmbeddedMongoLauncher(_DatabaseLauncher):
    """Starts our own server on the manager: as much of a MongoDB as hyperopt needs; see `lazycluster.mongo`.

    Args:
        runtime_group: The group where the workers will be started.
    """

    def spec(self, at: Endpoint) -> ServiceSpec:
        """Return what the server is."""
        self._refuse("hyperopt-database", _THEIRS, "mongod")
        make_directory(self.hyperopt.dbpath)
        return replace(super().spec(at), restarts=self.RESTARTS)


class LocalMongoLauncher(_DatabaseLauncher):
    """Starts the user's own `mongod` on the manager: on loopback only, with a password.

    It is watched by a small program, which makes the user and ends with it. The password is kept in the directory of
    the database, where only the owner can read it, since the database remembers it, too.

    This was tried with a stand-in for `mongod` only, not with a real one.

    Args:
        runtime_group: The group where the workers will be started.
    """

    def spec(self, at: Endpoint) -> ServiceSpec:
        """Return what the program is that watches `mongod`."""
        self._refuse("mongod", _OURS, "EmbeddedMongoLauncher")
        if shutil.which("mongod") is None:
            raise MasterStartError(
                "mongod",
                problem="it is not on the PATH",
                hint="install MongoDB, or leave the launcher out to use lazycluster's own server",
            )
        make_directory(self.hyperopt.dbpath)
        self.hyperopt.access.password = _kept_password(self.hyperopt.dbpath / _PASSWORD, self.hyperopt.access.password)
        told = lambda: self._told(at)  # noqa: E731
        return program("mongod", "programs.mongod", settings=told, restarts=self.RESTARTS, patience=10.0)

    def _told(self, at: Endpoint) -> dict[str, Any]:
        return {
            **self.hyperopt.database_settings(at),
            "argv": self._argv(at.port),
            "authority": self.hyperopt.access.authority,
        }

    def _argv(self, port: int) -> list[str]:
        return [
            *("mongod", "--dbpath", str(self.hyperopt.dbpath), "--bind_ip", LOOPBACK),
            *("--port", str(port), "--auth", "--nounixsocket"),
        ]

    def get_mongod_start_cmd(self) -> str:
        """Return the shell command that starts `mongod`. It stays in the foreground, so that it can be watched.

        The cluster adds the options for TLS, whose files are in the memory of the program that watches it.
        """
        return shlex.join(self._argv(self.port or 27017))

    def get_mongod_stop_cmd(self) -> str:
        """Return the shell command that stops the `mongod` of the database's directory."""
        return shlex.join(["mongod", "--dbpath", str(self.hyperopt.dbpath), "--shutdown"])


def _kept_password(path: Path, new: str) -> str:
    """Return the password that is kept in a file; the new one if there is none yet."""
    try:
        with open(path, "x", encoding="ascii", opener=_private) as file:
            file.write(new)
    except FileExistsError:
        return path.read_text("ascii").strip()
    return new


def _private(path: str, flags: int) -> int:
    import os

    return os.open(path, flags, 0o600)
