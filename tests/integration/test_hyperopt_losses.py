"""What a search loses: workers, hosts, all of them. Trials are not lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

pytest.importorskip("hyperopt")
pytest.importorskip("pymongo")

from cluster_groups import local_group, ssh_group

from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster, RoundRobinLauncher

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this module

pytestmark = [  # by hyperopt
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning"),
]

NEW, RUNNING, DONE, ERROR = range(4)
_PATIENCE = 60.0


def _search(cluster: HyperoptCluster, objective: Callable[[float], Any], key: str, evals: int) -> Any:
    """Run a search; returns its trials."""
    import numpy
    from hyperopt import fmin, hp, rand

    trials = cluster.trials(key)
    options: dict[str, Any] = {"rstate": numpy.random.default_rng(3), "show_progressbar": False, "max_queue_len": evals}
    space = hp.uniform("x", -10, 10)
    fmin(objective, space, algo=rand.suggest, max_evals=evals, trials=trials, return_argmin=False, **options)
    return trials


def _documents(trials: Any) -> list[Any]:
    return list(trials.handle.jobs.find({"exp_key": trials._exp_key}).sort("tid", 1))


def _until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def _meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread, whose failure is the test's."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    if failures:
        raise failures[0]


def test_a_late_write_is_refused(tmp_path: Path) -> None:
    from lazycluster.engines.hyperopt.programs import evaluator, trials

    with local_group(1) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start_master()
        handle = cluster.trials("late").handle
        misc = {"tid": 0, "cmd": ("x", "y"), "idxs": {}, "vals": {}}
        job = {"tid": 0, "state": NEW, "owner": None, "version": 0, "exp_key": "late", "result": {}, "misc": misc}
        handle.jobs.insert_one(job)
        queues = []
        for name in ("old", "new"):
            queue = evaluator.Jobs(handle.db, handle.jobs, handle.gfs, handle.conn, None, "")
            queue.owner = (name, f"{name}#1")
            queues.append(queue)
        old, new = queues
        lost = old.reserve(None)
        assert old.update(lost, {"result": {"loss": 3.0}})["version"] == 1
        assert trials.put_back(handle.jobs, "old", "it is gone") == 1
        with pytest.raises(evaluator.TrialLostError):  # nobody has it
            old.update(lost, {"state": DONE})
        won = new.reserve(None)
        assert won["owner"] == ["new", "new#1"]
        # Whatever the old owner believes of the version; hyperopt itself looks at nothing else.
        for version in range(5):
            with pytest.raises(evaluator.TrialLostError):
                old.update({**lost, "version": version}, {"state": DONE, "result": {"loss": 1.0}})
        new.update(won, {"result": {"loss": 2.0}})
        new.update(won, {"state": DONE})
        trials.fail(handle.jobs, lost, "old#1", ValueError("late"), "")
        with pytest.raises(evaluator.TrialLostError):
            old.update(lost, {"state": ERROR, "error": ("a", "b")})
        (document,) = handle.jobs.find()
        assert (document["state"], document["result"], document["owner"]) == (DONE, {"loss": 2.0}, ["new", "new#1"])
        assert document["attempts"] == 1


@pytest.mark.soak
def test_the_trial_of_a_silent_worker_is_put_back(tmp_path: Path) -> None:
    """A worker that stands still: nobody says that it has gone, its lease ends, and what it says later is not heard."""
    begun = tmp_path / "begun"

    def objective(x: float) -> float:
        try:
            with begun.open("x") as file:
                file.write(f"{os.getppid()}\n")
        except FileExistsError:
            return x
        time.sleep(0.5)  # it stands still in here
        return -1000

    with local_group(2) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db"), lease=1.0) as cluster:
        cluster.start()

        def tree(number: signal.Signals) -> None:
            pid = int(begun.read_text())
            for child in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
                os.kill(child, number)

        def stop_in_trial() -> None:
            _until(lambda: begun.exists() and begun.read_text().endswith("\n"), "the trial to begin")
            tree(signal.SIGSTOP)

        with _meanwhile(stop_in_trial):
            trials = _search(cluster, objective, "silent", 6)
        documents = _documents(trials)
        assert [document["state"] for document in documents] == [DONE] * 6
        workers = {worker.service.pid: worker for worker in cluster._worker_launcher.workers}
        silent = workers.pop(int(begun.read_text()))
        (again,) = [document for document in documents if document.get("attempts")]
        assert again["owner"][0] == next(iter(workers.values())).name
        tree(signal.SIGCONT)
        _until(lambda: "was put back" in silent.service.last_output(), "the late write")
        assert _documents(trials) == documents
        assert silent.service.state == "ready"
        assert len(_search(cluster, lambda x: x, "after that", 4).trials) == 4


def test_what_a_search_needs_of_a_database_that_was_killed_waits_for_the_next_one(tmp_path: Path) -> None:
    with local_group(1) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start_master()

        def kill() -> None:  # what is connected to it stays so, until it is used
            process = cluster._master_launcher.process
            assert process is not None
            restarts = cluster.master.restarts if cluster.master else 0
            os.kill(process.pid, signal.SIGKILL)
            _until(lambda: cluster.master and cluster.master.restarts > restarts, "the database's end to be noticed")

        cluster.trials("one").attachments["objective"] = b"before"
        kill()
        trials = cluster.trials("one")
        kill()
        trials.attachments["objective"] = b"after"
        assert trials.attachments["objective"] == b"after"


class _NoRestarts(RoundRobinLauncher):
    RESTARTS = 0


def test_a_search_ends_with_an_error_when_no_worker_is_left(tmp_path: Path) -> None:
    def objective(x: float) -> float:
        if not Path(os.environ["WORKING_DIR"], "spare").exists():
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return x

    with local_group(1) as group, HyperoptCluster(group, None, _NoRestarts, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start()
        with pytest.raises(ClusterError, match=r"no worker is left .*local0-0: (.|\n)*same dbpath"):
            _search(cluster, objective, "all gone", 5)
        trials = cluster.trials("all gone")
        assert Counter(document["state"] for document in _documents(trials)) == {NEW: 5}
        progress = cluster.progress("all gone")
        assert (progress.waiting, progress.done) == (5, 0)
        assert "no worker is left" in str(progress)
        # There may be workers again, and then it goes on.
        for runtime in group.runtimes:
            runtime.call(lambda: Path(os.environ["WORKING_DIR"], "spare").touch())
        cluster.start_workers(1)
        assert cluster.progress().problem is None
        trials = _search(cluster, objective, "all gone", 5)
        assert Counter(document["state"] for document in _documents(trials)) == {DONE: 5}


@pytest.mark.soak
def test_a_search_survives_all_of_it(make_hosts: Callable[..., Any], tmp_path: Path) -> None:
    """Objectives that raise, and exit; workers that are killed in the middle of a trial; a host that is powered off."""

    def objective(x: float) -> float:
        time.sleep(0.02)
        if 9 < x < 10:
            raise ValueError("a part of the space that cannot be evaluated")
        if 8 < x < 9:
            os._exit(3)
        if x > 7 and os.uname().nodename != doomed:
            Path(os.environ["WORKING_DIR"], "busy").touch()
            time.sleep(0.5)  # some are killed in here
        if x > 6 and os.uname().nodename == doomed:
            Path(os.environ["WORKING_DIR"], "last").touch()
            time.sleep(60)
        return (x - 3) ** 2

    hosts = make_hosts(3)
    # Nobody waits for the trials of a host that may only have lost its network.
    links = {"link_timeout": 3.0, "grace": 3.0}
    with (
        ssh_group(hosts, connection_kwargs=links) as group,
        HyperoptCluster(group, dbpath=str(tmp_path / "db"), lease=4.0) as cluster,
    ):
        cluster.start(worker_count=6)
        places = [runtime.call(lambda: (os.uname().nodename, os.environ["WORKING_DIR"])) for runtime in group.runtimes]
        doomed = places[2][0]
        victims = cluster._worker_launcher.workers[:2]

        def break_things() -> None:
            for index in (0, 1):
                _until(hosts[index].path(f"{places[index][1]}/busy").exists, "a trial")
                hosts[index].run(f"kill -9 {victims[index].service.pid}")
            _until(hosts[2].path(f"{places[2][1]}/last").exists, "a trial")
            hosts[2].power_off()

        with _meanwhile(break_things):
            trials = _search(cluster, objective, "all", 200)
        documents = _documents(trials)
        assert len(documents) == len({document["tid"] for document in documents}) == 200
        for document in documents:
            x = document["misc"]["vals"]["x"][0]
            assert document["state"] == (ERROR if x > 8 else DONE), document
        wanted = min((document["misc"]["vals"]["x"][0] for document in documents), key=lambda x: abs(x - 3))
        assert trials.argmin == {"x": wanted}
        assert [worker.service.restarts for worker in victims] == [1, 1]
        assert sum(document.get("attempts", 0) for document in documents) >= 3
        assert cluster.progress("all").problem is None


def test_only_the_directory_of_a_trial_is_removed_after_it(tmp_path: Path) -> None:
    from lazycluster.engines.hyperopt.programs import evaluator

    work = tmp_path / "lost" / "if this fails" / "work"
    (work / "data").mkdir(parents=True)
    for name in ("..", ".", "", "data", "../work", "a" * 23):
        evaluator._remove_scratch({"misc": {"workdir": str(work)}, "_id": name})
        assert (work / "data").is_dir(), name
