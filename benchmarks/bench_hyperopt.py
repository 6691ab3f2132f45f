"""A Hyperopt cluster: the speed of the database that comes with it, and how many trials the workers get through."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Row, seconds, settings, ssh_hosts

from lazycluster import RuntimeGroup
from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
from lazycluster.engines.hyperopt.programs import compat

CLIENTS = 16
MANY = 10_000
WORKERS = (1, 4, 12)
SLEEP = 0.01
REPEAT = 3
PASSWORD = "of-the-benchmark-only"
_CLIENT = """
import sys, time
from pymongo import MongoClient
port, password, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
known = {"tls": True, "tlsCAFile": sys.argv[5]}
jobs = MongoClient("127.0.0.1", port, username="me", password=password, authSource="admin", **known).db.jobs
jobs.find_one()
print("there", flush=True)
sys.stdin.readline()
begin = time.process_time()
for number in range(count):
    job = jobs.find_one_and_update(
        {"state": 0, "owner": None}, {"$set": {"state": 1, "owner": ["me", sys.argv[4]]}}, return_document=True
    )
    done = {"state": 2, "version": 1, "result": {"loss": 0.5, "status": "ok"}}
    assert jobs.update_one({"_id": job["_id"], "version": 0}, {"$set": done}).modified_count == 1
print(time.process_time() - begin)
"""


class Server:
    """The embedded server, started as a cluster starts it."""

    def __init__(self, folder: str) -> None:
        from lazycluster.cluster.engine import Endpoint
        from lazycluster.cluster.service_spec import Source
        from lazycluster.engines.hyperopt.masters import EmbeddedMongoLauncher

        launcher = EmbeddedMongoLauncher(None)  # type: ignore[arg-type]
        launcher.hyperopt.dbpath = Path(folder, "db")
        access = launcher.hyperopt.access
        access.password, access.user = PASSWORD, "me"
        access.make_identity(folder)
        self.authority = str(access.authority_file)
        spec = launcher.spec(Endpoint("master", ports={"master": 0}))
        source = spec.source
        assert isinstance(source, Source)
        message = source.message()
        package = Path(folder, "program", message["package"])
        package.mkdir(parents=True, exist_ok=True)
        for name, text in message["files"].items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(text)
        module = f"{package.name}.{message['module']}"
        code = f"import sys; sys.path.append({str(package.parent)!r})\nfrom {module} import main; main()"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
        assert spec.settings is not None
        told = spec.settings()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        self.port = json.loads(self.process.stdout.readline().partition(" ")[2])["port"]

    def client(self) -> Any:
        from pymongo import MongoClient

        known: dict[str, Any] = {"tls": True, "tlsCAFile": self.authority}
        return MongoClient("127.0.0.1", self.port, username="me", password=PASSWORD, authSource="admin", **known)

    def memory(self, what: str) -> float:
        """Return what the server uses or has used, in MB: ``VmRSS`` or ``VmHWM``."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{what}:")[2].split()[0]) / 1024

    def processor(self) -> float:
        """Return how many seconds of a processor the server has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate()


@contextlib.contextmanager
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        made = Server(folder)
        try:
            yield made
        finally:
            made.end()


def _job(number: int, state: int, key: str = "bench") -> dict[str, Any]:
    """A trial as hyperopt writes it."""
    misc = {
        "tid": number,
        "cmd": ["domain_attachment", "FMinIter_Domain"],
        "workdir": None,
        "idxs": {name: [number] for name in "abc"},
        "vals": {name: [0.123456789 * number] for name in "abc"},
    }
    result = {"loss": 1 / (number + 1), "status": "ok"} if state == 2 else {"status": "new"}
    times = {"book_time": None, "refresh_time": None}
    owner = ["host-0", "host-0#1"] if state else None
    return {
        "state": state, "tid": number, "spec": None, "result": result, "misc": misc, "exp_key": key, "owner": owner,
        "version": 0, **times,
    }  # fmt: skip


def _indexes(jobs: Any) -> None:
    for keys in ([("state", 1), ("exp_key", 1)], "exp_key", "result.loss", "book_time"):
        jobs.create_index(keys)


def _reserve_and_finish(found: Server, each: int) -> tuple[float, str]:
    """Return how many trials per second many clients take and finish, and who needed how much of the processor."""
    with found.client() as client:
        _indexes(client.db.jobs)
        client.db.jobs.insert_many(_job(number, 0) for number in range(CLIENTS * each))
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _CLIENT, str(found.port), PASSWORD, str(each)]
    numbered = [[*command, str(number), found.authority] for number in range(CLIENTS)]
    clients = [subprocess.Popen(one, stdin=pipe, stdout=pipe) for one in numbered]
    for one in clients:
        assert one.stdout is not None
        one.stdout.readline()

    spent: list[float] = []

    def go() -> None:
        for one in clients:
            assert one.stdin is not None
            one.stdin.write(b"go\n")
            one.stdin.flush()
        for one in clients:
            spent.append(float(one.communicate()[0]))
            assert one.returncode == 0

    before, count = found.processor(), CLIENTS * each
    rate = count / seconds(go)
    server, all_clients = (1000 * used / count for used in (found.processor() - before, sum(spent)))
    return rate, f"processor per trial: server {server:.2f} ms, clients {all_clients:.2f} ms"


def _database() -> Iterator[Row]:
    def ready() -> None:
        with server():
            pass

    started = []
    for _ in range(REPEAT):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            made = Server(folder)
            started.append(time.perf_counter() - begin)
            made.end()
    figure = statistics.median(started)
    yield Row("database: until it answers", figure, "s", "<= 0.3 s", met=figure <= 0.3)
    with server() as found:
        figure, note = _reserve_and_finish(found, 200)
        what = f"{CLIENTS} clients take and finish trials"
        yield Row(what, figure, "/s", ">= 1000 /s", met=figure >= 1000, note=note)
    with server() as found:
        with found.client() as client:
            jobs = client.bench.jobs
            _indexes(jobs)
            jobs.insert_many(_job(number, 2) for number in range(MANY))
        trials_of = compat.load().MongoTrials
        url = f"mongo://me:{PASSWORD}@127.0.0.1:{found.port}/bench/jobs?authSource=admin&tlsCAFile={found.authority}"
        trials = trials_of(url, exp_key="bench", refresh=False)
        times = []
        for _ in range(REPEAT):
            trials._trials = []
            times.append(seconds(trials.refresh))
        assert len(trials.trials) == MANY
        figure = statistics.median(times)
        yield Row(f"refresh() of {MANY:,} finished trials, the first one", figure, "s", "<= 2 s", met=figure <= 2)
        again = statistics.median(seconds(trials.refresh) for _ in range(REPEAT))
        yield Row(f"refresh() of {MANY:,} finished trials, a later one", again, "s", "<= 2 s", met=again <= 2)
        figure = found.memory("VmHWM")
        yield Row(f"the database's memory, {MANY:,} trials, at most", figure, "MB", "< 80 MB", met=figure < 80)
        compat.close_clients(found.port)


def _rate(cluster: HyperoptCluster, workers: int) -> float:
    """Return how many trials per second the workers evaluate, between the first one's start and the last one's end."""
    import numpy
    from hyperopt import fmin, hp, rand

    def objective(x: float) -> float:
        time.sleep(SLEEP)
        return x

    evals = 60 * workers
    key = f"{workers} workers"
    options: dict[str, Any] = {"rstate": numpy.random.default_rng(1), "show_progressbar": False}
    trials = cluster.trials(key)
    fmin(objective, hp.uniform("x", 0, 1), rand.suggest, evals, max_queue_len=evals, trials=trials, **options)
    documents = [trial for trial in trials.trials if trial["tid"] is not None]
    begin = min(trial["book_time"] for trial in documents)
    end = max(trial["refresh_time"] for trial in documents)
    assert len(documents) == evals
    return float(evals / (end - begin).total_seconds())


def rows() -> Iterator[Row]:
    """Yield the lines of the table."""
    warnings.simplefilter("ignore")  # hyperopt's own
    yield from _database()
    with ssh_hosts(3) as hosts, tempfile.TemporaryDirectory() as folder:
        options: Any = {"hosts": list(hosts.names), "connection_kwargs": settings(hosts), "python": sys.executable}
        with RuntimeGroup(**options) as group, HyperoptCluster(group, dbpath=f"{folder}/db") as cluster:
            cluster.start_master()
            there = 0
            for workers in WORKERS:
                cluster.start_workers(workers - there)
                there = workers
                _rate(cluster, workers)  # a first search makes the connections
                ideal = workers / SLEEP
                what = f"trials of {SLEEP * 1000:g} ms, {workers} workers on 3 hosts"
                yield Row(what, _rate(cluster, workers), "/s", "", "ideal", ideal)
