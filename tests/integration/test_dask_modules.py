"""The user's own modules on the workers of a Dask cluster."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_groups import local_group, ssh_group

pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")

from lazycluster.cluster.dask_cluster import DaskCluster  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with modules that are on the path of the manager."""
    monkeypatch.syspath_prepend(str(tmp_path))
    # Bytecode is not told from that of a text of the same length and second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def _write(folder: Path, value: int) -> None:
    """Write a module, and a package that it uses, in a version that is as long as any other."""
    (folder / "own_package").mkdir(exist_ok=True)
    (folder / "own_package" / "__init__.py").write_text("")
    (folder / "own_package" / "inner.py").write_text(f"VALUE = {value}\n")
    (folder / "own_module.py").write_text(
        f"from own_package import inner\n\n\ndef both(_):\n    return {value}, inner.VALUE\n"
    )


def _answers(client: Any) -> set[Any]:
    module = importlib.import_module("own_module")
    return set(client.gather(client.map(module.both, range(4), pure=False)))


def test_the_present_version_is_on_the_workers(hosts: Any, folder: Path) -> None:
    _write(folder, 1)
    with ssh_group(hosts) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            for value in (1, 2, 3):
                _write(folder, value)
                assert _answers(client) == {(value, value)}
            client.restart(timeout=30)
            assert _answers(client) == {(3, 3)}


def test_modules_that_come_later_are_there_too(folder: Path) -> None:
    with local_group(1) as group, DaskCluster(group) as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            assert client.submit(lambda: 1).result(timeout=20) == 1
            _write(folder, 7)
            assert _answers(client) == {(7, 7)}


# --- every way in which a client sends code ------------------------------------------------------
_SENT = """
from distributed import NannyPlugin, SchedulerPlugin, WorkerPlugin

VALUE = {value}


def present(*_):
    return VALUE


class Thing:
    def __init__(self):
        self.value = VALUE  # of where it was made

    def __reduce__(self):
        return Thing, ()  # so it is that of where it is loaded


class OnScheduler(SchedulerPlugin):
    name = "on-scheduler-{value}"

    def start(self, scheduler):
        scheduler.noted = VALUE


class OnWorker(WorkerPlugin):
    name = "on-worker-{value}"

    def setup(self, worker):
        worker.noted = VALUE


class OnNanny(NannyPlugin):
    name = "on-nanny-{value}"

    def setup(self, nanny):
        nanny.noted = VALUE


class Counter:
    def look_at(self, thing):
        return thing.value
"""


def _write_sent(folder: Path, name: str, value: int) -> Any:
    (folder / f"{name}.py").write_text(_SENT.format(value=value))
    importlib.invalidate_caches()
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def _run(client: Any, module: Any) -> Any:
    return set(client.run(module.present).values())


def _run_on_nannies(client: Any, module: Any) -> Any:
    return set(client.run(module.present, nanny=True).values())


def _run_on_scheduler(client: Any, module: Any) -> Any:
    return {client.run_on_scheduler(module.present)}


def _scheduler_plugin(client: Any, module: Any) -> Any:
    client.register_plugin(module.OnScheduler())
    return {client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.noted)}


def _worker_plugin(client: Any, module: Any) -> Any:
    client.register_plugin(module.OnWorker())
    return set(client.run(lambda dask_worker: dask_worker.noted).values())


def _nanny_plugin(client: Any, module: Any) -> Any:
    client.register_plugin(module.OnNanny())
    return set(client.run(lambda dask_worker: dask_worker.noted, nanny=True).values())


def _worker_callbacks(client: Any, module: Any) -> Any:
    client.register_worker_callbacks(setup=module.present)
    return {module.VALUE}  # what a callback returns is lost: that it can be loaded is all that is seen


def _scatter(client: Any, module: Any) -> Any:
    future = client.scatter(module.Thing(), hash=False)
    return {client.submit(lambda thing: thing.value, future, pure=False).result(timeout=20)}


def _variable(client: Any, module: Any) -> Any:
    from distributed import Variable

    variable = Variable(f"variable {module.__name__} {module.VALUE}", client=client)
    variable.set(client.scatter(module.Thing(), hash=False))
    return {client.submit(lambda thing: thing.value, variable.get(), pure=False).result(timeout=20)}


def _queue(client: Any, module: Any) -> Any:
    from distributed import Queue

    queue = Queue(f"queue {module.__name__} {module.VALUE}", client=client)
    queue.put(client.scatter(module.Thing(), hash=False))
    return {client.submit(lambda thing: thing.value, queue.get(timeout=20), pure=False).result(timeout=20)}


def _dataset(client: Any, module: Any) -> Any:
    client.publish_dataset(module.Thing(), name="thing", override=True)
    return {client.get_dataset("thing").value}


def _actor(client: Any, module: Any) -> Any:
    actor = client.submit(module.Counter, actor=True, pure=False).result(timeout=20)
    return {actor.look_at(module.Thing()).result(timeout=20)}


def _submit(client: Any, module: Any) -> Any:
    return {client.submit(module.present, pure=False).result(timeout=20)}


def _submit_on_the_loop(client: Any, module: Any) -> Any:
    """As the libraries do that have coroutines of their own for `client.sync`."""

    async def submit() -> Any:
        return await client.submit(module.present, pure=False)

    return {client.sync(submit)}


_WAYS = (
    _run, _run_on_nannies, _run_on_scheduler, _scheduler_plugin, _worker_plugin, _nanny_plugin, _worker_callbacks,
    _scatter, _variable, _queue, _dataset, _actor, _submit, _submit_on_the_loop,
)  # fmt: skip


@pytest.fixture(scope="module")
def one_worker() -> Iterator[Any]:
    with local_group(1) as group, DaskCluster(group, nthreads=1, memory_limit="700 MB") as cluster:
        cluster.start()
        with cluster.get_client(timeout=20) as client:
            yield client


@pytest.mark.keeps("manager")
@pytest.mark.parametrize("way", _WAYS)
def test_code_is_the_present_one_in_whatever_way_it_is_sent(one_worker: Any, folder: Path, way: Any) -> None:
    name = f"sent{way.__name__}"
    for value in (1, 2, 3, 4):
        module = _write_sent(folder, name, value)
        assert way(one_worker, module) == {value}


@pytest.mark.keeps("manager")
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig", "shift_jis"])
def test_modules_in_an_encoding_of_their_own(one_worker: Any, folder: Path, encoding: str) -> None:
    letter = "あ" if encoding == "shift_jis" else "é"
    text = f"# -*- coding: {encoding} -*-\n\n\ndef letter():\n    return '{letter}'\n"
    name = "encoded_" + encoding.replace("-", "_")
    (folder / f"{name}.py").write_text(text, encoding=encoding)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    assert one_worker.submit(module.letter, pure=False).result(timeout=20) == letter


@pytest.mark.keeps("manager")
def test_an_actor_gets_an_object_of_a_module_that_is_new(one_worker: Any, folder: Path) -> None:
    first = _write_sent(folder, "sent_actor_class", 1)
    actor = one_worker.submit(first.Counter, actor=True, pure=False).result(timeout=20)
    for value in (2, 3):  # new, and then changed
        assert actor.look_at(_write_sent(folder, "sent_later", value).Thing()).result(timeout=20) == value


def test_a_module_whose_imports_the_host_lacks_fails_its_tasks_and_no_worker(hosts: Any, folder: Path) -> None:
    """distributed itself unpickles tasks while it reads from the scheduler, and would end each worker in turn."""
    hosts[0].run(
        "mkdir -p /home/lazy/lacks && "
        "echo 'raise ModuleNotFoundError(\"No module named \" + repr(__name__))' > /home/lazy/lacks/hypothesis.py"
    )
    (folder / "needs_more.py").write_text("import hypothesis\n\n\ndef double(x):\n    return 2 * x\n")
    module = importlib.import_module("needs_more")
    with ssh_group(hosts) as group, DaskCluster(group) as cluster:
        group.runtimes[0].add_env_variables({"PYTHONPATH": "/home/lazy/lacks"})
        cluster.start(1)
        with cluster.get_client(timeout=20) as client:
            with pytest.raises(ModuleNotFoundError, match=r"No module named 'hypothesis' on host1(.|\n)*Next step: "):
                client.submit(module.double, 1).result(timeout=30)
            assert client.submit(len, "abc").result(timeout=30) == 3
        assert [worker.restarts for worker in cluster.workers] == [0]
    hosts[0].run("rm -rf /home/lazy/lacks")
