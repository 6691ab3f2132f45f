"""Links drop and hosts are lost while a cluster computes: its workers come back, and the result is right."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import RuntimeGroup
from patience import until

_PATIENCE = 90.0


def connect(hosts: Any, count: int) -> RuntimeGroup:
    settings = {"config_file": hosts.config_file, "link_timeout": 2, "grace": 120}
    return RuntimeGroup(hosts=hosts.names[:count], connection_kwargs=settings, python=sys.executable)


def drop_link(group: RuntimeGroup, number: int) -> None:
    process = group.runtimes[number]._connection._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)


def test_dask_finishes_and_its_workers_come_back(hosts: Any) -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    def slow(number: int) -> int:
        time.sleep(0.05)
        return number * number

    with connect(hosts, 2) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            futures = client.map(slow, range(100), pure=False)
            until(lambda: futures[0].done(), "the first result")
            drop_link(group, 0)
            assert client.gather(futures) == [number * number for number in range(100)]
            until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 2, "the worker to come back")
            names = [worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
            there = [client.submit(os.getpid, workers=[name], pure=False) for name in names]
            assert len(set(client.gather(there))) == 2
            # What a worker holds can be had by the others, through ports that have come back, too.
            parts = [client.submit(bytes, 500_000, workers=[name], pure=False) for name in names]
            sums = [client.submit(lambda *some: sum(map(len, some)), *parts, workers=[name]) for name in names]
            assert client.gather(sums) == [1_000_000, 1_000_000]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module that is installed nowhere."""
    (tmp_path / "own_module.py").write_text("import os\n\n\ndef node(_):\n    return os.uname().nodename\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("own_module")
    del sys.modules["own_module"]


def _where(client: Any, own_module: Any) -> set[str]:
    names = [worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    return set(client.gather([client.submit(own_module.node, 0, workers=[name], pure=False) for name in names]))


def lose_agent(hosts: Any, group: RuntimeGroup, number: int) -> None:
    inner = group.runtimes[number]._connection.agent_info.pid
    os.kill(next(found.pid for found in hosts[number].processes() if found.inner_pid == inner), signal.SIGKILL)


def restart(hosts: Any, group: RuntimeGroup, number: int) -> None:
    hosts[number].power_off()
    until(lambda: group.runtimes[number]._connection.state == "interrupted", "the host to be missed")
    hosts[number].power_on()


@pytest.mark.soak
@pytest.mark.parametrize("lose", [lose_agent, restart])
def test_dask_workers_are_started_again_where_everything_was_lost(make_hosts: Any, lose: Any, own_module: Any) -> None:
    """The next agent of the host gets them, with the user's modules, which were lost there, too."""
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    hosts = make_hosts(2)
    with connect(hosts, 2) as group, DaskCluster(group, nthreads=1) as cluster:
        cluster.start()
        with cluster.get_client(timeout=30) as client:
            assert _where(client, own_module) == {"host1", "host2"}
            lose(hosts, group, 0)
            until(lambda: cluster.workers[0].restarts == 1, "the loss to be noticed")
            until(lambda: cluster.workers[0].state == "ready", "the worker to be started again")
            client.wait_for_workers(2, timeout=_PATIENCE)
            assert _where(client, own_module) == {"host1", "host2"}
        assert [worker.state for worker in cluster.workers] == ["ready", "ready"]
        [lost] = [event for event in cluster.events if event.kind == "restarting"]
        assert lost.host == "host1"
        assert "and is started again" in lost.detail


def test_workers_that_lose_their_agents_too_often_fail_for_good(
    hosts: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster, RoundRobinLauncher

    monkeypatch.setattr(RoundRobinLauncher, "RESTARTS", 0)
    with connect(hosts, 2) as group, DaskCluster(group) as cluster:
        cluster.start()
        lose_agent(hosts, group, 0)
        until(lambda: cluster.workers[0].state == "failed", "the failure")
        assert cluster.workers[1].state == "ready"
        assert "the agent on the host has ended, and with it what ran there" in caplog.text


@pytest.mark.soak
def test_a_search_finishes(hosts: Any, tmp_path: Path) -> None:
    pytest.importorskip("hyperopt")
    from hyperopt import fmin, hp, rand

    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    def objective(x: float) -> float:
        time.sleep(0.1)
        return x * x

    with connect(hosts, 2) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start()
        trials = cluster.trials("links")
        dropped = []

        def drop(trials: Any, *_: Any) -> Any:
            if len(trials.trials) > 3 and not dropped:
                dropped.append(True)
                drop_link(group, 0)
            return False, []

        best = fmin(
            objective,
            hp.uniform("x", -5, 5),
            rand.suggest,
            30,
            trials=trials,
            early_stop_fn=drop,
            show_progressbar=False,
        )
        assert dropped
        losses = trials.losses()
        assert len(losses) == 30
        assert None not in losses
        assert abs(best["x"] ** 2 - min(losses)) < 1e-9
