"""Prefect's task runner, and the panel of dask-labextension, on clusters of ours: the real packages."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")
pytest.importorskip("cryptography")

from distributed import Client, Status

from lazycluster.cluster.dask_cluster import DaskCluster, ssh_cluster
from lazycluster.exceptions import InvalidRuntimeError

pytestmark = [
    # distributed leaves these to the garbage collector when comms are torn down.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_ROOT = Path(__file__).parents[2]
_NAMES = "host[1-2]"


def _group(hosts: Any) -> dict[str, Any]:
    return {"connection_kwargs": {"config_file": hosts.config_file}, "python": sys.executable}


# --- a cluster from names ------------------------------------------------------------------------
def test_a_cluster_from_names_disconnects_its_hosts_at_its_end(module_hosts: Any) -> None:
    with ssh_cluster(_NAMES, group=_group(module_hosts), nthreads=1) as cluster:
        assert cluster.status is Status.running
        with Client(cluster) as client:
            assert client.submit(lambda: 55).result(timeout=30) == 55
        runtimes = cluster.runtime_group.runtimes
        assert [runtime.host for runtime in runtimes] == ["host1", "host2"]
    assert {runtime._connection.state for runtime in runtimes} == {"closed"}


def test_one_that_is_awaited(module_hosts: Any) -> None:
    async def main() -> None:
        cluster = await ssh_cluster(["host1"], group=_group(module_hosts), worker_count=2, asynchronous=True)
        assert isinstance(cluster, DaskCluster)
        assert cluster.asynchronous
        async with Client(cluster, asynchronous=True) as client:
            assert await client.submit(lambda: 55) == 55
        await cluster.wait_for_workers(2)
        await cluster.close()

    asyncio.run(main())


def test_a_start_that_is_cancelled_disconnects(module_hosts: Any) -> None:
    async def main() -> None:
        starting = asyncio.ensure_future(ssh_cluster(_NAMES, group=_group(module_hosts), asynchronous=True))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled()

    asyncio.run(main())


def test_what_fails_is_told(module_hosts: Any) -> None:
    with pytest.raises(InvalidRuntimeError, match="nowhere"):
        ssh_cluster(["host1", "nowhere"], group=_group(module_hosts))
    with pytest.raises(TypeError, match="no_such"):
        ssh_cluster(_NAMES, group=_group(module_hosts), no_such=1)
    with pytest.raises(ValueError, match="host"):
        ssh_cluster()


# --- the packages --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def python() -> str:
    """A Python with the packages of constraints/tools.txt, which sees our sources."""
    found = Path(os.environ.get("LAZYCLUSTER_TEST_TOOLS") or _ROOT / ".venv-tools" / "bin" / "python")
    if not found.exists():
        pytest.skip(f"there is no {found}: scripts/test tools makes it")
    where = [found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    (Path(packages) / "lazycluster.pth").write_text(f"{_ROOT / 'src'}\n")
    return str(found)


def _run(python: str, program: str, hosts: Any, folder: Path) -> Any:
    env = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [python, str(_ROOT / "tests" / "tools" / program), str(hosts.config_file), _NAMES]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.soak
@pytest.mark.timeout(700)
@pytest.mark.keeps("hosts")  # what Prefect writes
def test_flows_of_prefect(python: str, module_hosts: Any, tmp_path: Path) -> None:
    found = _run(python, "prefect_flow.py", module_hosts, tmp_path)
    assert set(found) == {"cluster_class", "address", "connection file"}
    for results in found.values():
        assert [square for square, _ in results] == [0, 1, 4, 9, 16, 25]
        assert {host for _, host in results} <= {"host1", "host2"}


@pytest.mark.soak
@pytest.mark.timeout(700)
def test_the_panel_of_dask_labextension(python: str, module_hosts: Any, tmp_path: Path) -> None:
    found = _run(python, "labextension.py", module_hosts, tmp_path)
    assert found["listed"][0]["workers"] == 2
    assert found["listed"][0]["cores"] == 2
    assert found["listed"][0]["scheduler_address"].startswith("tls://127.0.0.1:")
    assert found["listed"][0]["dashboard_link"].endswith("/status")
    assert found["adapted"]["adapt"] == {"minimum": 1, "maximum": 2}
    assert found["ended"]["scheduler_address"] == "<Not Connected>"
