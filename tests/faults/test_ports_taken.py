"""Somebody else takes a port that was forwarded, while the link to its host is down: nobody tells him anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from knocking import NOBODY

from lazycluster import RuntimeGroup
from lazycluster.core.certificates import make_identities
from lazycluster.ssh import ssh_connection
from lazycluster.ssh.ssh_connection import SshConnection
from patience import until

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),  # by hyperopt
]

_IMPOSTOR = Path(__file__).with_name("impostor.py").read_text()
_MALLORY = 1001


class Impostor:
    """Somebody who takes a port of a host, or of the manager; with a certificate of another cluster."""

    def __init__(self, host: Any, port: int) -> None:
        account = NOBODY if host is None else _MALLORY
        command = [sys.executable, "-c", _IMPOSTOR, str(account), str(port)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command if host is None else host.inside(command), stdin=pipe, stdout=pipe, text=True
        )
        assert self._process.stdin is not None
        identity = make_identities("scheduler")[1]["scheduler"]
        self._process.stdin.write(json.dumps(identity.certificate + identity.key) + "\n")
        self._process.stdin.flush()
        self.heard: list[dict[str, str]] = []
        self.listens = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self.heard.append(json.loads(line))
            else:
                self.listens.set()

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


class Held:
    """The link to the first host of a group, which is down until it may come back."""

    def __init__(self, group: RuntimeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
        attempt, self._free = SshConnection._attempt, threading.Event()

        async def attempt_later(connection: SshConnection, timeout: float) -> None:
            while not self._free.is_set():
                await asyncio.sleep(0.01)
            await attempt(connection, timeout)

        monkeypatch.setattr(ssh_connection, "_PORTS_LIMIT", 0.0)
        monkeypatch.setattr(SshConnection, "_attempt", attempt_later)
        self._connection: Any = group.runtimes[0]._connection
        os.kill(self._connection._process.pid, signal.SIGKILL)
        until(lambda: self._connection.state == "interrupted", "the loss of the link")

    def release(self) -> None:
        self._free.set()


@contextlib.contextmanager
def taken(
    group: RuntimeGroup, host: Any, port: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Impostor, Held]]:
    """Drop the link to the first host; the impostor has its port."""
    link = Held(group, monkeypatch)
    impostor = Impostor(host, port)
    try:
        assert impostor.listens.wait(30)
        yield impostor, link
    finally:
        link.release()
        impostor.end()


def _group(hosts: Any) -> RuntimeGroup:
    settings = {"config_file": hosts.config_file, "link_timeout": 2, "grace": 120}
    return RuntimeGroup(hosts=hosts.names[:2], connection_kwargs=settings, python=sys.executable)


def _is_told(impostor: Impostor) -> list[str]:
    """What somebody was told beyond the beginning of a handshake."""
    return [heard["told"] for heard in impostor.heard if heard.get("told", "b''") != "b''"]


def test_the_database(hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hyperopt")
    from hyperopt import fmin, hp, rand

    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

    with _group(hosts) as group, HyperoptCluster(group, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start()
        port = cluster.master_port
        assert port is not None
        with taken(group, hosts[0], port, monkeypatch) as (impostor, link):
            until(lambda: impostor.heard, "a client")
            link.release()
            until(lambda: cluster.workers[0].state == "failed", "the end of the worker")
        assert _is_told(impostor) == []
        problem = cluster.workers[0].problem
        assert f"port {port} of host1, by which it reached the rest of the cluster" in problem
        assert "another program listens there now" in problem
        assert "<" not in problem  # of nobody's `repr`
        assert "Next step: find that program on host1" in str(cluster._worker_launcher.workers[0].service.error)
        assert cluster.workers[1].state == "ready"
        trials = cluster.trials("after")
        fmin(lambda x: x, hp.uniform("x", 0, 1), rand.suggest, 3, trials=trials, show_progressbar=False)
        assert {trial["owner"][0] for trial in trials.trials} == {"host2-0"}


@pytest.mark.parametrize("use", ["scheduler", "worker"])
def test_ports_of_dask(hosts: Any, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    """That of the scheduler on a host, and that of a worker on the manager."""
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    with _group(hosts) as group, DaskCluster(group) as cluster:
        cluster.start()
        first = cluster._worker_launcher.workers[0]
        port = cluster.master_port if use == "scheduler" else first.ports["worker"]
        assert port is not None
        with cluster.get_client(timeout=30) as client:
            address = first.service.detail["address"]
            client.submit(int, workers=[first.name]).result(timeout=30)
            with taken(group, hosts[0] if use == "scheduler" else None, port, monkeypatch) as (impostor, link):
                if use == "worker":
                    with pytest.raises(OSError, match=r"TLS|rror"):
                        client.run(int, workers=[address])
                until(lambda: impostor.heard, "a client")
                link.release()
                until(lambda: cluster.workers[0].state == "failed", "the end of the worker")
            assert _is_told(impostor) == []
            owner = "host1" if use == "scheduler" else "the manager"
            assert f"port {port} of {owner}, by which it" in cluster.workers[0].problem
            assert cluster.workers[1].state == "ready"
            assert client.submit(sum, [1, 2]).result(timeout=60) == 3
