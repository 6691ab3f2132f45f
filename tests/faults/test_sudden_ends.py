"""The manager is killed with SIGKILL, in the middle of anything: within 5 s nothing is left, there or here."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from managers import Victim
from victims import connect, noted

import leaks
from filetrees import make_large, make_large_there
from patience import until
from sshhosts import procfs

_CLUSTER_PORT = 24786
_RECEIVED, _SENT = 1, 9  # columns of /proc/net/dev


def _commands(host: Any) -> str:
    return "\n".join(process.command for process in host.processes())


def test_during_tasks(hosts: Any) -> None:
    with Victim("tasks", hosts) as victim:
        assert victim.said() == "working"
        for host in hosts:
            for seconds in (7001, 7002, 7004, 7005):
                until(lambda host=host, wanted=f"sleep {seconds}": wanted in _commands(host), f"sleep {seconds}")
            assert [entry for entry in host.tmp_entries() if "lazycluster" in entry]
        victim.kill()


@pytest.fixture
def copies(hosts: Any) -> Iterator[Path]:
    """A directory of the first host, for copies; the others' are as empty."""
    made = [host.path("~/copies") for host in hosts]
    for path in made:
        path.mkdir()
        path.chmod(0o777)
    yield made[0]
    for path in made:
        subprocess.run(["rm", "-r", path], check=True)


def _moving(hosts: Any, column: int) -> Callable[[], bool]:
    """Whether the hosts have moved more bytes over their network than connecting takes."""
    tables = [Path(f"/proc/{host.pid}/net/dev") for host in hosts]

    def count() -> int:
        lines = [line for table in tables for line in table.read_text().splitlines() if "eth" in line]
        return sum(int(line.split()[column]) for line in lines)

    before = count()
    return lambda: count() - before > 20_000_000


def test_while_files_are_sent(hosts: Any, copies: Path) -> None:
    with Victim("send", hosts) as victim:
        make_large(victim.folder / "huge").chmod(0o644)
        moving = _moving(hosts, _RECEIVED)
        assert victim.said() == "working"
        until(moving, "the copy to begin")
        victim.kill()
        assert not leaks.settle(lambda: [str(p) for host in hosts for p in host.path("~/copies").iterdir()])
        assert [path.name for path in victim.folder.iterdir()] == ["huge"]


def test_while_a_file_is_fetched(hosts: Any, copies: Path) -> None:
    make_large_there(copies / "huge").chmod(0o644)
    with Victim("get", hosts) as victim:
        (victim.folder / "copies").mkdir()
        moving = _moving(hosts, _SENT)
        assert victim.said() == "working"
        until(moving, "the copy to begin")
        victim.kill()
        assert list((victim.folder / "copies").iterdir()) == []


def _pour(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while True:
            connection.sendall(bytes(1 << 16))


@pytest.mark.soak
def test_with_others_traffic_in_the_tunnels(hosts: Any) -> None:
    """What others do with exposed ports must not keep ssh alive, which by itself waits for its connections to end."""
    with socket.create_server(("127.0.0.1", 0)) as server, Victim("tunnels", hosts) as victim:
        (victim.folder / "port").write_text(str(server.getsockname()[1]))
        assert victim.said() == "working"
        # manager -> host2 -> manager; one end pours, the other drinks, until the tunnel ends
        client = socket.create_connection(("127.0.0.1", 24101))
        source = threading.Thread(target=_pour, args=[server.accept()[0]])
        source.start()
        drink = hosts[0].inside(
            'python3 -c \'import socket; s = socket.create_connection(("127.0.0.1", 24100)); '
            'print(len(s.recv(1)), flush=True); [None for _ in iter(lambda: s.recv(65536), b"")]\''
        )
        with subprocess.Popen(drink, stdout=subprocess.PIPE) as guest, client:
            other = threading.Thread(target=_pour, args=[server.accept()[0]])
            other.start()
            assert guest.stdout is not None
            assert guest.stdout.readline() == b"1\n"
            assert client.recv(1)
            victim.kill()
            with contextlib.suppress(OSError):
                while client.recv(1 << 16):
                    pass
        source.join()
        other.join()


@pytest.mark.parametrize(
    "stage", [*(pytest.param(stage, marks=pytest.mark.soak) for stage in ("programs", "scheduler")), "tunnels"]
)
def test_while_a_cluster_starts(hosts: Any, stage: str) -> None:
    pytest.importorskip("distributed")
    stages: dict[str, Callable[[], Any]] = {
        "programs": lambda: "dask" in _commands(hosts[0]) or "worker" in _commands(hosts[0]),
        "scheduler": lambda: _CLUSTER_PORT in procfs.listening_ports("self"),
        "tunnels": lambda: len(hosts[2].listening_ports()) > 2,
    }
    with Victim("start", hosts) as victim:
        assert victim.said() == "working"
        until(stages[stage], stage)
        victim.kill()


def test_with_a_cluster_and_traffic_in_its_tunnels(hosts: Any) -> None:
    pytest.importorskip("distributed")
    with Victim("cluster", hosts) as victim:
        assert victim.said() == "working"
        until(_moving(hosts, _SENT), "traffic")
        victim.kill()


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_while_a_search_runs_which_is_resumed(hosts: Any) -> None:
    pytest.importorskip("hyperopt")
    with Victim("search", hosts) as victim:
        assert victim.said() == "working"
        victim.kill()
        try:
            with connect(hosts.config_file) as group:
                _check_that_it_is_resumed(hosts, group, str(victim.folder / "db"))
        finally:
            for host in hosts:
                host.path("~/evaluated").unlink(missing_ok=True)


def _check_that_it_is_resumed(hosts: Any, group: Any, dbpath: str) -> None:
    from hyperopt import fmin, hp, rand

    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    with HyperoptCluster(group, dbpath=dbpath) as cluster:
        cluster.start_master()
        trials = cluster.trials("search")
        before = {document["tid"]: document for document in trials.trials if document["state"] == 2}
        assert len(before) >= 6
        assert cluster.progress("search").running == 0
        wanted = len(trials.trials) + 5  # some of them wait to be evaluated
        cluster.start_workers()
        options: dict[str, Any] = {"trials": trials, "max_queue_len": 4, "show_progressbar": False}
        best = fmin(noted, hp.uniform("x", 0, 1), rand.suggest, wanted, **options)
        after = {document["tid"]: document for document in trials.trials}
        assert len(trials.trials) == len(after) == wanted
        assert {document["state"] for document in after.values()} == {2}
        assert {tid: after[tid] for tid in before} == before
        assert best["x"] == min(trials.losses())
    times = Counter(line for host in hosts for line in host.path("~/evaluated").read_text().split())
    assert set(times) == {str(loss) for loss in trials.losses()}
    # What was just evaluated when the manager was killed, and could not be written any more, is evaluated again.
    finished = {str(document["result"]["loss"]) for document in before.values()}
    assert [line for line in finished if times[line] > 1] == []
