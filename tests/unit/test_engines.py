"""Engines of other packages: loaded when they are named, and one that is broken harms nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lazycluster import engines
from lazycluster.cli.app import cli
from lazycluster.cluster import versions
from lazycluster.cluster.engine import check_statement
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.services import Service
from lazycluster.engine import Endpoint, Engine, Option, Port, ServiceSpec

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

class Names:
    Inner = CountingCluster

class Wrong(Counting):
    packages = ("counting")

class WrongCluster(EngineCluster):
    engine_class = Wrong

class Clashing(Counting):
    options = (Option("--workers", "many", "How many.", "N"),)

class ClashingCluster(EngineCluster):
    engine_class = Clashing
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    info = tmp_path / "counting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    lines = ["[lazycluster.engines]", "counting = counting_engine:CountingCluster", "broken = broken_engine:Cluster"]
    lines += ["other = counting_engine:Counting", "dask = counting_engine:CountingCluster"]
    lines += ["within = counting_engine:Names.Inner [extra]", "leaves = leaving_engine:Cluster"]
    lines += ["wrong = counting_engine:WrongCluster", "clash = counting_engine:ClashingCluster"]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "counting_engine.py").write_text(_GOOD)
    (tmp_path / "broken_engine.py").write_text("raise SystemError('no such thing')")
    (tmp_path / "leaving_engine.py").write_text("raise SystemExit('not\\nhere')")
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
    assert "counting_engine:Counting is not a subclass of lazycluster.engine.EngineCluster" in done.stderr
    assert _command_line(plugins, "start", "dask", "--help").stdout.startswith("Usage: lazycluster start dask")


def test_what_a_plug_in_does_wrong_is_named(plugins: Path) -> None:
    def told(name: str) -> str:
        done = _command_line(plugins, "start", name, "-w", "x")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        return done.stderr

    assert "of the package counting cannot be loaded: SystemExit: not\\nhere" in told("leaves")
    assert "Wrong.packages must be a tuple of str, not 'counting'" in told("wrong")
    assert "the engine 'clash' cannot be started: its option --workers is taken already" in told("clash")
    assert "--step N" in _command_line(plugins, "start", "within", "--help").stdout


def test_two_packages_with_an_engine_of_one_name(plugins: Path) -> None:
    info = plugins / "adding-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adding\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lazycluster.engines]\ncounting = adding:Cluster\n")
    done = _command_line(plugins, "start", "counting", "-w", "x")
    assert "the engine 'counting' is in two packages, adding and counting: uninstall one of them" in done.stderr
    assert _command_line(plugins, "start", "within", "--help").returncode == 0


def test_metadata_that_cannot_be_read_harm_nothing(plugins: Path) -> None:
    for name, text in ("adding", b"[lazycluster.engines]\nadding\n"), ("bytes", b"\xff"):
        info = plugins / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_bytes(text)
    for name in "dask", "counting":
        assert _command_line(plugins, "start", name, "--help").returncode == 0


class Stated(Engine):
    name, cluster = "stated", "StatedCluster"

    def master(self, at: Endpoint) -> ServiceSpec:
        return ServiceSpec("master", command=("true",))

    def worker(self, at: Endpoint, master: Endpoint) -> ServiceSpec:
        return ServiceSpec("worker", command=("true",))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"packages": "rq"}, "Wrong.packages must be a tuple of str, not 'rq'"),
        ({"worker_needs": (7,)}, "Wrong.worker_needs must be a tuple of str"),
        ({"worker_ports": Port("data")}, "Wrong.worker_ports must be a tuple of Port"),
        ({"worker_ports": (Port("a"), Port("a"))}, "Wrong.worker_ports must have ports of different names"),
        ({"master_ports": ()}, "Wrong.master_ports must have .* a master at least one"),
        ({"options": ("--step",)}, "Wrong.options must be a tuple of Option"),
        ({"master_on": "hosts"}, "Wrong.master_on must be 'manager' or 'host', not 'hosts'"),
        ({"cluster": None}, "Wrong.cluster must be stated, as a string"),
    ],
)
def test_a_statement_that_makes_no_sense(wrong: dict[str, Any], told: str) -> None:
    check_statement(Stated)
    with pytest.raises(TypeError, match=told):
        check_statement(type("Wrong", (Stated,), wrong))


def test_a_statement_that_lacks_something() -> None:
    with pytest.raises(TypeError, match="Lacking does not state: master, worker"):
        check_statement(type("Lacking", (Engine,), {"name": "lacking", "cluster": "LackingCluster"}))
    with pytest.raises(TypeError, match=r"must be a subclass of lazycluster\.engine\.Engine"):
        check_statement(int)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="worker-0 has no port"):
        _ = Endpoint("worker-0").port


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"command": "sleep 60"}, "command must be a tuple"),
        ({"secrets": {"A": 4711}}, "secrets must have texts by name"),
        ({"files": {"../a": "x"}}, "files: '../a' is not the plain name"),
        ({"stop_signal": "SIGINT"}, "stop_signal must be the name of a signal without SIG"),
        ({"restarts": "many"}, "restarts must be a number"),
    ],
)
def test_a_process_that_makes_no_sense(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"ServiceSpec 'thing': {told}") as raised:
        ServiceSpec("thing", **wrong)
    assert "4711" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (None, "must return a ServiceSpec, not None"),
        (ServiceSpec("thing"), "it has no command"),
        (ServiceSpec("thing", command=("x",), ready_port="data"), "ready_port is 'data', but its ports are: master"),
    ],
)
def test_a_process_that_cannot_be_started(spec: Any, told: str) -> None:
    from lazycluster.core import event_loop

    async def work() -> None:
        await Service.come_up(object.__new__(Service), spec, {"master": 1})

    with pytest.raises((TypeError, ValueError), match=told):
        event_loop.run(work())


def test_options_and_ports_that_make_no_sense() -> None:
    for arguments in ("step", "step"), ("--step", "--step"):
        with pytest.raises(ValueError, match="written as --depth"):
            Option(*arguments, "Help.", "N")
    with pytest.raises(ValueError, match="must be text, count, port or directory, not 'flag'"):
        Option("--step", "step", "Help.", "N", "flag")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a Reach, as Reach\.ALL, not 'all'"):
        Port("data", "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least once, not 0 times"):
        Port("data", count=0)


def test_packages_are_known_by_what_they_are_installed_or_imported_as(monkeypatch: pytest.MonkeyPatch) -> None:
    class Needing(Stated):
        packages = ("pytest-timeout", "pytest_timeout", "click")

    versions.check_manager(Needing())
    monkeypatch.setattr(Needing, "packages", ("no_such.module", "no-such-package"))
    with pytest.raises(
        ClusterError, match=r"no_such.module, no-such-package cannot be imported here(.|\n)*pip install"
    ):
        versions.check_manager(Needing())


def test_ours_are_known() -> None:
    assert list(engines.known())[:2] == ["dask", "hyperopt"]
    with pytest.raises(ClusterError, match="there is no engine 'no'; there are: dask, hyperopt"):
        engines.load("no")
    for name in engines.DEMOS:
        assert engines.load(name).engine_class.name == name


@pytest.mark.parametrize(
    ("engine", "option", "value", "why"),
    [
        ("dask", "--memory-limit", "4XB", "'4XB' is not a size such as '500 MB' or '4 GiB'"),
        ("dask", "--memory-limit", "-4GB", "'-4GB' is not a size"),
        ("hyperopt", "--dbname", "a/b", "must be a name of at most 63 characters"),
    ],
)
def test_options_are_checked_before_anything_starts(engine: str, option: str, value: str, why: str) -> None:
    pytest.importorskip(engine)
    done = CliRunner().invoke(cli, ["start", engine, "-w", "no-host", option, value])
    assert done.exit_code == 2
    assert why in done.output
