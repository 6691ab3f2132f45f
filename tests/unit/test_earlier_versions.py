"""What an earlier version has left behind still works: see tests/fixtures/make.py."""

from __future__ import annotations

import base64
import collections
import importlib
import json
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lazycluster.cluster.exceptions
import lazycluster.exceptions
from api import stored
from lazycluster import EnvironmentSpec, LocalRuntime, RuntimeTask
from lazycluster.agent import environments
from lazycluster.cluster import connection_file
from lazycluster.cluster.exceptions import ClusterError
from lazycluster.cluster.hyperopt_cluster import SearchProgress
from lazycluster.core import event_loop
from lazycluster.environments import cache
from lazycluster.exceptions import LazyclusterError, PortInUseError, TaskExecutionError

_FIXTURES = Path(__file__).parents[1] / "fixtures"
_SENT = "lazycluster.agent.localmodules "  # stands for a module that is sent along: see test_objectives
_VERSIONS = sorted(path for path in _FIXTURES.iterdir() if path.is_dir() and path.name != "__pycache__")


@pytest.fixture(params=_VERSIONS, ids=lambda path: path.name)
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What a version has left, as it was: for its owner only."""
    copy = tmp_path / "left"
    shutil.copytree(request.param, copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copy


# --- pickles ---------------------------------------------------------------------------------------
@pytest.fixture
def pickles(left: Path) -> dict[str, bytes]:
    found = json.loads((left / "pickles.json").read_text())
    return {name: base64.b64decode(text) for name, text in found.items()}


def test_errors_that_were_pickled(pickles: dict[str, bytes]) -> None:
    public = [lazycluster.exceptions, lazycluster.cluster.exceptions]
    for name, data in pickles.items():
        homes = [module for module in public if name in module.__all__]
        if not homes:
            continue
        error = pickle.loads(data)
        assert type(error) is getattr(homes[0], name)
        assert isinstance(error, LazyclusterError)
        assert str(error)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.args) == (type(error), str(error), error.args)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("AgentError", {"host": "node1", "kind": "os", "message": "no such file", "evidence": {"errno": 2}}),
        ("ConnectionLostError", {"host": "node1", "detail": "the network"}),
        ("EnvironmentBuildError", {"problem": "no wheel", "package": "numpy", "output": "no matching wheel"}),
        ("ForwardingForbiddenError", {"host": "node1", "problem": "AllowTcpForwarding no"}),
        ("GroupTaskError", {"host": "node1, node1"}),
        ("InvalidRuntimeError", {"host": "node1", "reason": "authentication"}),
        ("MasterStartError", {"name": "scheduler", "host": "localhost", "problem": "did not start", "exit_status": 1}),
        ("NoAnswerError", {"awaited": "an answer to 'ports'", "seconds": 30.0, "detail": "the link is interrupted"}),
        ("PortInUseError", {"port": 8080, "host": "node1", "detail": "by nginx"}),
        ("RemoteTraceback", {"host": "node1", "pid": 17}),
        ("TaskExecutionError", {"task": "train", "step": 1, "what": "./train", "exit_status": 3}),
        ("VersionMismatchError", {"hosts": ["node1"]}),
        ("WorkerLostError", {"call": "f()", "hosts": ["node1", "node2"], "pid": 17, "exit_status": -9, "output": "x"}),
        ("WorkerStartError", {"name": "worker 1", "log_file": "/tmp/log", "hint": "see the log"}),
    ],
)  # fmt: skip
def test_what_errors_carry(pickles: dict[str, bytes], name: str, attributes: dict[str, Any]) -> None:
    error = pickle.loads(pickles[name])
    assert {key: getattr(error, key) for key in attributes} == attributes


def test_errors_of_several(pickles: dict[str, bytes]) -> None:
    for name, of in [
        ("ClusterStartError", ["WorkerStartError", "ValueError"]), ("GroupTaskError", ["TaskExecutionError"] * 2),
        ("InvalidRuntimesError", ["InvalidRuntimeError"] * 2),
        ("EnvironmentsBuildError", ["EnvironmentBuildError"] * 2),
    ]:  # fmt: skip
        assert [type(one).__name__ for one in pickle.loads(pickles[name]).errors] == of


def test_a_task_a_specification_and_progress(pickles: dict[str, bytes]) -> None:
    task = pickle.loads(pickles["RuntimeTask"])
    assert (type(task), task.name, task.env_variables) == (RuntimeTask, "train", {"SEED": "1"})
    assert [step.label for step in task.steps] == ["./train", "hypot()"]
    assert (task.steps[1].args, task.limits.wall) == ((3, 4), 60)
    spec = pickle.loads(pickles["EnvironmentSpec"])
    assert (type(spec), spec.requirements, spec.python) == (EnvironmentSpec, ("numpy",), "3.13")
    progress = pickle.loads(pickles["SearchProgress"])
    assert (type(progress), progress.best_loss, progress.per_worker) == (SearchProgress, 0.5, {"node1": 3})


# --- detached tasks --------------------------------------------------------------------------------
@pytest.fixture
def state(left: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(left))
    return (left / "state").rename(left / "lazycluster")


def test_detached_tasks(state: Path) -> None:
    with LocalRuntime() as runtime:
        tasks = {task.name: task for task in runtime.detached_tasks()}
        assert {name: task.state for name, task in tasks.items()} == {
            "counted": "done", "raises": "failed", "fails": "failed", "cancelled": "cancelled", "running": "lost",
        }  # fmt: skip
        assert {name: task.log() for name, task in tasks.items() if task.log()} == {
            "counted": "one\n", "fails": "two\n", "running": "three\n",
        }  # fmt: skip
        # By the records on this machine functions they were.
        assert tasks["counted"].result() == collections.Counter("abracadabra")
        with pytest.raises(TaskExecutionError, match="8080") as raised:
            tasks["raises"].result()
        assert isinstance(raised.value.__cause__, PortInUseError)
        assert raised.value.__cause__.port == 8080
        with pytest.raises(TaskExecutionError) as failed:
            tasks["fails"].result()
        assert failed.value.exit_status == 3
        for task in tasks.values():
            task.remove()
        assert runtime.detached_tasks() == []
    assert [path for path in state.rglob("*") if path.is_file()] == []


# --- environments ----------------------------------------------------------------------------------
@pytest.fixture
def root(left: Path) -> Path:
    """The environments, with empty files in the place of their packages, and an interpreter."""
    root = left / "environments"
    for name in (root / "names.txt").read_text().split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "names.txt").unlink()
    for prefix in _prefixes(root):
        (prefix / "bin").mkdir()
        (prefix / "bin" / "python").symlink_to(sys.executable)
    return root


def _prefixes(root: Path) -> list[Path]:
    return [path for path in (root / "envs").iterdir() if path.is_dir()]


def test_environments_are_found_and_removed(root: Path) -> None:
    (prefix,) = _prefixes(root)
    with LocalRuntime() as runtime:
        store = event_loop.run(cache.list_on(runtime._connection, str(root)))
        (kept,) = store.environments
        assert (kept.id, kept.path, kept.problem, kept.in_use) == (prefix.name, str(prefix), None, False)
        assert (kept.packages, kept.source) == ({"alpha": "1.0"}, "[alpha]")
        asked = runtime._connection.request("environment", action="find", root=str(root), id=prefix.name)
        found = event_loop.run(asked)
        assert (found["found"], found["prefix"]) == (True, str(prefix))
    with LocalRuntime() as runtime:  # the first one's agent has used it until it ended
        assert event_loop.run(cache.prune_on(runtime._connection, 0, cache_dir=str(root))).removed == (prefix.name,)
        assert event_loop.run(cache.list_on(runtime._connection, str(root))).environments == ()
    assert not prefix.exists()
    assert list((root / "wheels").iterdir()) == []


def test_a_root_from_before_roots_were_marked(root: Path) -> None:
    (root / environments.MARKER).unlink()
    environments.claim(str(root))
    assert environments.is_exclusive(str(root))


# --- connection files ------------------------------------------------------------------------------
def test_the_connection_file_of_a_dask_cluster(left: Path, free_port: int) -> None:
    """It is read to the end: what is wrong is that the cluster does not run any more."""
    pytest.importorskip("distributed")
    from lazycluster.cluster.dask_cluster import DaskCluster

    file = left / "dask.json"
    file.write_text(re.sub(r"(127\.0\.0\.1:)\d+", rf"\g<1>{free_port}", file.read_text()))
    with pytest.raises(ClusterError, match=r"does not answer[\s\S]*see whether the process \d+"):
        DaskCluster.connect(file, timeout=1)
    connection_file.write(file, "Engine", {}, "another")  # it is known as a connection file, and replaced


def test_the_connection_file_of_a_search(left: Path) -> None:
    """A server with the password that is in it, on the database of that version, is connected to."""
    pytest.importorskip("hyperopt")
    from lazycluster.cluster.hyperopt_cluster import HyperoptCluster
    from lazycluster.core.certificates import make_identities
    from lazycluster.engines.hyperopt.programs import compat

    file = left / "hyperopt.json"
    text = file.read_text()
    address = re.search(r"mongo://(\w+):([^@]+)@127\.0\.0\.1:(\d+)/.*tlsCAFile=([^\"&]+)", text)
    assert address is not None
    user, password, port, authority = address.groups()
    certificate, identities = make_identities("database")
    tls = {"certificate": identities["database"].certificate, "key": identities["database"].key}
    settings = {"dbpath": str(left / "search-plain"), "user": user, "password": password, "tls": tls}
    argv = [sys.executable, "-c", "from lazycluster.engines.hyperopt.mongo.program import main; main()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({**settings, "ports": {"master": 0}}) + "\n")
        process.stdin.flush()
        real = json.loads(process.stdout.readline().partition(" ")[2])["port"]
        (left / "authority.pem").write_text(certificate)
        file.write_text(text.replace(authority, str(left / "authority.pem")).replace(f":{port}/", f":{real}/"))
        try:
            trials = HyperoptCluster.connect(file, exp_key="search")
            assert [trials.count_by_state_synced(state) for state in (0, 1, 2)] == [2, 0, 4]
            assert len(trials.losses()) == 6
            assert trials.best_trial["result"]["loss"] == min(loss for loss in trials.losses() if loss is not None)
        finally:
            compat.close_clients(real)
            process.terminate()


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that nobody listens on, and nobody else takes meanwhile."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


# --- searches --------------------------------------------------------------------------------------
@pytest.fixture
def server(left: Path) -> Iterator[Any]:
    """The server on the database of a search, as other programs start it."""
    pymongo = pytest.importorskip("pymongo")
    argv = [sys.executable, "-m", "lazycluster.mongo", "--dbpath", str(left / "search-local"), "--port", "0"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            port = re.fullmatch(r"waiting for connections on port (\d+)\n", process.stderr.readline())
            assert port is not None
            with pymongo.MongoClient("127.0.0.1", int(port[1])) as client:
                yield client
        finally:
            process.terminate()


def test_trials_of_a_search(server: Any) -> None:
    jobs = server.hyperopt.jobs
    done = list(jobs.find({"state": 2, "exp_key": "search"}))
    assert [trial["tid"] for trial in done] == [0, 1, 2, 3]
    assert all(trial["result"]["loss"] == abs(trial["misc"]["vals"]["x"][0] - 2.0) for trial in done)
    assert [trial["tid"] for trial in jobs.find({"state": 0, "owner": None})] == [4, 5]
    found = jobs.find_one_and_update({"state": 0}, {"$set": {"state": 1}}, return_document=True)
    assert (found["state"], jobs.count_documents({"state": 1})) == (1, 1)
    assert {tuple(index["key"]) for index in jobs.list_indexes()} >= {("_id",)}


def _domain(database: Path) -> bytes:
    """Return the objective as it lies in a database."""
    bson = pytest.importorskip("bson")
    with sqlite3.connect(database / "lazycluster-mongo.sqlite") as sql:
        bodies = [bson.decode(row[0]) for row in sql.execute("SELECT body FROM documents")]
    sql.close()
    (chunk,) = [body["data"] for body in bodies if "data" in body]
    return bytes(chunk)


def test_objectives(left: Path) -> None:
    """One by its name, and one from a module that no host has, as the programs of workers read them."""
    pytest.importorskip("hyperopt")
    names = ["search-plain", "search-local"]
    expected = ["1.5", "3.5"]
    for name in names:
        (left / name / "objective").write_bytes(_domain(left / name))
    assert (left / "search-local" / "objective").read_bytes().startswith(b"lazycluster objective\n")
    made_by = next((left / "environments" / "envs").glob("py*-*/lazycluster.json")).parent.name.partition("-")[0]
    if made_by != f"py{sys.version_info[0]}{sys.version_info[1]}":  # code is sent between equal versions only
        del names[1], expected[1]
    program = (
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "import lazycluster.agent.localmodules\n"
        "from lazycluster.engines.hyperopt.programs import objectives\n"
        "sys.modules[objectives.__package__ + '.localmodules'] = lazycluster.agent.localmodules\n"  # it is sent along
        "sys.modules['lazycluster.agent.localmodules'] = None\n"  # hosts do not have this package
        "for name in sys.argv[1:]:\n"
        "    print(objectives.loads(open(name + '/objective', 'rb').read()).fn(-1.5))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *names], cwd=left, capture_output=True, text=True)
    assert done.stdout.split() == expected, done.stderr


# --- names -----------------------------------------------------------------------------------------
def test_all_names_of_ours_in_pickles_are_known() -> None:
    """Such names are constants, which do not follow those of modules."""
    found = stored.pickled(_FIXTURES)
    assert {"lazycluster.exceptions PortInUseError", "lazycluster.agent.localmodules module_globals"} <= found
    for name in found - {name for name in found if name.startswith(_SENT)}:
        module, _, attribute = name.partition(" ")
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
