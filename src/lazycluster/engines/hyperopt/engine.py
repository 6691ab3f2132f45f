"""The statement of Hyperopt: the database and the workers, what they are told, and what they share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from lazycluster.cluster.engine import Endpoint, Engine, Option
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.sent.messages import LOOPBACK, MARKER
from lazycluster.cluster.service_spec import ServiceSpec, Source
from lazycluster.core.certificates import Identity, make_identities, valid_until
from lazycluster.utils import Environment, expanded

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess

from .database import checked_name, checked_seconds, database
from .programs import compat, trials
from .programs.worker import PACKAGES

__all__ = ["HyperoptEngine", "program"]

_SHARED = ("cluster.sent", "agent.deletion", "agent.localmodules")


def program(name: str, module: str, **options: Any) -> ServiceSpec:
    """Return one of our own programs, by its name and its module."""
    source = Source.of(f"lazycluster.engines.hyperopt.{module}", "lazycluster_hyperopt", _SHARED)
    return ServiceSpec(name, source=source, marker=MARKER, **options)


class HyperoptEngine(Engine):
    """Statement of one Hyperopt cluster; for its arguments see `HyperoptCluster`.

    Attributes:
        user: Who logs in. hyperopt looks for this one, and no other, in the database ``admin``.
        password: The password, made anew for each cluster.
        authority: The certificate by which the database is known, made anew for each start of it; "" if it is one
            that somebody else's launcher starts, and that has none.
        identity: Its own certificate and key.
        authority_file: The file on the manager with the certificate of the authority, for clients of the database.
    """

    name, cluster, module = "hyperopt", "HyperoptCluster", "lazycluster.cluster.hyperopt_cluster"
    extra = "hyperopt"
    packages, manager_packages = ("hyperopt", "pymongo"), ("cryptography",)
    same_versions, told_versions = ("hyperopt", "cloudpickle"), PACKAGES
    master_name, sent = "database", True
    options = (
        Option("--dbpath", "dbpath", "Keep the trials there, to go on with them later.", "DIR", "directory"),
        Option(
            "--dbname", "dbname", "The name of the database (hyperopt).", "NAME", "text", "hyperopt", True, checked_name
        ),
        Option("--exp-key", "exp_key", "Work on this search only (on all).", "KEY", safe=True),
    )
    help = """Start a Hyperopt cluster: the database of the trials here, the workers on the hosts.

    Trials that are done stay in --dbpath: start it again there, and fmin goes on where it was.

    \b
    Examples:
      lazycluster start hyperopt -w @all --dbpath trials --connection-file s.json
    then, in Python:
      from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
      trials = HyperoptCluster.connect("s.json", exp_key="svm-1")
    """

    def __init__(
        self,
        dbpath: str | None = None,
        dbname: str = "hyperopt",
        poll_interval: float = 0.1,
        exp_key: str | None = None,
        lease: float = 30.0,
    ) -> None:
        self.dbpath = (
            expanded(dbpath).absolute() if dbpath is not None else Path(Environment.main_directory) / "mongodb"
        )
        self.dbname, self.exp_key = checked_name(dbname), exp_key
        self.poll_interval = checked_seconds(poll_interval, "the poll interval")
        self.lease = checked_seconds(lease, "lease")
        self.user, self.password = "hyperopt", secrets.token_urlsafe(24)
        self.authority, self.identity, self.authority_file = "", None, None
        self._trials = 0

    authority: str
    identity: Identity | None
    authority_file: Path | None

    # --- the processes -------------------------------------------------------------------------
    def master(self, at: Endpoint) -> ServiceSpec:
        """Return what our own server for the database is."""
        told = lambda: self.database_settings(at)  # noqa: E731
        return program("hyperopt-database", "mongo.program", settings=told, patience=5.0)

    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        """Return what a worker is."""
        return program("hyperopt-worker", "programs.worker", settings=lambda: self._worker(at, master))

    def database_settings(self, at: Endpoint) -> dict[str, Any]:
        """Return what a database is told."""
        login = {"user": self.user, "password": self.password}
        identity = self.identity
        tls = {"certificate": identity.certificate, "key": identity.key} if identity is not None else None
        return {"ports": at.ports, "dbpath": str(self.dbpath), **login, "tls": tls}

    def _worker(self, at: Endpoint, master: Endpoint) -> dict[str, Any]:
        login = {"port": master.port, "dbname": self.dbname, "user": self.user, "password": self.password}
        times = {"poll_interval": self.poll_interval, "lease": self.lease}
        return {**login, "authority": self.authority, **times, "name": at.name, "exp_key": self.exp_key}

    def is_busy(self, master: Endpoint) -> bool:
        """Return True if trials wait or are evaluated, or have come since this was asked before."""
        from pymongo.errors import PyMongoError

        try:
            with database(self, master.port) as found:
                states = [trial["state"] for trial in found.jobs.find({}, projection=["state"])]
        except PyMongoError as error:
            raise ClusterError(f"the database does not answer: {error}") from None
        before, self._trials = self._trials, len(states)
        return len(states) != before or bool({trials.NEW, trials.RUNNING} & set(states))

    def adopt(self, connection: Mapping[str, Any], process: BackgroundProcess) -> None:
        """Take over what a client needs."""
        address = urlsplit(str(connection["mongo_trial_url"]))
        self.user, self.password = str(address.username), str(address.password)
        for file in parse_qs(address.query).get(compat.AUTHORITY, []):
            self.authority_file = Path(file)

    def valid_until(self) -> float | None:
        """Return when the certificate of the database expires, in seconds since 1970."""
        return None if self.identity is None else valid_until(self.identity.certificate)

    # --- what they share -----------------------------------------------------------------------
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
