"""Clusters in the foreground that a file specifies, on real hosts."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lazycluster import RuntimeTask, load_cluster_file

FILE = """
engine = "dask"
hosts = ["host[1-3]", "@more"]
exclude = "host3"
workers = 3
python = "python{version}"
env = {{ OMP_NUM_THREADS = 1 }}

[groups]
more = "host1"

[options]
nthreads = 1
memory_limit = "300 MB"

[host."@more"]
env.TZ = "UTC"
"""


def start(hosts: Any, file: Path, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "lazycluster", "start", "-f", str(file), "--config", str(hosts.config_file)]
    return subprocess.Popen(
        [*argv, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write(directory: Path, more: str = "") -> Path:
    file = directory / "cluster.toml"
    file.write_text(more + FILE.format(version=".".join(map(str, sys.version_info[:2]))))
    return file


def test_a_file_starts_a_cluster_and_options_win(hosts: Any, tmp_path: Path) -> None:
    process = start(hosts, write(tmp_path), "--workers", "2")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert lines[0].startswith("DaskCluster with 2 workers"), err
    assert "Starting 2 workers on 2 hosts" in err


def test_what_a_stranger_may_not_set_connects_nothing(hosts: Any, tmp_path: Path) -> None:
    process = start(hosts, write(tmp_path, "setup = 'touch /tmp/evil'\n"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "cluster.toml, line 1: setup is taken only from a file that you trust" in err
    assert "use it with --trust" in err
    assert hosts[0].run("test -e /tmp/evil", check=False).returncode == 1


def test_settings_of_a_file_reach_the_hosts(hosts: Any, tmp_path: Path) -> None:
    spec = load_cluster_file(write(tmp_path), config_file=str(hosts.config_file))
    assert spec.hosts == ("host1", "host2")
    connection = {"config_file": str(hosts.config_file)}
    spec = dataclasses.replace(spec, group_options={**spec.group_options, "connection_kwargs": connection})
    with spec.make_group() as group:
        line = "echo $OMP_NUM_THREADS $TZ"
        looked = {one.host: RuntimeTask("look").run_command(line) for one in group.runtimes}
        for one in group.runtimes:
            one.execute_task(looked[one.host], execute_async=False)
        found = {host: task.execution_log[0] for host, task in looked.items()}
    assert {host: text.strip() for host, text in found.items()} == {"host1": "1 UTC", "host2": "1"}
