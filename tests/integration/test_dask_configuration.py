"""The manager's Dask configuration reaches scheduler, nannies and workers, as those of distributed's own clusters."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

import dask
from cluster_groups import connect

from lazycluster.cluster.dask_cluster import DaskCluster
from lazycluster.engines.dask.configuration import configuration

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this module

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_KEYS = (
    "distributed.scheduler.allowed-failures",
    "distributed.scheduler.work-stealing",
    "distributed.comm.timeouts.connect",
    "distributed.worker.memory.pause",
    "distributed.worker.profile.interval",
    "array.slicing.split-large-chunks",
    "own.text",
    "own.nested.list",
)


@pytest.fixture
def configured() -> Iterator[None]:
    with dask.config.set(
        {
            "distributed.scheduler.allowed-failures": 7,
            "distributed.scheduler.work_stealing": False,  # hyphen and underscore are the same to Dask
            "distributed.comm.timeouts.connect": "77s",
            "distributed.worker.memory.pause": 0.66,
            "distributed.worker.profile.interval": "50ms",
            "distributed.worker.preload": ["def dask_setup(worker): worker.preloaded = 'worker'"],
            "distributed.nanny.preload": ["def dask_setup(nanny): nanny.preloaded = 'nanny'"],
            "distributed.scheduler.preload": ["def dask_setup(scheduler): scheduler.preloaded = 'scheduler'"],
            "distributed.nanny.environ.LAZYCLUSTER_TEST_CONFIGURED": "yes",
            "array.slicing.split-large-chunks": True,
            "own.text": 'quotes "\n" and \u2028',
            "own.nested.list": [1, None, {"a": 2.5}],
            # What belongs to the manager, or to a way of its own to get a cluster.
            "scheduler": "threads",
            "pool": object(),
            "coiled.token": "a secret",
            "distributed.comm.tls.ca-file": "/nonexistent/ca.pem",
        }
    ):
        yield


def _seen(keys: tuple[str, ...]) -> dict[str, Any]:
    import os

    import dask

    found = {key: dask.config.get(key, "none") for key in (*keys, "coiled.token", "scheduler")}
    return {**found, "variable": os.environ.get("LAZYCLUSTER_TEST_CONFIGURED")}


def _looked_at(client: Any) -> dict[str, Any]:
    """Return what each of them sees, and what has become of it."""
    return {
        "scheduler": {**client.run_on_scheduler(_seen, _KEYS), "variable": None},
        "preloaded": client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.preloaded),
        "allowed": client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures),
        "stealing": client.run_on_scheduler(
            lambda dask_scheduler: "stealing" in dask_scheduler.periodic_callbacks
        ),
        "task": client.submit(lambda keys: _seen(keys), _KEYS, pure=False).result(timeout=20),
        "worker": list(client.run(lambda dask_worker: dask_worker.preloaded).values()),
        "pause": list(client.run(lambda dask_worker: dask_worker.memory_manager.memory_pause_fraction).values()),
        "nanny": list(client.run(lambda dask_worker: dask_worker.preloaded, nanny=True).values()),
    }  # fmt: skip


def test_all_see_what_those_of_a_local_cluster_see(
    hosts: Any, configured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client, LocalCluster

    # Of what LocalCluster preloads, beside it in /tmp.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    with (
        connect(hosts.config_file, [hosts[0].name]) as group,
        DaskCluster(group, nthreads=1, memory_limit="700 MB") as cluster,
    ):
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            ours = _looked_at(client)
            client.restart(timeout=30)
            assert _looked_at(client)["task"] == ours["task"]
            cluster.scale(2)
            assert set(client.run(lambda dask_worker: dask_worker.memory_manager.memory_pause_fraction).values()) == {
                0.66
            }
    assert ours["task"] == {
        **{key: dask.config.get(key) for key in _KEYS},
        "coiled.token": "none",
        "scheduler": "none",
        "variable": "yes",
    }
    assert ours["scheduler"] == {**ours["task"], "variable": None}
    assert (ours["preloaded"], ours["worker"], ours["nanny"]) == ("scheduler", ["worker"], ["nanny"])
    with (
        dask.config.set({"coiled": {}, "pool": None, "scheduler": None, "temporary-directory": str(tmp_path)}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as local,
        Client(local) as client,
    ):
        theirs = _looked_at(client)
        for key in ("preloaded", "allowed", "stealing", "worker", "pause", "nanny"):
            assert ours[key] == theirs[key], key
        assert {key: theirs["task"][key] for key in _KEYS} == {key: ours["task"][key] for key in _KEYS}


def test_what_is_to_be_there_before_a_worker_starts(hosts: Any, tmp_path: Path) -> None:
    changes = {"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": "3"}, "temporary-directory": "/var/tmp/own"}
    with dask.config.set(changes), connect(hosts.config_file, [hosts[0].name]) as group:
        with DaskCluster(group, nthreads=1, memory_limit="700 MB") as cluster:
            cluster.start()
            with cluster.get_client(timeout=20) as client:
                seen = client.run(lambda dask_worker: (_variable("OMP_NUM_THREADS"), dask_worker.local_directory))
                assert [threads for threads, _ in seen.values()] == ["3"]
                assert next(iter(seen.values()))[1].startswith("/var/tmp/own/")
        group.runtimes[0].delete_dir("/var/tmp/own")


def _variable(name: str) -> str | None:
    import os

    return os.environ.get(name)


def test_values_that_cannot_travel_are_named(caplog: pytest.LogCaptureFixture) -> None:
    odd = {"own.function": print, "own.good": 1, "own.set": {1}, "own.numbers": {1: 2}, "own.deep": [[b"bytes"]],
           "distributed.logging-file-config": "/nonexistent"}  # fmt: skip
    with caplog.at_level(logging.WARNING, "lazycluster"), dask.config.set(odd):
        assert configuration()["own"] == {"good": 1}
    (record,) = caplog.records
    for name in (
        "own.function (builtin_function_or_method)", "own.set (set)", "own.numbers (dict)", "own.deep (list)",
        "distributed.logging-file-config (str)",
    ):  # fmt: skip
        assert name in record.getMessage()


def test_files_and_variables_count_and_defaults_do_not(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("own: {file: 1}\ndistributed: {worker: {use-file-locking: true}}\n")
    program = "from lazycluster.engines.dask.configuration import configuration as c; print(c())"
    environment = {"DASK_CONFIG": str(tmp_path), "DASK_OWN__VARIABLE": "[1, 2]", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == {"own": {"variable": [1, 2], "file": 1}}


def test_other_threads_may_change_it_meanwhile() -> None:
    class Watched(dict[str, int]):
        def items(self) -> Any:
            held.append(dask.config.config_lock.locked())
            return super().items()

    held: list[bool] = []
    with dask.config.set({"own": Watched(number=1)}):
        assert configuration()["own"] == {"number": 1}
    assert held
    assert all(held)
