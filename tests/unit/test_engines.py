"""Engines of other packages: loaded when they are named, and one that is broken harms nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazycluster import engines
from lazycluster.cluster.exceptions import ClusterError

_GOOD = """
from pathlib import Path
Path(__file__).with_name("loaded").touch()
from lazycluster.engine import Engine, EngineCluster, Option, Port, Reach, ServiceSpec

class Counting(Engine):
    name, cluster = "counting", "CountingCluster"
    worker_ports = (Port("worker"), Port("data", count=2), Port("side", Reach.LOCAL))
    options = (Option("--step", "step", "How far.", "N", "count"), Option("--note", "note", "A note.", "TEXT"))
    summary = "Start a counting cluster."
    def __init__(self, step=None, note=None):
        self.step = step
    def master(self, at):
        return ServiceSpec("counter", command=("counter", str(at.port)))
    def worker(self, at, master):
        return ServiceSpec("adder", command=("adder", str(master.port)))

class CountingCluster(EngineCluster):
    engine_class = Counting
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    info = tmp_path / "counting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    lines = ["[lazycluster.engines]", "counting = counting_engine:CountingCluster", "broken = broken_engine:Cluster"]
    lines += ["other = counting_engine:Counting", "dask = counting_engine:CountingCluster"]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "counting_engine.py").write_text(_GOOD)
    (tmp_path / "broken_engine.py").write_text("raise SystemError('no such thing')")
    return tmp_path


def _command_line(plugins: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(plugins), "COLUMNS": "80"}
    command = [sys.executable, "-m", "lazycluster", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_an_engine_of_another_package_is_a_command_with_its_options(plugins: Path) -> None:
    for arguments in ("--help",), ("start", "--help"), ("list-runtimes", "--help"), ("start", "dask", "--help"):
        done = _command_line(plugins, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert not (plugins / "loaded").exists()
    listed = _command_line(plugins, "start", "--help").stdout
    assert "counting  Start a cluster of counting (counting)." in listed
    assert "dask      Start a Dask cluster." in listed
    shown = _command_line(plugins, "start", "counting", "--help").stdout
    assert "Start a counting cluster." in shown
    assert "--step N" in shown
    assert "--note TEXT" in shown
    assert "--workers N" in shown
    assert (plugins / "loaded").exists()


def test_a_broken_engine_costs_a_line(plugins: Path) -> None:
    done = _command_line(plugins, "start", "broken", "-w", "x")
    assert done.returncode == 1
    assert "the engine 'broken' of the package counting cannot be loaded: SystemError: no such thing" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = _command_line(plugins, "start", "other", "-w", "x")
    assert "counting_engine:Counting is no subclass of lazycluster.engine.EngineCluster" in done.stderr
    assert _command_line(plugins, "start", "dask", "--help").stdout.startswith("Usage: lazycluster start dask")


def test_ours_are_known() -> None:
    assert list(engines.known())[:2] == ["dask", "hyperopt"]
    with pytest.raises(ClusterError, match="there is no engine 'no'; there are: dask, hyperopt"):
        engines.load("no")
    for name in engines.DEMOS:
        assert engines.load(name).engine_class.name == name
