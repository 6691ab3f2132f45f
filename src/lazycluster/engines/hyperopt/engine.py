"""The statement of Hyperopt: the database and the workers, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazycluster.cluster.engine import Endpoint, Engine, Option
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.sent.messages import MARKER
from lazycluster.cluster.service_spec import ServiceSpec, Source
from lazycluster.utils import Environment, expanded

if TYPE_CHECKING:
    from lazycluster.background.client import BackgroundProcess

from .access import DatabaseAccess
from .database import checked_name, checked_seconds, database
from .programs import trials
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
        access: What the database and those who use it need to know each other.
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
        self.access, self.exp_key = DatabaseAccess(checked_name(dbname)), exp_key
        self.poll_interval = checked_seconds(poll_interval, "the poll interval")
        self.lease = checked_seconds(lease, "lease")
        self._trials = 0

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
        return {"ports": at.ports, "dbpath": str(self.dbpath), **self.access.login, "tls": self.access.tls}

    def _worker(self, at: Endpoint, master: Endpoint) -> dict[str, Any]:
        there = {"port": master.port, "dbname": self.access.dbname, "authority": self.access.authority}
        times = {"poll_interval": self.poll_interval, "lease": self.lease}
        return {**there, **self.access.login, **times, "name": at.name, "exp_key": self.exp_key}

    def is_busy(self, master: Endpoint) -> bool:
        """Return True if trials wait or are evaluated, or have come since this was asked before."""
        from pymongo.errors import PyMongoError

        try:
            with database(self.access, master.port) as found:
                states = [trial["state"] for trial in found.jobs.find({}, projection=["state"])]
        except PyMongoError as error:
            raise ClusterError(f"the database does not answer: {error}") from None
        before, self._trials = self._trials, len(states)
        return len(states) != before or bool({trials.NEW, trials.RUNNING} & set(states))

    def adopt(self, connection: Mapping[str, Any], process: BackgroundProcess) -> None:
        """Take over what a client needs."""
        self.access.adopt(connection)

    def valid_until(self) -> float | None:
        """Return when the certificate of the database expires, in seconds since 1970."""
        return self.access.valid_until()
