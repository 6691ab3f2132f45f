"""A Hyperopt cluster on real SSH hosts: searches end with the right result, whatever objectives and hosts do."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

pytest.importorskip("hyperopt")
pytest.importorskip("pymongo")

import pymongo
from cluster_groups import connect, local_group, ssh_group

from lazycluster.cluster.exceptions import ClusterError, MasterStartError, VersionMismatchError
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
from lazycluster.runtime_mgmt import RuntimeGroup
from lazycluster.ssh import workspace

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this module

pytestmark = [  # by hyperopt
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning"),
]

NEW, RUNNING, DONE, ERROR = range(4)


@pytest.fixture(scope="module")
def group(module_hosts: Any, tmp_path_factory: Any) -> Iterator[RuntimeGroup]:
    with ssh_group(module_hosts) as group:
        yield group


@pytest.fixture(scope="module")
def cluster(group: RuntimeGroup, tmp_path_factory: Any) -> Iterator[HyperoptCluster]:
    with HyperoptCluster(group, dbpath=str(tmp_path_factory.mktemp("search") / "db")) as cluster:
        cluster.start()
        cluster.trials()  # the connection is kept, and with it PyMongo's threads
        yield cluster


def _search(cluster: HyperoptCluster, objective: Callable[[float], Any], key: str, evals: int = 12) -> list[Any]:
    """Run a search; returns the documents of its trials."""
    import numpy
    from hyperopt import fmin, hp, rand

    trials = cluster.trials(key)
    fmin(
        objective,
        hp.uniform("x", -10, 10),
        algo=rand.suggest,
        max_evals=evals,
        max_queue_len=evals,
        trials=trials,
        rstate=numpy.random.default_rng(3),
        show_progressbar=False,
        return_argmin=False,
    )
    return list(trials.handle.jobs.find({"exp_key": key}).sort("tid", 1))


def _states(documents: list[Any]) -> dict[int, int]:
    return dict(Counter(document["state"] for document in documents))


def test_a_search_on_three_hosts(cluster: HyperoptCluster, group: RuntimeGroup) -> None:
    import numpy
    from hyperopt import STATUS_OK, fmin, hp, tpe
    from hyperopt.mongoexp import MongoTrials

    def objective(x: float) -> dict[str, Any]:
        time.sleep(0.02)
        Path("of this trial").write_text("x")
        host = os.uname().nodename
        return {
            "loss": (x - 1) ** 2,
            "status": STATUS_OK,
            "exact": numpy.bool_(x > 0),
            "host": host,
            "data": Path(os.environ["WORKING_DIR"], "data.txt").read_text(),
            "url": os.environ["MONGO_CONNECTION_URL"],
            "before": os.listdir(".."),
        }

    for runtime in group.runtimes:
        runtime.call(lambda: Path(os.environ["WORKING_DIR"], "data.txt").write_text("found"))
    trials = MongoTrials(cluster.mongo_trial_url, exp_key="first")
    options = {"algo": tpe.suggest, "max_queue_len": 10, "show_progressbar": False}
    best = fmin(objective, hp.uniform("x", -5, 5), max_evals=30, trials=trials, **options)
    assert abs(best["x"] - 1) < 1.5
    assert len(trials.trials) == 30
    assert _states(trials.trials) == {DONE: 30}
    progress = cluster.progress("first")
    assert (progress.done, progress.running, progress.waiting, progress.failed) == (30, 0, 0, 0)
    assert progress.best_loss == min(trials.losses())
    assert sorted(progress.per_worker) == ["host1-0", "host2-0", "host3-0"]
    assert "30 done" in str(progress)
    used = cluster.usage(timeout=30)
    assert used.keys() == {worker.name for worker in cluster.workers}
    assert all(worker.memory > 10 << 20 for worker in used.values())
    results = trials.results
    assert len({result["host"] for result in results}) == 3
    assert {result["data"] for result in results} == {"found"}
    assert {result["url"] for result in results} == {cluster.mongo_url}
    assert all(len(result["before"]) == 2 for result in results)  # the directory of the trial, and hyperopt's mark
    assert all(isinstance(result["exact"], (bool, int)) for result in results)


def test_an_objective_that_fails_costs_its_trial_only(cluster: HyperoptCluster) -> None:
    def objective(x: float) -> float:
        if x < -5:
            raise ValueError("much too small \udc80 ä")
        if -5 < x < -2:
            os._exit(7)
        if -2 < x < 0:
            sys.exit("enough")
        if 0 < x < 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return x

    before = [worker.service.pid for worker in cluster._worker_launcher.workers]
    documents = _search(cluster, objective, "failing", 30)
    assert _states(documents).keys() == {DONE, ERROR}
    causes: dict[str, set[str]] = {"ValueError": set(), "WorkerDied": set(), "SystemExit": set()}
    for document in documents:
        x = document["misc"]["vals"]["x"][0]
        assert document["state"] == (ERROR if x < 2 else DONE)
        if x < 2:
            causes[document["error"][0]].add(document["error"][1])
            assert "in objective" in document.get("traceback", "in objective")
    assert causes == {
        "ValueError": {"much too small \\udc80 ä"},
        "WorkerDied": {f"the objective ended its process ({how})" for how in ("exit status 7", "signal SIGSEGV")},
        "SystemExit": {"enough"},
    }
    assert [worker.service.pid for worker in cluster._worker_launcher.workers] == before


def test_a_search_as_a_picture(cluster: HyperoptCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = cluster.trials("seen").handle.jobs
    results = [(3.0, "ok"), (1.0, "ok"), (float("nan"), "ok"), (0.0, "fail"), (None, "ok"), (2.0, "ok")]
    jobs.insert_many(
        {"tid": tid, "exp_key": "seen", "state": DONE, "result": {"loss": loss, "status": status}}
        for tid, (loss, status) in enumerate(results, 100)
    )
    jobs.insert_one({"tid": 99, "exp_key": "seen", "state": ERROR, "result": {"status": "new"}})
    figure = cluster.plot("seen", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    losses, best, failed = figure.axes[0].collections
    assert losses.get_offsets().tolist() == [[2, 3.0], [3, 1.0], [7, 2.0]]
    assert best.get_offsets().tolist() == [[3, 1.0]]
    assert failed.get_offsets().tolist() == [[1, 0.0]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "loss",
        "best so far: 1, trial 3",
        "failed (1)",
    ]
    progress = cluster.progress("seen")
    assert (progress.done, progress.failed, progress.best_loss) == (6, 1, 1.0)
    cluster.plot("of nothing", tmp_path / "nothing.svg")
    assert "no trial has ended yet" in (tmp_path / "nothing.svg").read_text()
    for name in [name for name in sys.modules if name.endswith("hyperopt.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ClusterError, match=r"matplotlib(.|\n)*Next step: .*pip install"):
        cluster.plot("seen")


def test_a_trial_whose_worker_was_killed_is_evaluated_again(cluster: HyperoptCluster, group: RuntimeGroup) -> None:
    def objective(x: float) -> float:
        mark = Path(os.environ["WORKING_DIR"], f"seen-{x}")
        if x < 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    documents = _search(cluster, objective, "killed", 10)
    assert _states(documents) == {DONE: 10}
    again = {document["misc"]["vals"]["x"][0] < 0: document.get("attempts", 0) for document in documents}
    assert again[True] >= 1
    assert again[False] == 0


def test_a_trial_that_kills_its_workers_is_given_up(cluster: HyperoptCluster) -> None:
    def objective(x: float) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return x

    (document,) = _search(cluster, objective, "killer", 1)
    assert document["state"] == ERROR
    assert document["error"][1].endswith("this was attempt 4")


def test_a_whole_worker_is_killed(cluster: HyperoptCluster, group: RuntimeGroup) -> None:
    def objective(x: float) -> float:
        mark = Path(os.environ["WORKING_DIR"], "killed once")
        if not mark.exists() and os.uname().nodename == victim:
            mark.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        return x

    victim = group.runtimes[0].call(lambda: os.uname().nodename)
    worker = cluster._worker_launcher.workers[0]
    documents = _search(cluster, objective, "worker", 15)
    assert _states(documents) == {DONE: 15}
    assert worker.service.restarts == 1


@pytest.mark.keeps("manager")  # the server that was started in its place
@pytest.mark.parametrize("victim", ["server", "keeper"])
def test_the_server_is_killed_in_the_middle(cluster: HyperoptCluster, victim: str) -> None:
    def objective(x: float) -> float:
        time.sleep(0.05)
        return x

    process = cluster._master_launcher.process
    assert process is not None
    old = process.pid
    [space] = workspace._spaces.values()
    kill = process.kill if victim == "server" else lambda: os.kill(space.keeper.agent_info.pid, signal.SIGKILL)
    killer = _later(1.0, kill)
    documents = _search(cluster, objective, victim, 40)
    killer.join()
    assert _states(documents) == {DONE: 40}
    assert process.pid != old
    assert process.poll() is None


def test_workers_that_begin_while_the_cluster_ends_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_group(1) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start()
        workers, master = cluster._worker_launcher, cluster._master_launcher
        begun, ended = threading.Event(), threading.Event()
        start, end = workers.start, master.cleanup

        def start_late(*arguments: Any, **options: Any) -> list[int]:
            begun.set()
            assert ended.wait(60)
            return start(*arguments, **options)

        def end_and_tell() -> None:
            end()
            ended.set()

        monkeypatch.setattr(workers, "start", start_late)
        monkeypatch.setattr(master, "cleanup", end_and_tell)
        with ThreadPoolExecutor() as pool:
            starting = pool.submit(cluster.start_workers, 1)
            assert begun.wait(60)
            cluster.cleanup()
            with pytest.raises(ClusterError, match="the cluster was ended meanwhile"):
                starting.result(60)
        assert cluster._worker_launcher.services == cluster._master_launcher.services == []


def _later(seconds: float, action: Callable[[], None]) -> Any:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.parametrize(
    "limit",
    [{"timeout": 2}, {"loss_threshold": 80.0}, {"early_stop_fn": "no progress"}, {"early_stop_fn": "own"}],
    ids=lambda limit: "-".join(map(str, limit)),
)
def test_limits_hold_though_workers_take_trials_as_fast_as_they_are_queued(
    cluster: HyperoptCluster, limit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy
    from hyperopt import fmin, hp, tpe
    from hyperopt.early_stop import no_progress_loss
    from hyperopt.mongoexp import MongoTrials

    from lazycluster.engines.hyperopt.programs import compat

    counted = MongoTrials.count_by_state_unsynced.__wrapped__

    def drained(self: Any, arg: Any) -> int:
        look = compat._look_for(self)
        # As if they were that fast: after each trial that is queued, the queue is empty.
        return look.queue_length(0) if arg == NEW and look is not None else counted(self, arg)

    monkeypatch.setattr(MongoTrials, "count_by_state_unsynced", drained)
    seen: list[list[int]] = []

    def own(trials: Any, *state: Any) -> tuple[bool, list[Any]]:
        seen.append([trial["state"] for trial in trials.trials])
        assert trials.best_trial["result"]["loss"] == min(trials.losses())
        return len(seen) == 3, []

    stops = {"no progress": no_progress_loss(3), "own": own}
    limit = {name: stops.get(str(value), value) for name, value in limit.items()}
    trials = cluster.trials(f"limited by {limit}")
    fmin(
        lambda x: x**2,
        hp.uniform("x", -10, 10),
        algo=tpe.suggest,
        trials=trials,
        rstate=numpy.random.default_rng(0),
        show_progressbar=False,
        **{"max_evals": 100_000, **limit},
    )
    assert 0 < len(trials.trials) < 10_000
    assert _states(list(trials.handle.jobs.find({"exp_key": trials._exp_key}))) == {DONE: len(trials.trials)}
    assert all(set(states) == {DONE} for states in seen)


def test_two_searches_at_once(cluster: HyperoptCluster) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_search, cluster, lambda x: x, "one of two", 8)
        second = pool.submit(_search, cluster, lambda x: -x, "two of two", 9)
    assert _states(first.result()) == {DONE: 8}
    assert _states(second.result()) == {DONE: 9}
    losses = [document["result"]["loss"] == -document["misc"]["vals"]["x"][0] for document in second.result()]
    assert all(losses)


def test_two_searches_with_limits_share_their_trials(cluster: HyperoptCluster) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import numpy
    from hyperopt import fmin, hp, rand

    trials = cluster.trials("shared")

    def search(seconds: int) -> Any:
        return fmin(
            lambda x: x**2,
            hp.uniform("x", -10, 10),
            algo=rand.suggest,
            trials=trials,
            timeout=seconds,
            rstate=numpy.random.default_rng(seconds),
            show_progressbar=False,
        )

    with ThreadPoolExecutor(2) as pool:
        assert [set(best) for best in pool.map(search, (2, 3))] == [{"x"}, {"x"}]


def test_the_password_is_nowhere_to_be_seen(cluster: HyperoptCluster, group: RuntimeGroup) -> None:
    secret = cluster._hyperopt.access.password
    assert len(secret) > 20
    assert secret in cluster.mongo_url

    def command_lines() -> str:
        texts = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    texts.append((entry / "cmdline").read_bytes().decode("utf-8", "replace"))
                except OSError:
                    continue
        return "\n".join(texts)

    assert secret not in command_lines()
    for runtime in group.runtimes:
        assert secret not in runtime.call(command_lines)
    assert secret not in repr(cluster) + repr(vars(cluster)) + repr(cluster._master_launcher)
    launchers = (cluster._master_launcher, cluster._worker_launcher)
    logs = [service.log_file for launcher in launchers for service in launcher.services]
    assert logs
    assert not any(secret in log.read_text(errors="replace") for log in logs)


def test_the_database_is_for_its_owner_only(cluster: HyperoptCluster, group: RuntimeGroup) -> None:
    port = cluster.master_port
    directory = Path(cluster.dbpath)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())
    tls = {"tls": True, "tlsAllowInvalidCertificates": True}
    stranger: Any = pymongo.MongoClient("127.0.0.1", port, serverSelectionTimeoutMS=3000, **tls)
    guesser: Any = pymongo.MongoClient("127.0.0.1", port, username="hyperopt", password="guess", **tls)
    try:
        for client in (stranger, guesser):
            with pytest.raises(pymongo.errors.OperationFailure, match=r"(?i)auth"):
                client[cluster.dbname].jobs.find_one()
    finally:
        stranger.close()
        guesser.close()

    def listening(port: int) -> list[str]:
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [line[1] for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port]

    for place in (listening, *(lambda port, r=runtime: r.call(listening, port) for runtime in group.runtimes)):
        assert [address.split(":")[0] for address in place(port)] == ["0100007F"]
    assert not Path("/proc/net/tcp6").exists() or f":{port:04X} " not in Path("/proc/net/tcp6").read_text()


def test_a_second_cluster_cannot_use_the_same_files(cluster: HyperoptCluster, group: RuntimeGroup) -> None:
    with HyperoptCluster(group, dbpath=cluster.dbpath) as other, pytest.raises(MasterStartError, match="locked by"):
        other.start_master()


def test_a_search_is_resumed(tmp_path: Path) -> None:
    counted = lambda x: x * x  # noqa: E731
    for evals in (5, 9):
        with local_group(1) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
            cluster.start()
            if evals == 5:
                # What a manager that was killed leaves behind: a trial that nobody works on.
                _search(cluster, counted, "resumed", evals)
                jobs = cluster.trials("resumed").handle.jobs
                jobs.update_one({"tid": 2}, {"$set": {"state": RUNNING, "owner": ["gone-0", "gone-0#1"]}})
            else:
                documents = _search(cluster, counted, "resumed", evals)
    assert _states(documents) == {DONE: 9}
    assert len({document["tid"] for document in documents}) == 9
    with pytest.raises(ClusterError, match="does not run"):
        cluster.mongo_url  # noqa: B018


def test_missing_software_is_an_error_before_anything_starts(hosts: Any, tmp_path: Path) -> None:
    with (
        connect(hosts.config_file, ["host1"], python="/usr/bin/python3") as group,
        HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster,
    ):
        with pytest.raises(
            VersionMismatchError, match=r"(?s)host1 .* - .*Next step.*(hyperopt==|choose a P)"
        ) as caught:
            cluster.start()
        assert 'RuntimeGroup(..., environment="manager")' in str(caught.value)
        assert cluster.master_port is None
