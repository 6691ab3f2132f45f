"""Python environments on hosts: until they are there, beside the same uv run by hand on the host.

The packages are real, and come from the index that this machine is configured for; the hosts have no network, so by
hand means: through ssh's own SOCKS proxy (`ssh -R`), which the manager's ssh is then for the host.
The hosts are parts of one machine. What eight of them take at once is measured twice: with all its processors for all,
and with a small share of one for each, as if they were eight small machines.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Row, seconds, settings, slower, ssh_hosts

from controlgroups import ControlGroupsUnavailableError
from lazycluster import Environment, RuntimeGroup
from lazycluster.core import event_loop
from sshhosts import procfs

PACKAGES = ["dask[distributed]", "scikit-learn", "pandas"]
HOSTS = 8
SHARE = 0.1  # of a core, for each of them: so two cores have enough for all, and for the manager
_PORT = 24801


def _group(hosts: Any, count: int, **options: Any) -> RuntimeGroup:
    return RuntimeGroup(hosts=list(hosts.names)[:count], connection_kwargs=settings(hosts), **options)


def _prepare(hosts: Any, count: int = 1) -> float:
    with _group(hosts, count, environment=PACKAGES) as group:
        return seconds(group.prepare)


def _ssh(hosts: Any, command: str, *options: str) -> float:
    argv = ["ssh", "-F", str(hosts.config_file), *options, hosts.names[0], command]
    return seconds(lambda: subprocess.run(argv, check=True, capture_output=True))


def _clear(hosts: Any, *names: str) -> None:
    for host in hosts:
        for name in names:
            host.run(f"rm -rf {host.home}/.cache/{name}")


def _by_hand(hosts: Any, pins: list[str]) -> float:
    """What somebody would type who has uv on the host: a new environment, and the same packages."""
    index = os.environ.get("UV_DEFAULT_INDEX", "")
    proxy = f"ALL_PROXY=socks5h://127.0.0.1:{_PORT} UV_SYSTEM_CERTS=1" + (f" UV_DEFAULT_INDEX={index}" if index else "")
    venv = f"rm -rf v && ~/bin/uv venv -q -p {sys.base_prefix}/bin/python3 v"
    line = f"{venv} && {proxy} ~/bin/uv pip install -q -p v/bin/python "
    return _ssh(hosts, line + " ".join(pins), "-R", f"127.0.0.1:{_PORT}")


def _pins() -> list[str]:
    """The versions that were resolved, for both."""
    folder = Path(Environment.main_directory, "environments", "resolved")
    packages = json.loads(max(folder.iterdir(), key=lambda path: path.stat().st_mtime).read_text())["packages"]
    return [f"{package['name']}=={package['version']}" for package in packages]


def rows() -> Iterator[Row]:
    """Yield the lines of the table."""
    with tempfile.TemporaryDirectory() as folder:
        Environment.set_main_directory(folder)
        with ssh_hosts(HOSTS) as hosts:
            for host in hosts:
                uv = importlib.import_module("uv").find_uv_bin()
                host.path("~/bin").mkdir()
                host.path("~/bin/uv").write_bytes(Path(uv).read_bytes())
                host.path("~/bin/uv").chmod(0o755)
            yield from _one_host(hosts, folder)
            yield _first_import(hosts)
            yield from _many_hosts(hosts)
            yield _small_hosts(hosts)
            yield _modules(hosts)


def _one_host(hosts: Any, folder: str) -> Iterator[Row]:
    _prepare(hosts)  # so that the versions are known on both sides, and the hosts' Python is warm
    pins = _pins()
    cold = []
    by_hand = []
    for _ in range(2):
        _clear(hosts, "lazycluster", "uv")
        subprocess.run(["rm", "-rf", f"{folder}/environments/wheels"], check=True)
        cold.append(_prepare(hosts))
        by_hand.append(_by_hand(hosts, pins))
    ours, theirs = min(cold), min(by_hand)
    yield Row(
        "Dask, scikit-learn, pandas: nothing cached", ours, "s", "<= 1.3 x", "uv by hand", theirs, ours <= 1.3 * theirs
    )
    _clear(hosts, "lazycluster/envs")
    warm = _prepare(hosts)
    yield Row("the same, packages cached on the host", warm, "s", "<= 3 s", met=warm <= 3)
    there = []
    for _ in range(5):
        there.append(_prepare(hosts))
    added = sorted(there)[2] * 1000
    yield Row("the same, already there: added to connecting", added, "ms", "<= 60 ms", met=added <= 60)


def _import_all() -> float:
    """Import what was installed; returns the processor's seconds."""
    start = time.process_time()
    for name in ("distributed", "sklearn.linear_model", "pandas"):
        importlib.import_module(name)
    return time.process_time() - start


def _first_import(hosts: Any) -> Row:
    """As soon as an environment can be used, and when its modules have been compiled in the background."""
    _clear(hosts, "lazycluster/envs")
    with _group(hosts, 1, environment=PACKAGES) as group:
        (first,) = group.call(_import_all).values()
        environment = group.runtimes[0]._session.environment
        assert environment is not None
        event_loop.run(environment.compiled())
    with _group(hosts, 1, environment=PACKAGES) as group:
        (later,) = group.call(_import_all).values()
    return Row("its first import of all three: processor time", first, "s", peer="modules compiled", theirs=later)


def _many_hosts(hosts: Any) -> Iterator[Row]:
    _prepare(hosts, HOSTS)
    alone: list[tuple[float, float, float]] = []
    together: list[tuple[float, float, float]] = []
    for _ in range(2):
        for count, found in ((1, alone), (HOSTS, together)):
            _clear(hosts, "lazycluster/envs")
            found.append(_measured(hosts, count))
    (single, single_host, _), (wall, on_hosts, here) = min(alone), min(together)
    cores = os.cpu_count() or 1
    yield Row(
        f"{HOSTS} hosts at once, packages cached on each", wall, "s", "<= 1.5 x", "one host", single,
        wall <= 1.5 * single, note=f"all hosts share {cores} cores",
    )  # fmt: skip
    each = on_hosts / HOSTS
    yield Row(
        f"{HOSTS} hosts at once: processor time of each host", each, "s", "<= 1.5 x", "one host", single_host,
        each <= 1.5 * single_host,
    )  # fmt: skip
    yield Row(f"{HOSTS} hosts at once: processor time of the manager", here, "s")


def _small_hosts(hosts: Any) -> Row:
    """The same where no host takes another one's processor, as on machines of their own."""
    what = f"{HOSTS} hosts at once, each limited to {SHARE:.0%} of one core"
    alone: list[float] = []
    together: list[float] = []
    try:
        with slower(hosts, SHARE):
            for _ in range(2):
                for count, found in ((1, alone), (HOSTS, together)):
                    _clear(hosts, "lazycluster/envs")
                    found.append(_prepare(hosts, count))
    except ControlGroupsUnavailableError as error:
        return Row(what, math.nan, "s", "<= 1.5 x", "one such host", note=f"not measured: {error}")
    wall, single = min(together), min(alone)
    return Row(what, wall, "s", "<= 1.5 x", "one such host", single, wall <= 1.5 * single)


def _measured(hosts: Any, count: int) -> tuple[float, float, float]:
    """Prepare some hosts; returns the seconds, and the processor's seconds on the hosts and here."""
    with _group(hosts, count, environment=PACKAGES) as group:
        hosts_before, here_before = _processor(hosts)
        wall = seconds(group.prepare)
        hosts_after, here_after = _processor(hosts)
    return wall, hosts_after - hosts_before, here_after - here_before


def _processor(hosts: Any) -> tuple[float, float]:
    """The processor's seconds of all that runs on the hosts or has ended there, and of this process and its ssh."""
    places = {procfs.namespace(host.pid) for host in hosts}
    used = {pid: _used(pid) for pid in procfs.pids()}
    on_hosts = sum(own + ended for pid, (_, own, ended) in used.items() if procfs.namespace(pid) in places)
    children = sum(own for parent, own, _ in used.values() if parent == os.getpid())
    return on_hosts, children + sum(os.times()[:4])


def _used(pid: int) -> tuple[int, float, float]:
    """The parent of a process, its processor's seconds, and those of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0, 0.0, 0.0
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / tick, (int(fields[13]) + int(fields[14])) / tick


def _modules(hosts: Any) -> Row:
    from lazycluster.cluster.dask_cluster import DaskCluster

    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        path = Path(folder, "benchmarked_module.py")
        path.write_text("VALUE = 0\n\n\ndef value():\n    return VALUE\n")
        module = importlib.import_module("benchmarked_module")
        with _group(hosts, HOSTS, python=sys.executable) as group, DaskCluster(group) as cluster:
            cluster.start()
            with cluster.get_client(timeout=60) as client:
                client.wait_for_workers(HOSTS)
                assert client.submit(module.value, pure=False).result() == 0
                times = []
                for number in range(1, 6):
                    path.write_text(f"VALUE = {number}\n\n\ndef value():\n    return VALUE\n")
                    times.append(seconds(cluster._dask.modules.sync_now))
                    assert client.submit(module.value, pure=False).result() == number
                    time.sleep(0.1)
        sys.path.remove(folder)
    middle = sorted(times)[2] * 1000
    return Row(f"a changed module sent to {HOSTS} hosts", middle, "ms", "<= 300 ms", met=middle <= 300)
