"""The engine of the documentation, of which nothing is in the library, on three hosts."""

from __future__ import annotations

import importlib.util
import operator
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rq")
if shutil.which("redis-server") is None:
    pytest.skip("needs redis-server", allow_module_level=True)

from cluster_groups import connect

import leaks
from lazycluster.cluster.exceptions import ClusterError, MasterStartError, VersionMismatchError, WorkerStartError
from patience import until

_FILE = Path(__file__).parents[2] / "examples" / "rq_engine.py"


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("rq_engine", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def group(make_hosts: Any) -> Iterator[Any]:
    hosts = make_hosts(3)
    with connect(hosts.config_file, [host.name for host in hosts]) as made:
        yield made


def _result(queue: Any, *arguments: Any) -> Any:
    job = queue.enqueue(*arguments)
    until(lambda: job.get_status(refresh=True).value in ("finished", "failed"), "a job ends")
    return job.return_value()


def test_it_is_small_and_uses_public_names_only() -> None:
    lines = _FILE.read_text().splitlines()
    assert len(lines) <= 120
    imported = [line for line in lines if line.startswith(("import ", "from ")) and "lazycluster" in line]
    assert [line.split()[1] for line in imported] == ["lazycluster", "lazycluster.engine"]


def test_start_result_worker_killed_scale_and_cleanup(group: Any, tmp_path: Path) -> None:
    cluster = _example().RQCluster(group, queue="some")
    password = cluster.engine.password
    with cluster:
        cluster.start()
        assert cluster.status == "running"
        assert sorted({worker.host for worker in cluster.workers}) == sorted(group.hosts)
        queue = type(cluster).connect(cluster.write_connection_file(tmp_path / "rq.json"))
        assert _result(queue, operator.mul, 6, 7) == 42
        assert len({_result(queue, socket.gethostname) for _ in range(30)}) > 1

        before = cluster.workers[0]
        next(one for one in group.runtimes if one.host == before.host).call(os.kill, before.pid, signal.SIGKILL)
        until(lambda: cluster.workers[0].restarts == 1 and cluster.workers[0].state == "ready", "it is started again")
        assert cluster.workers[0].pid != before.pid
        assert any(event.kind == "restarting" and event.name == before.name for event in cluster.events)
        assert _result(queue, operator.mul, 2, 3) == 6

        cluster.scale(5)
        assert len(cluster.workers) == 5
        cluster.scale(1)
        assert [worker.state for worker in cluster.workers] == ["ready"]
        assert _result(queue, operator.mul, 3, 3) == 9
        assert leaks.running(password) == []
        queue.connection.close()
    assert leaks.running("rq.cli") == leaks.running("redis-server") == []
    assert not (tmp_path / "rq.json").exists()


def test_a_port_that_is_taken_is_another_one(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazycluster.cluster import master_launcher

    example = _example()
    with socket.create_server(("127.0.0.1", 0)) as taken, example.RQCluster(group) as cluster:
        monkeypatch.setattr(example.RQCluster, "DEFAULT_MASTER_PORT", taken.getsockname()[1])

        async def all_free(self: Any, count: int, connections: Any) -> list[int]:
            self._left, ports = self._left[count:], self._left[:count]
            return list(ports)

        monkeypatch.setattr(master_launcher.PortSupply, "take", all_free)  # as if it had been free then
        monkeypatch.setattr(cluster._master_launcher.network, "share_master", _nothing)
        cluster.start_master()
        assert cluster.master_port == cluster.DEFAULT_PORT_RANGE_START


async def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def test_what_is_missing_is_named_before_anything_starts(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    example = _example()
    monkeypatch.setattr(example.RQ, "master_needs", ("no-such-server",))
    with (
        example.RQCluster(group) as cluster,
        pytest.raises(MasterStartError, match="no-such-server is not on"),
    ):
        cluster.start()
    monkeypatch.setattr(example.RQ, "master_needs", ())
    monkeypatch.setattr(example.RQ, "worker_needs", ("no-such-worker",))
    with (
        example.RQCluster(group) as cluster,
        pytest.raises(WorkerStartError, match="no-such-worker is not on"),
    ):
        cluster.start()
    monkeypatch.setattr(example.RQ, "worker_needs", ())
    monkeypatch.setattr(example.RQ, "packages", ("rq", "no-such-package"))
    with pytest.raises(ClusterError, match=f"no-such-package cannot be imported here.*\n.*{sys.executable} -m pip"):
        example.RQCluster(group)
    monkeypatch.setattr(example.RQ, "needed_here", lambda self: ())
    with example.RQCluster(group) as cluster, pytest.raises(VersionMismatchError, match="no-such-package"):
        cluster.start()
    assert leaks.running("redis-server") == []


def test_the_master_runs_on_a_host(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    example = _example()
    monkeypatch.setattr(example.RQ, "master_on", "host")
    with example.RQCluster(group) as cluster:
        cluster.start()
        assert cluster.master.host == group.hosts[0]
        queue = example.RQ.client(cluster.engine.connection(cluster._master_launcher.at))
        assert len({_result(queue, socket.gethostname) for _ in range(30)}) > 1
        cluster.scale(4)
        assert _result(queue, operator.mul, 6, 7) == 42
        queue.connection.close()
    assert leaks.running("rq.cli") == leaks.running("redis-server") == []
