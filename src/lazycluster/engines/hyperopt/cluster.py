"""A Hyperopt cluster on the hosts of a group: https://hyperopt.github.io/hyperopt.

The trials are in a database on the manager; workers on the hosts take them from there, through the connections that
the runtimes have anyway. The database listens on the loopback interface only, on both sides, and asks for a password
that is made for the one cluster: hyperopt unpickles what it finds there, so whoever can write to it could run
anything on the hosts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazycluster.cluster import connection_file
from lazycluster.cluster.contracts import DEFAULT_TIMEOUT, MasterLauncher, WorkerLauncher
from lazycluster.cluster.engine import CheckVersions, checked_policy
from lazycluster.cluster.engine_cluster import EngineCluster
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.sent.messages import LOOPBACK
from lazycluster.cluster.versions import check_manager
from lazycluster.core.words import counted
from lazycluster.output.view import Fact

from .database import database, make_directory
from .engine import HyperoptEngine
from .masters import EmbeddedMongoLauncher, LocalMongoLauncher, default_launcher
from .programs import compat, trials
from .progress import SearchProgress, progress_of
from .workers import RoundRobinLauncher

if TYPE_CHECKING:
    from hyperopt.mongoexp import MongoTrials

    from lazycluster.background.client import BackgroundProcess
    from lazycluster.runtime_mgmt import RuntimeGroup

    from .plot import LossPlot

__all__ = ["EmbeddedMongoLauncher", "HyperoptCluster", "LocalMongoLauncher", "RoundRobinLauncher", "SearchProgress"]

logger = logging.getLogger("lazycluster")


class HyperoptCluster(EngineCluster):
    """A Hyperopt cluster. The number of workers defaults to the number of runtimes in the group.

    An objective that raises, or ends its process, costs that one trial, which is then in the state ``ERROR``, with a
    traceback. A trial whose worker was killed, or whose host has gone, is put back and evaluated by another one, up to
    three times. Trials survive the manager: start a cluster on the same `dbpath`, and call `fmin` with the same
    ``exp_key`` and a higher ``max_evals``.

    Args:
        runtime_group: The hosts that can be used.
        master_launcher: How the database is started: a `MasterLauncher`, or a class of it; by default
            `EmbeddedMongoLauncher`, or `LocalMongoLauncher` if a `mongod` has made the files in `dbpath`.
        worker_launcher: How the workers are started: a `WorkerLauncher`, or a class of it; by default
            `RoundRobinLauncher`.
        dbpath: The directory of the database, made if it is missing; by default ``mongodb`` in
            `Environment.main_directory`.
        dbname: The name of the database.
        worker_poll_intervall: Seconds between two looks of an idle worker for a trial, at most.
        exp_key: The only search whose trials the workers take; by default all.
        lease: Seconds after which the trial of a worker that is not heard of any more is put back.
        min_workers: How many workers must be there for a start to succeed; by default all.
        check_versions: What happens if Python, hyperopt or cloudpickle of a host do not match the manager's:
            ``error``, ``warn`` or ``ignore``.
        gpus_per_worker: How many GPUs of its host each worker gets for itself, see `MasterWorkerCluster`.
        idle_gpus: Whether GPUs are left alone that others use.
        name: Have the cluster in the background, under this name: in a process of its own, which goes on when this
            program ends, until `cleanup` or ``lazycluster down NAME``. See `lazycluster.connect`. By default it is in
            this process.

    Raises:
        ClusterError: If hyperopt or PyMongo is not installed here.
        PermissionError: If `dbpath` does not exist, and may not be made.
        ValueError: If an argument makes no sense.

    Examples:
        >>> with HyperoptCluster(RuntimeGroup(hosts=["host-1", "host-2"])) as cluster:          # doctest: +SKIP
        ...     cluster.start()
        ...     trials = MongoTrials(cluster.mongo_trial_url, exp_key="first")
        ...     space, how = hp.uniform("x", -1, 1), {"trials": trials, "max_queue_len": 4}
        ...     best = fmin(lambda x: x * x, space, tpe.suggest, 100, **how)
    """

    engine_class = HyperoptEngine
    DEFAULT_MASTER_PORT = 27017
    _workers_talk = False

    def __init__(
        self,
        runtime_group: RuntimeGroup,
        master_launcher: MasterLauncher | type[MasterLauncher] | None = None,
        worker_launcher: WorkerLauncher | type[WorkerLauncher] | None = None,
        dbpath: str | None = None,
        dbname: str = "hyperopt",
        worker_poll_intervall: float = 0.1,
        *,
        exp_key: str | None = None,
        lease: float = 30.0,
        min_workers: int | None = None,
        check_versions: CheckVersions = "error",
        gpus_per_worker: int | None = None,
        idle_gpus: bool = False,
        name: None = None,
    ) -> None:
        checked_policy(check_versions)
        options: dict[str, Any] = {"dbpath": dbpath, "dbname": dbname, "poll_interval": worker_poll_intervall}
        options |= {"exp_key": exp_key, "lease": lease}
        check_manager(engine := HyperoptEngine(**options))
        compat.load()
        compat.no_workers = ClusterError
        make_directory(engine.dbpath)
        if isinstance(worker_launcher, type) and issubclass(worker_launcher, RoundRobinLauncher):
            worker_launcher = worker_launcher(runtime_group, dbname, worker_poll_intervall)
        super().__init__(
            runtime_group,
            None,
            master_launcher,
            worker_launcher,
            min_workers=min_workers,
            check_versions=check_versions,
            gpus_per_worker=gpus_per_worker,
            idle_gpus=idle_gpus,
            **options,
        )

    @property
    def _hyperopt(self) -> HyperoptEngine:
        assert isinstance(self._engine, HyperoptEngine)
        return self._engine

    def _default_master_launcher(self) -> MasterLauncher:
        return default_launcher(self._hyperopt.dbpath)(self._group)

    def _default_worker_launcher(self) -> WorkerLauncher:
        return RoundRobinLauncher(self._group, self._hyperopt.access.dbname, self._hyperopt.poll_interval)

    def _connect_launchers(self) -> None:
        for launcher in (self._master_launcher, self._worker_launcher):
            if hasattr(launcher, "hyperopt"):
                launcher.hyperopt = self._hyperopt
        super()._connect_launchers()

    # --- documented ----------------------------------------------------------------------------
    @property
    def dbname(self) -> str:
        """The name of the database."""
        return self._hyperopt.access.dbname

    @property
    def dbpath(self) -> str:
        """The directory of the database."""
        return str(self._hyperopt.dbpath)

    @property
    def mongo_url(self) -> str:
        """The address of the database as hyperopt writes it: ``mongo://user:password@host:port/dbname``.

        It has the password: do not print it. That the database is the right one is checked in this process only;
        `mongo_trial_url` also says how others know it.
        """
        return self._hyperopt.access.url(self._port()).partition("?")[0]

    @property
    def mongo_trial_url(self) -> str:
        """The address of the trials, which `MongoTrials` takes. It has the password: do not print it.

        It also names the file with the certificate by which the database is known, which is there as long as it runs.
        """
        return self._hyperopt.access.url(self._port(), path="/jobs")

    @property
    def pymongo_url(self) -> str:
        """The address of the database for `pymongo.MongoClient`. It has the password: do not print it."""
        return self._hyperopt.access.url(self._port(), "mongodb", options=compat.LOGIN)

    def start_master(self, master_port: int | None = None, timeout: int = DEFAULT_TIMEOUT, debug: bool = False) -> None:
        """Start the database. Trials that an earlier cluster left unfinished are put back into the queue.

        See `MasterWorkerCluster.start_master`.
        """
        super().start_master(master_port, timeout, debug)
        if self._hyperopt.access.authority_file is not None:
            compat.trust(LOOPBACK, self._port(), str(self._hyperopt.access.authority_file))
        if hasattr(self._master_launcher, "hyperopt"):
            with database(self._hyperopt.access, self._port()) as found:
                found.jobs.create_index([("state", 1), ("exp_key", 1)])
                # hyperopt takes numbers for trials from here; it waits for a second if it is the first to do so.
                found.job_ids.update_one({"a": 0}, {"$setOnInsert": {"last_id": 0}}, upsert=True)
                compat.tell_problem(found, None)
                number = trials.put_back(found.jobs, None, "the cluster was ended")
            if number:
                logger.info("%d unfinished trials are put back into the queue", number)

    # --- for searches --------------------------------------------------------------------------
    def trials(self, exp_key: str | None = None) -> MongoTrials:
        """Return the trials of a search, for `fmin`.

        Args:
            exp_key: The name of the search; None: all searches in this database.

        Raises:
            ClusterError: If the cluster does not run.
        """
        return compat.load().MongoTrials(self.mongo_trial_url, exp_key=exp_key)

    @staticmethod
    def connect(path: str | os.PathLike[str], exp_key: str | None = None) -> MongoTrials:
        """Return the trials of a cluster that another process of this user has started, for `fmin`.

        Args:
            path: The file that `write_connection_file` or ``lazycluster start hyperopt --connection-file`` has written.
            exp_key: The name of the search; None: all searches in this database.

        Raises:
            ClusterError: If the file is not there, is not this user's own, or its cluster does not answer.
        """
        shape = {"mongo_trial_url": str, "manager?": int}
        found = connection_file.read(path, HyperoptCluster.__name__, shape)
        from pymongo.errors import PyMongoError

        try:
            return _trials(found, exp_key)
        except (ValueError, TypeError):  # they may tell a part of it, which has a password in it
            raise connection_file.unusable(path, "mongo_trial_url is not the address of a database") from None
        except PyMongoError as error:
            raise connection_file.unanswered(path, found, str(error)) from None

    @classmethod
    def connect_to(cls, process: BackgroundProcess, exp_key: str | None = None, **options: Any) -> MongoTrials:
        """Return the trials of a cluster in the background, see `lazycluster.connect`.

        Args:
            process: The cluster's process.
            exp_key: The name of the search; None: all searches in this database.
            **options: Further ones of `MongoTrials`.

        Raises:
            BackgroundError: If the process does not answer.
        """
        return _trials(process.request("connection"), exp_key, **options)

    def _connection(self) -> dict[str, Any]:
        return {"mongo_trial_url": self.mongo_trial_url}

    def progress(self, exp_key: str | None = None) -> SearchProgress:
        """Return how far a search is, also while `fmin` runs in another thread or process.

        Args:
            exp_key: The name of the search; None: all searches in this database.

        Raises:
            ClusterError: If the cluster does not run.
        """
        with database(self._hyperopt.access, self._port()) as found:
            return progress_of(found.jobs, exp_key)

    def plot(self, exp_key: str | None = None, path: str | Path | None = None) -> LossPlot:
        """Return a picture of a search: the losses of its trials, and the best one so far.

        Args:
            exp_key: The name of the search; None: all searches in this database.
            path: Where to write it, too, e.g. ``losses.png`` or ``losses.svg``.

        Returns:
            A `matplotlib.figure.Figure`, which a notebook shows if it is the result of a cell.

        Raises:
            ClusterError: If the cluster does not run, or matplotlib is not installed here.
        """
        from .plot import plot_losses

        with database(self._hyperopt.access, self._port()) as found:
            return plot_losses(found.jobs, exp_key, path)

    def _problem(self) -> str:
        # Trials can be looked at without workers, and there may be workers again.
        return self._master_problem()

    def _port(self) -> int:
        self._check_alive()
        if self.master_port is None:
            raise ClusterError("the database does not run: call start(), or start_master() first")
        return self.master_port

    # --- the end -------------------------------------------------------------------------------
    def cleanup(self) -> None:
        """End the workers, the database and the tunnels; the trials stay on the disk. Doing it again does nothing."""
        port = self.master_port
        if port is not None:
            compat.close_clients(port)
        super().cleanup()

    @contextlib.contextmanager
    def _work_line(self) -> Iterator[Callable[[], str]]:
        yield lambda: str(self.progress())

    def _facts(self) -> list[Fact]:
        return [("database", f"{self.dbname} in {self.dbpath}"), *super()._facts()]

    def __repr__(self) -> str:
        workers = counted(len(getattr(self._worker_launcher, "workers", [])), "worker")
        return f"<HyperoptCluster {self._present_state}, port {self.master_port}, {workers}, {self.dbpath}>"


def _trials(connection: Mapping[str, Any], exp_key: str | None, **options: Any) -> MongoTrials:
    """Return the trials of a cluster of another process."""
    return compat.load().MongoTrials(connection["mongo_trial_url"], exp_key=exp_key, **options)
