"""Fixtures for all tests: throw-away SSH hosts, and the check that every test leaves everything clean."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

import leaks
from sshhosts import Hosts, HostsUnavailableError, own_network, procfs, require_namespaces
from sshhosts.loopback import LoopbackHosts

_HERE = Path(__file__).parent
_MARKER = f"LAZYCLUSTER_TEST_RUN={os.getpid()}"
# The default key exchange costs a tenth of a second of CPU for every login, and it is not what is tested.
_QUICK = {"KexAlgorithms": "curve25519-sha256"}
_DIRECTORY_MARKERS = ("unit", "integration", "faults")

_HANG = 120.0  # seconds after a test's own time-out (signal or thread, which it may swallow) until its process is ended

_own_network = False
_temporary = Path()
_state = Path()
_terminal = -1  # the descriptor of the standard error that is not captured


def pytest_configure(config: pytest.Config) -> None:
    """Give this run a network namespace and a directory for temporary files of its own, before anything uses either."""
    global _own_network, _temporary, _state, _terminal
    _terminal = os.dup(sys.__stderr__.fileno())  # pytest captures nothing while it calls this
    # Whoever starts the tests in the background may have these ignored, and children would inherit that.
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)
    for name in _DIRECTORY_MARKERS:
        config.addinivalue_line("markers", f"{name}: the tests in tests/{name}")
    config.addinivalue_line("markers", "soak: takes long; runs with -m soak only")
    config.addinivalue_line("markers", "keeps(what): the test leaves something behind on purpose: 'hosts', 'manager'")
    _own_network = os.environ.get("LAZYCLUSTER_TEST_NETWORK", "own") == "own" and own_network()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    # Short: the paths of control sockets are limited.
    _temporary = Path(tempfile.mkdtemp(prefix="lt-", dir="/tmp"))
    # What the library logs stays out of the home directory of whoever runs the tests.
    _state = Path(tempfile.mkdtemp(prefix="lt-state-", dir="/tmp"))
    os.environ["XDG_STATE_HOME"] = str(_state)
    name, value = _MARKER.split("=")
    os.environ.update({"TMPDIR": str(_temporary), name: value})
    tempfile.tempdir = str(_temporary)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the directory for temporary files."""
    os.close(_terminal)
    tempfile.tempdir = None
    shutil.rmtree(_temporary, ignore_errors=True)
    shutil.rmtree(_state, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the directory that they are in; those of the soak run only if they are asked for: ``-m soak``."""
    if "soak" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("soak")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]
    for item in items:
        with contextlib.suppress(ValueError):
            folder = item.path.relative_to(_HERE).parts[0]
            if folder in _DIRECTORY_MARKERS:
                item.add_marker(folder)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a failed test at once: who ends a run that hangs would otherwise see no name."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        os.write(_terminal, f"\n{report.outcome}: {report.nodeid} ({report.when})\n".encode())


def _bounded(item: pytest.Item) -> Generator[None, Any, Any]:
    """End this process, with the tracebacks of its threads, when a part of a test ends in no way."""
    marker = item.get_closest_marker("timeout")
    own = float(marker.args[0]) if marker is not None and marker.args else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(own + _HANG, exit=True, file=_terminal)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Bound the set-up."""
    return (yield from _bounded(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Bound the test itself."""
    return (yield from _bounded(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Bound the tear-down."""
    return (yield from _bounded(item))


def _skip(reason: HostsUnavailableError) -> None:
    if os.environ.get("LAZYCLUSTER_TEST_NEED_HOSTS"):
        pytest.fail(str(reason))
    pytest.skip(str(reason))


def _check_hosts(pool: Hosts | LoopbackHosts, request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("keeps")
    if marker is not None and "hosts" in marker.args:
        return
    left = leaks.settle(lambda: [entry for host in pool.all for entry in host.leftovers()])
    if left:
        for host in pool.all:
            if host.pid:
                host.clear()
        pytest.fail("left behind on the hosts:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def _clean_manager(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail when a test leaves a process, a thread, a listening port or a temporary file on the manager."""
    thorough = request.node.get_closest_marker("unit") is None
    manager = leaks.Manager(_temporary, _MARKER, thorough, _own_network).remember()
    yield
    marker = request.node.get_closest_marker("keeps")
    if marker is not None and "manager" in marker.args:
        return
    left = leaks.settle(manager.leftovers)
    if left:
        leaks.remove(_temporary)
        for process in procfs.with_variable(_MARKER):
            if process.pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        pytest.fail("left behind on the manager:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[str, Hosts | LoopbackHosts]]:
    pools: dict[str, Hosts | LoopbackHosts] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def hosts(_pools: dict[str, Hosts | LoopbackHosts], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Three SSH hosts, kept from test to test unless a test has changed them; nothing may be left on them."""
    pool = _pools.get("default")
    if pool is None:
        pool = _pools["default"] = _three_hosts()
    yield pool
    try:
        _check_hosts(pool, request)
    finally:
        if any(host.changed for host in pool.all):
            pool.close()
            del _pools["default"]


def _three_hosts() -> Hosts | LoopbackHosts:
    try:
        require_namespaces()
        return Hosts(3, sshd=_QUICK).start()
    except HostsUnavailableError as reason:
        if os.environ.get("LAZYCLUSTER_TEST_NEED_HOSTS"):
            pytest.fail(str(reason))
    try:
        return LoopbackHosts(3).start()
    except HostsUnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def module_hosts(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Three SSH hosts for one module, for fixtures that last as long; checked at the module's end."""
    pool = _three_hosts()
    try:
        yield pool
        _check_hosts(pool, request)
    finally:
        pool.close()


@pytest.fixture
def make_hosts(request: pytest.FixtureRequest) -> Iterator[Callable[..., Hosts]]:
    """A function that makes hosts of any kind: ``make_hosts(2, bastion=True)``; see ``sshhosts.Options``."""
    made: list[Hosts] = []

    def make(count: int = 1, **options: Any) -> Hosts:
        try:
            require_namespaces()
        except HostsUnavailableError as reason:
            _skip(reason)
        options["sshd"] = {**_QUICK, **options.get("sshd", {})}
        options["bastion_sshd"] = {**_QUICK, **options.get("bastion_sshd", {})}
        try:
            made.append(Hosts(count, **options).start())
        except HostsUnavailableError as reason:
            pytest.skip(str(reason))
        return made[-1]

    try:
        yield make
        for pool in made:
            _check_hosts(pool, request)
    finally:
        for pool in made:
            pool.close()


@pytest.fixture
def ssh_config(hosts: Hosts) -> str:
    """Path of the ssh config that names the three hosts ``host1``, ``host2``, ``host3``."""
    return hosts.config_file
