"""Every fault, while every load runs: it ends with the right result or a clear error, and nothing is left.

``tests/faults/table.py`` turns what came out of it into the table of the documentation.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from injections import DIRECT, FAULTS, HOST_HIT, LOADS, MAP, SEARCH, SHUFFLE, Fault
from loads import LOADS as KINDS
from loads import Outcome, Running
from scenes import NobodyThereError, Scene, UnavailableError

from lazycluster import RuntimeGroup
from patience import until

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down; hyperopt is older than its Python.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.timeout(400),
]

#: Seconds from the end of the fault within which a load must have ended, on a loaded machine; later means it hangs.
LIMIT = 150.0

#: The loads that end with the right result whatever happens: what was lost is done elsewhere, or again.
ALWAYS_RIGHT = (MAP, SHUFFLE, DIRECT, SEARCH)

#: What runs with all other tests; the rest is the soak's.
QUICK = {
    ("sshd session killed", "copy"),
    ("function process killed", "map"),
}


def _cells() -> Iterator[Any]:
    for fault in FAULTS.values():
        for load in fault.loads:
            marks = [] if (fault.name, load) in QUICK else [pytest.mark.soak]
            yield pytest.param(fault, load, id=f"{load}, {fault.name}", marks=marks)


@pytest.fixture
def scene(make_hosts: Callable[..., Any], fault: Fault, load: str, tmp_path: Path) -> Iterator[Scene]:
    """Two hosts, and the cluster that the load needs."""
    if load in (SHUFFLE, DIRECT):
        pytest.importorskip("distributed")
    if load == SEARCH:
        pytest.importorskip("hyperopt")
    hosts = make_hosts(2, bastion=fault.bastion)
    # The time for which a host that stays away is waited for is that for which it waits.
    patience = fault.lasts + 60 if fault.heals else 10
    settings = {"config_file": hosts.config_file, "link_timeout": 2, "grace": patience, "timeout": 10}
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(RuntimeGroup(hosts=hosts.names, connection_kwargs=settings, python=sys.executable))
        scene = Scene(hosts, group, tmp_path)
        if load in (SHUFFLE, DIRECT):
            from lazycluster.cluster.dask_cluster import DaskCluster

            network = "direct" if load == DIRECT else "tunnel"
            scene.dask = stack.enter_context(DaskCluster(group, nthreads=1, network=network))
            scene.dask.start()
        if load == SEARCH:
            from lazycluster.cluster.hyperopt_cluster import HyperoptCluster

            scene.hyperopt = stack.enter_context(HyperoptCluster(group, dbpath=str(tmp_path / "db"), lease=5))
            scene.hyperopt.start()
        yield scene


@contextlib.contextmanager
def struck(fault: Fault, scene: Scene, running: Running) -> Iterator[None]:
    """Inject a fault while a load is in the middle of its work, as soon as there is something to hit."""
    running.load.under_way.wait(LIMIT)
    while True:
        assert not running.over, f"it ended before the fault: {running.outcome(0)}"
        strike = fault.strike(scene, HOST_HIT.get(running.load.name, 0))
        try:
            strike.__enter__()
            break
        except NobodyThereError:
            time.sleep(0.02)
        except UnavailableError as reason:
            pytest.skip(str(reason))
    try:
        assert not running.over, "it ended before the fault was there"
        yield
    finally:
        try:
            strike.__exit__(None, None, None)
        except NobodyThereError as reason:
            pytest.skip(str(reason))


@pytest.mark.parametrize(("fault", "load"), [*_cells()])
def test_cell(scene: Scene, fault: Fault, load: str, record_property: Callable[[str, Any], None]) -> None:
    running = Running(KINDS[load](scene, small=fault.slow))
    with struck(fault, scene, running):
        began = time.monotonic()
        running.wait(fault.lasts)
    outcome = running.outcome(LIMIT, began)
    for name, value in (("fault", fault.name), ("load", load), ("outcome", str(outcome)), ("detail", outcome.detail)):
        record_property(name, value)
    _check(outcome, load)
    if fault.heals:
        until(lambda: all(one.state == "open" for one in scene.group.status), "the links to be back")
        assert scene.group.call(sum, [1, 2]) == dict.fromkeys(scene.hosts.names, 3)
    else:
        number = HOST_HIT.get(load, 0)
        until(lambda: not scene.hosts[number].leftovers(), "the host that is lost to be clean")


def _check(outcome: Outcome, load: str) -> None:
    allowed = ("right",) if load in ALWAYS_RIGHT else ("right", "clear error")
    assert outcome.kind in allowed, f"{outcome}\n{outcome.detail}"


def test_each_load_meets_each_fault_that_concerns_it() -> None:
    assert set(KINDS) == set(LOADS)
    assert {load for _, load in QUICK} <= set(LOADS)
    assert {name for name, _ in QUICK} <= set(FAULTS)
