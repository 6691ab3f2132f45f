"""The two databases of Hyperopt clusters: what they start, and hyperopt's own tests against ours."""

from __future__ import annotations

import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("hyperopt")
pytest.importorskip("pymongo")

from cluster_groups import local_group
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from lazycluster import RuntimeGroup
from lazycluster.cluster import versions
from lazycluster.cluster.exceptions import ClusterError, MasterStartError
from lazycluster.cluster.hyperopt_cluster import EmbeddedMongoLauncher, HyperoptCluster, LocalMongoLauncher
from lazycluster.exceptions import PortInUseError
from patience import until

pytestmark = [  # by hyperopt
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def group() -> Iterator[RuntimeGroup]:
    with local_group(1) as group:
        yield group


def _program(folder: Path, monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    folder.mkdir()
    (folder / "mongod").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    (folder / "mongod").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_mongod_is_used_where_it_is_asked_for(
    group: RuntimeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path / "bin", monkeypatch, sys.executable, str(Path(__file__).with_name("stand_in_mongod.py")))
    assert isinstance(HyperoptCluster(group, dbpath=str(tmp_path / "a"))._master_launcher, EmbeddedMongoLauncher)
    passwords = set()
    for attempt in range(2):  # the second time the user exists
        with HyperoptCluster(group, LocalMongoLauncher, dbpath=str(tmp_path / "db")) as cluster:
            launcher = cluster._master_launcher
            assert isinstance(launcher, LocalMongoLauncher)
            cluster.start_master()
            command = shlex.split(launcher.get_mongod_start_cmd())
            assert command[:3] == ["mongod", "--dbpath", str(tmp_path / "db")]
            assert {"--auth", "--bind_ip", "127.0.0.1", str(cluster.master_port)} < set(command)
            assert "--fork" not in command
            passwords.add(cluster._hyperopt.access.password)
            assert stat.S_IMODE((tmp_path / "db" / "lazycluster-password").stat().st_mode) == 0o600
            tls = {"tls": True, "tlsAllowInvalidCertificates": True}
            stranger: MongoClient = MongoClient("127.0.0.1", cluster.master_port, **tls)  # type: ignore[type-arg]
            with stranger, pytest.raises(OperationFailure, match="requires authentication"):
                stranger.db.c.find_one()
            with MongoClient(cluster.pymongo_url) as client:
                assert client["hyperopt"].jobs.count_documents({}) == attempt
            assert cluster._hyperopt.access.identity is not None
            assert not any(
                cluster._hyperopt.access.identity.key.encode() in path.read_bytes()
                for path in (tmp_path / "db").rglob("*")
                if path.is_file()
            )
            jobs = cluster.trials("one").handle.jobs
            assert jobs.count_documents({"x": 1}) == attempt
            jobs.insert_one({"x": 1})
            assert launcher.process is not None
            assert launcher.process.poll() is None
        assert launcher.process is None
    assert len(passwords) == 1
    (tmp_path / "db" / "WiredTiger").touch()  # as a real one leaves it
    assert isinstance(HyperoptCluster(group, dbpath=str(tmp_path / "db"))._master_launcher, LocalMongoLauncher)
    assert launcher.get_mongod_stop_cmd() == f"mongod --dbpath {tmp_path}/db --shutdown"
    with pytest.raises(MasterStartError, match="database of mongod"):
        HyperoptCluster(group, EmbeddedMongoLauncher, dbpath=str(tmp_path / "db")).start_master()


def test_mongod_that_does_not_start(group: RuntimeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HyperoptCluster(group, LocalMongoLauncher, dbpath=str(tmp_path / "db")) as cluster:
        with pytest.raises(MasterStartError, match=r"not on the PATH(.|\n)*Next step: install MongoDB"):
            cluster.start_master()
        _program(tmp_path / "bin", monkeypatch, sys.executable, str(Path(__file__).with_name("stand_in_mongod.py")))
        for file, problems in (
            ("mongod.lock", ("status 100: the files cannot be used", "DBPathInUse: Unable to lock")),
            ("of another version", ("status 62: the files are of another version", "UPGRADE PROBLEM")),
        ):
            (tmp_path / "db" / file).touch()
            with pytest.raises(MasterStartError) as caught:
                cluster.start_master()
            assert all(problem in str(caught.value) for problem in problems), str(caught.value)
            (tmp_path / "db" / file).unlink()
            assert cluster.master_port is None
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortInUseError):
            cluster.start_master(taken.getsockname()[1])
        # Somebody takes the port at the last moment: the next one is tried.
        (tmp_path / "db" / "somebody was faster").touch()
        cluster.start_master()
        assert cluster.master_port not in (None, 27017)
        assert cluster.progress().done == 0


def test_a_given_time_out_is_honoured(group: RuntimeGroup, tmp_path: Path) -> None:
    with HyperoptCluster(group, EmbeddedMongoLauncher, dbpath=str(tmp_path / "db")) as cluster:
        with pytest.raises(MasterStartError, match="hyperopt-database: it was not ready within 0 s"):
            cluster.start_master(timeout=0)
        assert cluster.master_port is None
        cluster.start_master()
        assert cluster.master_port is not None


def test_a_database_whose_port_somebody_else_takes_says_so(
    group: RuntimeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbeddedMongoLauncher, "RESTARTS", 1)
    with HyperoptCluster(group, EmbeddedMongoLauncher, dbpath=str(tmp_path / "db")) as cluster:
        cluster.start(1)
        port = cluster.master_port
        assert cluster._master_launcher.process is not None
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            cluster._master_launcher.process.kill()
            until(lambda: _bound(other, port), "the port")
            other.listen()
            until(lambda: cluster.master is not None and cluster.master.state == "failed", "the failure")
            assert repr(cluster).startswith("<HyperoptCluster failed, ")
        assert cluster.master is not None
        assert f"another program has taken its port {port}" in cluster.master.problem


def _bound(one: socket.socket, port: int | None) -> bool:
    try:
        one.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["hyperopt", "pymongo", "cryptography"])
def test_software_that_is_missing_here(
    group: RuntimeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(versions, "_is_here", lambda wanted: wanted != name)
    with pytest.raises(ClusterError, match=rf"{name} cannot be imported here, on the manager(.|\n)*pip install"):
        HyperoptCluster(group, dbpath=str(tmp_path / "db"))
    assert not (tmp_path / "db").exists()


def test_directories_that_cannot_be_used(group: RuntimeGroup, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        HyperoptCluster(group, dbpath=str(tmp_path / "file" / "db"))
    (tmp_path / "lazycluster-mongo.sqlite").write_bytes(b"no database" * 100)
    with (
        HyperoptCluster(group, dbpath=str(tmp_path)) as cluster,
        pytest.raises(MasterStartError, match="file is not a database"),
    ):
        cluster.start_master()


@pytest.mark.parametrize(
    "options", [{"dbname": ""}, {"dbname": "a/b"}, {"worker_poll_intervall": 0}, {"min_workers": 0}]
)
def test_arguments_that_make_no_sense(group: RuntimeGroup, tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        HyperoptCluster(group, dbpath=str(tmp_path), **options)  # type: ignore[arg-type]


_PLUGIN = """
import contextlib
import threading

from lazycluster.engines.hyperopt.programs import compat

mongoexp = compat.load()
lock, temp_dir = threading.Lock(), mongoexp.temp_dir


# These tests have workers that are threads, which all change into one directory, and remove it when they are done: that
# of another one, too, now and then. Then a worker ends with an error, and the test waits for ever.
@contextlib.contextmanager
def one_at_a_time(*arguments, **options):
    with lock, temp_dir(*arguments, **options):
        yield


mongoexp.temp_dir = one_at_a_time
"""


@pytest.mark.soak
def test_hyperopts_own_tests(tmp_path: Path) -> None:
    """They start a program named mongod, on a port and in a directory of their own."""
    import hyperopt

    tests = Path(hyperopt.__file__).parent / "tests" / "integration" / "test_mongoexp.py"
    if not tests.exists():
        pytest.skip("this hyperopt has no tests")
    # They use one directory for all their runs on a machine, and remove it.
    text = tests.read_text()
    assert "/tmp/hyperopt_test" in text
    tests = tmp_path / "test_mongoexp.py"
    tests.write_text(text.replace("/tmp/hyperopt_test", str(tmp_path / "data")))
    server = shlex.join([sys.executable, "-m", "lazycluster.mongo"])
    (tmp_path / "mongod").write_text(f'#!/bin/sh\nexec {server} "$@"\n')
    (tmp_path / "mongod").chmod(0o755)
    (tmp_path / "compat_plugin.py").write_text(_PLUGIN)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    # They do not close their clients, which newer Pythons notice.
    plugins = ["-p", "compat_plugin", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", *plugins]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tests)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "12 passed" in done.stdout
