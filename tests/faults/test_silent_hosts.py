"""Hosts that say nothing while something is to end: nobody waits for them, and it is said what may be left there."""

from __future__ import annotations

import datetime
import re
import signal
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from lazycluster import RuntimeGroup, RuntimeTask
from lazycluster.cluster import services
from lazycluster.runtime import runtime
from lazycluster.ssh import connection, tunnel_handles
from lazycluster.tasks import functions, step_runner
from patience import until

_FOR_EVER = 3600.0


@pytest.fixture(autouse=True)
def _endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing end because of the time that a host which answers may take."""
    for module, name in (
        (services, "_STOP_LIMIT"),
        (runtime, "_END_LIMIT"),
        (connection, "_STOP_PATIENCE"),
        (tunnel_handles, "_ANSWER_LIMIT"),
        (step_runner, "_END_LIMIT"),
        (functions, "END_PATIENCE"),
    ):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, _FOR_EVER)


def connect(hosts: Any, **settings: Any) -> RuntimeGroup:
    settings = {"config_file": hosts.config_file, "link_timeout": 4, "grace": 4, **settings}
    return RuntimeGroup(hosts=hosts.names, connection_kwargs=settings, python=sys.executable)


def _warned(caplog: pytest.LogCaptureFixture, host: str) -> None:
    """Check that it was said where something may be left, and until when."""
    [said] = re.findall(
        rf"{host}: it does not answer, so something may be left there.* at (\S+) at the latest", caplog.text
    )
    until = datetime.datetime.combine(datetime.date.today(), datetime.time.fromisoformat(said))
    left = (until - datetime.datetime.now()).total_seconds() % 86400
    assert left <= 5


def test_tasks_and_ports(make_hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    hosts = make_hosts(2)
    with connect(hosts) as group:
        group.execute_task(RuntimeTask("sleep").run_command("sleep 3600"), broadcast=True)
        group.get_runtime("host1").execute_task(RuntimeTask("call").call(_sleep))
        group.expose_port_to_runtimes(24400)
        for host in hosts:
            until(lambda host=host: "sleep 3600" in str(host.processes()), "the tasks")
        hosts[0].cut_off()
    assert not hosts[1].processes()
    _warned(caplog, "host1")
    assert "host2" not in caplog.text
    until(lambda: not hosts[0].processes(), "the host to have ended everything by itself")
    hosts[0].restore()


def _sleep() -> None:
    import time

    time.sleep(3600)


@pytest.mark.soak
def test_a_cluster(make_hosts: Any, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    hosts = make_hosts(2)
    with connect(hosts) as group:
        with DaskCluster(group) as cluster:
            cluster.start()
            hosts[0].cut_off()
        assert "host1: it has not said that it has ended dask-worker host1-0" in caplog.text
        assert "dask-worker host2-0" not in caplog.text
        assert group.get_runtime("host2").call(sum, [1, 2]) == 3
    _warned(caplog, "host1")
    until(lambda: not hosts[0].processes(), "the host to have ended everything by itself")
    hosts[0].restore()


_INTERRUPTED = """
    import sys
    from lazycluster import RuntimeGroup, RuntimeTask
    from lazycluster.runtime import runtime
    from lazycluster.ssh import connection

    runtime._END_LIMIT = connection._STOP_PATIENCE = 3600
    settings = {{"config_file": {config!r}, "link_timeout": 4, "grace": 4}}
    group = RuntimeGroup(hosts={names!r}, connection_kwargs=settings, python=sys.executable)
    group.execute_task(RuntimeTask("sleep").run_command("sleep 3601"), broadcast=True)
    print("working", flush=True)
    group.join()
"""


@pytest.mark.soak
def test_ctrl_c(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    program = textwrap.dedent(_INTERRUPTED).format(config=hosts.config_file, names=hosts.names)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "working\n"
        for host in hosts:
            until(lambda host=host: "sleep 3601" in str(host.processes()), "the tasks")
        hosts[0].cut_off()
        manager.send_signal(signal.SIGINT)
        _, said = manager.communicate(timeout=60)
    assert manager.returncode == -signal.SIGINT, said
    assert "host1: it does not answer, so something may be left there" in said
    assert "host2: it does not" not in said
    assert not hosts[1].processes()
    until(lambda: not hosts[0].processes(), "the host to have ended everything by itself")
    hosts[0].restore()
