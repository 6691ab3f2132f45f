"""Dask workers with GPUs of their own; what the hosts have is told by a stand-in for nvidia-smi."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

import fakegpus
from lazycluster import RuntimeGroup
from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.runtimes import LocalRuntime

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _local_group(tmp_path: Path, rows: dict[str, int | Sequence[str]]) -> RuntimeGroup:
    runtimes = []
    for host, gpus in rows.items():
        directory = fakegpus.stand_in(tmp_path / host, gpus)
        runtimes.append(LocalRuntime(host=host, env={"PATH": f"{directory}:{os.environ['PATH']}"}))
    return RuntimeGroup(runtimes)


def _visible(client: Any) -> dict[str, tuple[str, str]]:
    """What each worker sees, by its name."""
    names = {address: info["name"] for address, info in client.scheduler_info(n_workers=-1)["workers"].items()}
    seen = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]))
    return {names[address]: value for address, value in seen.items()}


def test_one_worker_per_gpu_on_real_hosts(hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = {}
    for host, count in zip(hosts, (2, 0, 1), strict=True):
        fakegpus.stand_in(host.path("~/smi"), count, at=f"{host.home}/smi")
        host.run(f"chmod -R a+rwX {host.home}/smi", user="root")
        settings[host.name] = {"env": {"PATH": f"{host.home}/smi:{host.run('echo $PATH').stdout.strip()}"}}
    with (
        RuntimeGroup(
            hosts=[host.name for host in hosts],
            connection_kwargs={"config_file": hosts.config_file},
            python=sys.executable,
            settings=settings,
        ) as group,
        DaskCluster(group, gpus_per_worker=1) as cluster,
    ):
        assert [runtime.gpu_count for runtime in group.runtimes] == [2, 0, 1]
        cluster.start()
        with cluster.get_client(timeout=10) as client:
            order = "PCI_BUS_ID"
            assert _visible(client) == {"host1-0": ("0", order), "host1-1": ("1", order), "host3-0": ("0", order)}
            future = client.submit(os.getenv, "CUDA_VISIBLE_DEVICES", resources={"GPU": 1})
            assert future.result(timeout=20) in ("0", "1")
            infos = client.scheduler_info(n_workers=-1)["workers"].values()
            assert {(info["nthreads"], info["resources"]["GPU"]) for info in infos} == {(1, 1.0)}
            with pytest.raises(ClusterError, match="0 more workers"):
                cluster.start_workers(1)
    assert "host2: gets no worker: it has no GPU" in caplog.text
    for host in hosts:
        host.run(f"rm -rf {host.home}/smi", user="root")


@pytest.mark.soak
def test_two_clusters_do_not_get_the_same_gpus(tmp_path: Path) -> None:
    with _local_group(tmp_path, {"a": 3}) as group, DaskCluster(group, gpus_per_worker=1) as first:
        first.start(worker_count=1)
        with DaskCluster(group, gpus_per_worker=2) as second:
            second.start()
            with first.get_client(timeout=10) as client:
                assert [value[0] for value in _visible(client).values()] == ["0"]
            with second.get_client(timeout=10) as client:
                assert [value[0] for value in _visible(client).values()] == ["1,2"]
            with pytest.raises(ClusterError, match="0: dask-worker a-0; 1: dask-worker a-0"):
                DaskCluster(group, gpus_per_worker=1).start()


def test_hosts_without_gpus_are_an_error_that_says_why(tmp_path: Path) -> None:
    with _local_group(tmp_path, {"a": 0, "b": [fakegpus.row(0, 9000)]}) as group:
        fakegpus.program(tmp_path / "a", "#!/bin/sh\necho 'Failed to initialize NVML: Driver mismatch'; exit 18\n")
        with DaskCluster(group, gpus_per_worker=1, idle_gpus=True) as cluster:
            with pytest.raises(ClusterError, match="no host has that") as caught:
                cluster.start()
            assert "a: it has no GPU (nvidia-smi: Failed to initialize NVML: Driver mismatch" in str(caught.value)
            assert "b: 0 of its 1 GPUs can be used (0: 9000 MB of its memory are used)" in str(caught.value)
            assert "Next step" in str(caught.value)
        with (
            DaskCluster(group, gpus_per_worker=1) as cluster,
            pytest.raises(ClusterError, match=r"suffice for 1 more workers \(b: 1\), but 2 are asked for"),
        ):
            cluster.start(worker_count=2)


@pytest.mark.parametrize("number", [0, -1, True, 1.5, "1"])
def test_a_number_of_gpus_that_makes_no_sense(number: Any, tmp_path: Path) -> None:
    with _local_group(tmp_path, {"a": 1}) as group, pytest.raises(ValueError, match="gpus_per_worker"):
        DaskCluster(group, gpus_per_worker=number)


def test_idle_gpus_says_nothing_alone(tmp_path: Path) -> None:
    with _local_group(tmp_path, {"a": 1}) as group, pytest.raises(ValueError, match="say how many"):
        DaskCluster(group, idle_gpus=True)
