"""What the parts of a Hyperopt cluster have in common, and how they get at its database."""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from lazycluster.agent.ownership import make
from lazycluster.cluster.certificates import Identity, make_identities
from lazycluster.cluster.programs import Source
from lazycluster.cluster.sent.messages import LOOPBACK
from lazycluster.cluster.versions import CheckVersions
from lazycluster.utils import Environment

from .programs import compat

_ANSWER_LIMIT = 5000  # milliseconds
_SHARED = ("cluster.sent", "agent.deletion", "agent.localmodules")


def program_source(module: str) -> Source:
    """Return one of the programs that are sent, by its module."""
    return Source.of(f"lazycluster.engines.hyperopt.programs.{module}", "lazycluster_hyperopt", _SHARED)


@dataclass
class HyperoptSettings:
    """What the parts of one cluster have in common.

    Attributes:
        dbpath: The directory of the database.
        dbname: The name of the database.
        poll_interval: Seconds between two looks of an idle worker for a trial, at most.
        exp_key: The only search whose trials the workers take; None: all.
        check_versions: What happens if a host's software does not match.
        lease: Seconds without a sign of life after which the trials of a worker are put back.
        user: Who logs in. hyperopt looks for this one, and no other, in the database ``admin``.
        password: The password, made anew for each cluster.
        authority: The certificate by which the database is known, made anew for each start of it; "" if it is one
            that somebody else's launcher starts, and that has none.
        identity: Its own certificate and key.
        authority_file: The file on the manager with the certificate of the authority, for clients of the database.
    """

    dbpath: Path = field(default_factory=lambda: Path(Environment.main_directory) / "mongodb")
    dbname: str = "hyperopt"
    poll_interval: float = 0.1
    exp_key: str | None = None
    check_versions: CheckVersions = "error"
    lease: float = 30.0
    user: str = "hyperopt"
    password: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    authority: str = field(default="", repr=False)
    identity: Identity | None = None
    authority_file: Path | None = None

    def url(self, port: int, scheme: str = "mongo", path: str = "", options: Mapping[str, str] | None = None) -> str:
        """Return the address of the database, password included.

        Args:
            port: The port.
            scheme: How it begins.
            path: What follows the name of the database.
            options: What follows in the query, beside what tells how the database is known.
        """
        address = f"{scheme}://{self.user}:{self.password}@{LOOPBACK}:{port}/{self.dbname}{path}"
        known = {"tls": "true", compat.AUTHORITY: str(self.authority_file)} if self.authority_file else {}
        query = urlencode({**(options or {}), **known}, safe="/")
        return f"{address}?{query}" if query else address

    def login(self, port: int) -> dict[str, Any]:
        """Return what our own programs log in with."""
        login = {"port": port, "dbname": self.dbname, "user": self.user, "password": self.password}
        return {**login, "authority": self.authority}

    def make_identity(self, directory: str) -> None:
        """Make certificates for a database that is to be started.

        Args:
            directory: A private directory, where that of the authority is put.
        """
        self.authority, identities = make_identities("database")
        self.identity = identities["database"]
        self.authority_file = Path(directory, f"database-{secrets.token_hex(4)}.pem")
        self.authority_file.write_text(self.authority, "ascii")

    def forget_identity(self) -> None:
        """Forget the certificates: the database has ended."""
        if self.authority_file is not None:
            self.authority_file.unlink(missing_ok=True)
        self.authority, self.identity, self.authority_file = "", None, None


def make_directory(path: Path) -> None:
    """Make the directory of a database if it is missing; only its owner can read it.

    Raises:
        PermissionError: If that is not allowed.
        OSError: If it cannot be made.
    """
    try:
        make(str(path), 0o700, Environment.trust_group)
    except PermissionError as error:
        why = f"{error.filename}: {error.strerror}" if error.errno == errno.EPERM else str(path)
        raise PermissionError(error.errno, f"the directory of the database cannot be used: {why}") from None


def checked_name(name: str) -> str:
    """Return the name of a database.

    Raises:
        ValueError: If it cannot be one.
    """
    if not isinstance(name, str) or not name or len(name) > 63 or set(name) & set('/\\. "$*<>:|?@#%\0'):
        raise ValueError(f'dbname must be a name of at most 63 characters without /\\. "$*<>:|?@#%, not {name!r}')
    return name


def checked_seconds(interval: float, what: str) -> float:
    """Return a time in seconds.

    Raises:
        ValueError: If it cannot be one.
    """
    if isinstance(interval, bool) or not isinstance(interval, (int, float)) or not 0 < interval < 3600:
        raise ValueError(f"{what} must be a positive number of seconds, not {interval!r}")
    return float(interval)


def connect(settings: HyperoptSettings, port: int) -> Any:
    """Return a client of the database of a cluster, to be closed."""
    from pymongo import MongoClient

    url = settings.url(port, "mongodb", options=compat.LOGIN)
    return MongoClient(url, serverSelectionTimeoutMS=_ANSWER_LIMIT, directConnection=True)


@contextlib.contextmanager
def database(settings: HyperoptSettings, port: int) -> Iterator[Any]:
    """Connect to the database of a cluster, for a moment."""
    client = connect(settings, port)
    try:
        yield client[settings.dbname]
    finally:
        client.close()
