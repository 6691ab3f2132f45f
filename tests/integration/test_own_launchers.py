"""Clusters whose launchers have the documented methods only: they are watched, and end with the manager."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from cluster_groups import local_group

from lazycluster.cluster import MasterLauncher, MasterWorkerCluster, WorkerLauncher
from lazycluster.cluster.exceptions import ClusterError
from patience import until


class PopenMaster(MasterLauncher):
    def start(self, ports: Any, timeout: int = 3, debug: bool = False) -> list[int]:
        self._port = ports if isinstance(ports, int) else ports[0]
        self._process = subprocess.Popen(["sleep", "600"])
        return []

    def cleanup(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        super().cleanup()


class NoWorkers(WorkerLauncher):
    def start(self, worker_count: int, master_port: int, ports: list[int], debug: bool = False) -> list[int]:
        return ports


def test_a_master_of_ones_own_that_dies_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with local_group(1) as group, MasterWorkerCluster(group, None, PopenMaster, NoWorkers) as cluster:
        assert cluster.master is None
        cluster.start()
        pid = cluster._master_launcher.process.pid  # type: ignore[union-attr]
        assert cluster.status == "running"
        assert (cluster.master.state, cluster.master.pid) == ("ready", pid)  # type: ignore[union-attr]
        os.kill(pid, signal.SIGTERM)
        until(lambda: cluster.status == "failed", "the end of the master is noticed")
        assert cluster.master.state == "failed"  # type: ignore[union-attr]
        assert cluster.master.last_exit == -signal.SIGTERM  # type: ignore[union-attr]
        with pytest.raises(ClusterError, match="the master: it was ended by signal 15"):
            cluster._check_alive()
        assert [event.kind for event in cluster.events] == ["ready", "failed"]
        assert "ended by signal 15" in caplog.text
        cluster.cleanup()
        assert cluster.status == "closed"
        cluster.start()
        assert cluster.status == "running"
        cluster.cleanup()
        assert [event.kind for event in cluster.events] == ["ready", "failed", "ready", "ended"]


_MANAGER = """
import sys
sys.path[:0] = {path!r}
from cluster_groups import local_group
from lazycluster.cluster import MasterWorkerCluster
from test_own_launchers import NoWorkers, PopenMaster
with local_group(1) as group, MasterWorkerCluster(group, None, PopenMaster, NoWorkers) as cluster:
    cluster.start()
    print(cluster.master.pid, flush=True)
    sys.stdin.read()
"""


def test_a_master_of_ones_own_ends_with_the_manager() -> None:
    here = os.path.dirname(__file__)
    program = textwrap.dedent(_MANAGER).format(path=[here, os.path.dirname(here)])
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as manager:
        assert manager.stdout is not None
        pid = int(manager.stdout.readline())
        os.kill(pid, 0)
        manager.kill()

    def has_gone() -> bool:
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    until(has_gone, "the master ends with the manager", 10)
