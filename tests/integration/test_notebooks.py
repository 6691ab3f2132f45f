"""In a notebook, with a real kernel: the examples; cells that are run again, and interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupyter_client
import nbclient
import nbformat
import pytest

from lazycluster.background import state
from lazycluster.background.client import end
from patience import until

_EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.ipynb"))
_PATIENCE = 60

pytestmark = pytest.mark.filterwarnings("default")  # those of Jupyter's own libraries are not ours


class Kernel:
    """A kernel, and what its cells print."""

    def __init__(self, folder: Path) -> None:
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder))
        self.client: Any = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=_PATIENCE)

    def start(self, code: str) -> str:
        """Have a cell begin; returns the id of its messages."""
        return str(self.client.execute(code, store_history=True))

    def until(self, cell: str, *, printed: str = "") -> tuple[str, list[dict[str, Any]], str]:
        """Wait for the end of a cell, or until it has printed a text: what it printed and showed, and its error."""
        text, shown, error = "", [], ""
        deadline = time.monotonic() + _PATIENCE
        while True:
            message = self.client.get_iopub_msg(timeout=max(0.0, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != cell:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                text += content["text"]
                if printed and printed in text:
                    return text, shown, error
            elif message["msg_type"] in ("execute_result", "display_data", "update_display_data"):
                shown.append(content["data"])
            elif message["msg_type"] == "error":
                error = content["ename"]
                text += "\n".join(content["traceback"])
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return text, shown, error

    def run(self, code: str) -> tuple[str, list[dict[str, Any]]]:
        """Run a cell that is to end well."""
        text, shown, error = self.until(self.start(code))
        assert not error, text
        return text, shown

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=False)
        self.manager.cleanup_resources()


@pytest.fixture
def kernel(hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setenv("LAZYCLUSTER_SSH_CONFIG", str(hosts.config_file))
    kernel = Kernel(tmp_path)
    try:
        yield kernel
    finally:
        kernel.close()


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_from_top_to_bottom(
    path: Path, hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYCLUSTER_SSH_CONFIG", str(hosts.config_file))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "examples are stored without outputs"
    client = nbclient.NotebookClient(
        notebook, timeout=_PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    asyncio.run(client.async_execute())
    html = [
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert any(hosts.names[0] in text for text in html)
    assert not any("/status" in text for text in html), "the path of the dashboard is secret"
    assert list(tmp_path.iterdir()) == []


_GROUP = """
from lazycluster import RuntimeGroup, RuntimeTask
group = RuntimeGroup(hosts={hosts!r})
group
"""

_FAILING = """
def broken():
    raise ValueError('in a cell')
try:
    group.runtimes[0].call(broken)
except Exception as error:
    print(error)
"""


def test_cells_are_run_again_and_interrupted(kernel: Kernel, hosts: Any) -> None:
    cell = _GROUP.format(hosts=hosts.names[:2])
    _, shown = kernel.run(cell)
    assert hosts.names[0] in shown[-1]["text/html"]
    one = [len(host.sessions()) for host in hosts.all]

    # Again: the group before it lets go of its hosts, though `Out` of IPython knows it.
    kernel.run(cell)
    deadline = time.monotonic() + _PATIENCE
    while [len(host.sessions()) for host in hosts.all] != one:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    # A function of a cell, in a kernel whose event loop runs, also with top-level await.
    text, _ = kernel.run("import asyncio\nasync def here():\n    return group.call(lambda: 6 * 7)\nprint(await here())")
    assert text.count("42") == 2

    # The traceback of a function shows its lines, which no host has.
    text, _ = kernel.run(_FAILING)
    assert "    raise ValueError('in a cell')\n" in text

    # An interrupted cell ends what it waits for on the hosts; the group goes on.
    cell_id = kernel.start(
        "print('begins', flush=True)\n"
        "group.execute_task(RuntimeTask('long').run_command('exec sleep 987654'), broadcast=True, execute_async=False)"
    )
    kernel.until(cell_id, printed="begins")
    deadline = time.monotonic() + _PATIENCE
    while not all(_sleeping(host) for host in hosts.all[:2]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kernel.manager.interrupt_kernel()
    _, _, error = kernel.until(cell_id)
    assert error == "KeyboardInterrupt"
    assert not any(_sleeping(host) for host in hosts.all)
    text, _ = kernel.run("print(sorted(group.call(len, 'abc').values()))")
    assert "[3, 3]" in text


@pytest.mark.soak
def test_a_cell_that_starts_a_cluster_is_run_again(kernel: Kernel) -> None:
    cell = (
        "from lazycluster import LocalRuntime, RuntimeGroup\n"
        "from lazycluster.cluster.dask_cluster import DaskCluster\n"
        "cluster = DaskCluster(RuntimeGroup([LocalRuntime()]))\n"
        "cluster.start()\n"
        "print('scheduler', cluster.master.pid)\n"
        "cluster"
    )
    pids = []
    for _ in range(2):
        text, shown = kernel.run(cell)
        assert "1 of 1 worker ready" in shown[-1]["text/html"]
        pids.append(int(text.partition("scheduler ")[2].split()[0]))
    first, second = (Path(f"/proc/{pid}") for pid in pids)
    until(lambda: not first.exists(), "the cluster before to end")
    assert second.exists()
    kernel.run("cluster.cleanup()")


def _sleeping(host: Any) -> bool:
    return any("987654" in str(process) for process in host.processes())


def test_a_notebook_shows_how_far_it_is(kernel: Kernel, hosts: Any) -> None:
    kernel.run(
        "import asyncio\n"
        "from lazycluster import LocalRuntime\n"
        "from lazycluster.core import event_loop\n"
        "from lazycluster.output import progress\n"
        "progress._SILENT = 0.0"
    )
    kernel.run(
        "async def work():\n"
        "    with progress.Progress('Connecting <b>', 2, 'hosts') as shown:\n"
        "        shown.advance()\n"
        "        await asyncio.sleep(0.02)\n"
    )
    text, shown = kernel.run("event_loop.run(work())")
    assert not text
    assert "<progress" in shown[0]["text/html"]
    assert "Connecting &lt;b&gt;: 1 of 2 hosts" in shown[0]["text/html"]
    assert "<progress" not in shown[-1]["text/html"]


def test_a_cluster_in_the_background_is_started_used_and_left_by_kernels(
    hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    connection_kwargs = {"config_file": str(hosts.config_file)}
    try:
        with contextlib.closing(Kernel(tmp_path)) as kernel:
            kernel.run(
                "from lazycluster import RuntimeGroup\nfrom lazycluster.cluster.dask_cluster import DaskCluster\n"
                f"group = RuntimeGroup(hosts={hosts.names[:2]!r}, connection_kwargs={connection_kwargs!r})\n"
                "cluster = DaskCluster(group, name='night')\ncluster.start()"
            )
            kernel.manager.signal_kernel(signal.SIGKILL)
        with contextlib.closing(Kernel(tmp_path)) as kernel:
            text, _ = kernel.run(
                "import lazycluster\ndef twice(x): return 2 * x\n"
                "with lazycluster.connect('night') as client: print(client.gather(client.map(twice, [1, 2, 3])))"
            )
        assert "[2, 4, 6]" in text
    finally:
        for found in state.all_named():
            end(found)
