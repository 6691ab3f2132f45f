"""Hosts and managers that run out of something: memory for output, disk, descriptors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster import Runtime, RuntimeGroup, RuntimeTask
from lazycluster.agent import oom, processes
from lazycluster.core import event_loop
from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError, TaskExecutionError
from lazycluster.runtimes import LocalRuntime
from patience import until
from sshhosts import PASSWORD

_PATIENCE = 60.0


def _connect(hosts: Any, name: str = "host1", **more: Any) -> Runtime:
    return Runtime(name, connection_kwargs={"config_file": hosts.config_file, **more}, python=sys.executable)


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _written(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar"):
            return int(line.split()[1])
    return 0


def test_a_manager_that_does_not_take_output_makes_the_command_wait() -> None:
    """A gigabyte that nobody takes: neither the agent nor the manager holds it; then all of it arrives."""
    total = 1_000_000_000
    go, taken, pids = threading.Event(), [0], []

    def stalled(data: bytes) -> None:
        go.wait(_PATIENCE)
        taken[0] += len(data)

    with LocalRuntime() as runtime:
        agent = runtime._connection.agent_info.pid
        before = _resident(agent), _resident(os.getpid())

        async def pour() -> dict[str, Any]:
            params = {"argv": ["head", "-c", str(total), "/dev/zero"], "merge": True}
            channel = runtime._connection.channel("run", params, stdout=stalled, event=lambda event: pids.append(event))
            result: dict[str, Any] = await channel.result()
            return result

        pouring = event_loop.submit(pour())
        try:
            _until(lambda: pids)
            seen = [-1]

            def stands_still() -> bool:
                now = _written(pids[0]["pid"])
                stood, seen[0] = now > 0 and now == seen[0], now
                time.sleep(0.3)
                return stood

            _until(stands_still)
            assert seen[0] < 50_000_000
            assert _resident(agent) - before[0] < 40_000_000
            assert _resident(os.getpid()) - before[1] < 40_000_000
        finally:
            go.set()
        assert pouring.result(_PATIENCE)["exit"] == 0
        assert taken[0] == total
        assert _resident(agent) - before[0] < 40_000_000


def test_a_full_disk_changes_nothing_that_was_there(make_hosts: Any, tmp_path: Path) -> None:
    hosts = make_hosts(1, home_size="8m")
    (tmp_path / "big").write_bytes(os.urandom(6_000_000))
    with _connect(hosts) as runtime:
        runtime.call(_write, "~/precious", b"precious" * 10)
        hosts[0].fill_disk("~")
        for target in ("~/precious", "~/new"):
            with pytest.raises(TaskExecutionError, match="No space left") as caught:
                runtime.send_file(tmp_path / "big", target)
            assert "what was there before is unchanged" in str(caught.value)
        runtime.get_file("~/precious", str(tmp_path / "precious"))
        assert (tmp_path / "precious").read_bytes() == b"precious" * 10
        assert (
            sorted(path.name for path in hosts[0].path("~").iterdir() if "part" in path.name or "new" in path.name)
            == []
        )
        hosts[0].free_disk("~")
        runtime.send_file(tmp_path / "big", "~/precious")
        assert hosts[0].path("~/precious").read_bytes() == (tmp_path / "big").read_bytes()
        hosts[0].path("~/precious").unlink()


def _write(path: str, content: bytes) -> None:
    Path(path).expanduser().write_bytes(content)


def test_places_where_no_program_may_run(make_hosts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`noexec` on the host's /tmp, and on the manager's first place for the program that answers ssh's questions."""
    hosts = make_hosts(1, password=True)
    hosts[0].run("mount -o remount,noexec /tmp; mount -o remount,noexec /var/tmp")
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "x"
    place.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 8, b"size=1m,mode=700") != 0:
        pytest.skip("needs root, to mount")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    try:
        with _connect(hosts, password=PASSWORD) as runtime:
            assert runtime.call(sum, [1, 2]) == 3
            (tmp_path / "file").write_text("x")
            runtime.send_file(tmp_path / "file", "~/sent")
            hosts[0].path("~/sent").unlink()
    finally:
        libc.umount2(os.fsencode(place), 2)


_MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from lazycluster import RuntimeGroup
from lazycluster.runtimes import LocalRuntime, Runtime
runtimes, error = [], None
try:
    for number in range(100):
        runtimes.append(Runtime("host%d" % (number % 3 + 1), connection_kwargs={"config_file": sys.argv[1]}))
except Exception as raised:
    error = raised
print(len(runtimes), type(error).__name__, str(error).replace("\\n", " "), flush=True)
runtimes.pop().cleanup()
print(runtimes[0].call(sum, [1, 2]), runtimes[-1].call(sum, [3, 4]), flush=True)
"""


@pytest.mark.soak
def test_a_manager_with_few_descriptors(hosts: Any) -> None:
    """Hosts beyond what the limit allows are an error that names the limit; the others are as good as ever."""
    done = subprocess.run(
        [sys.executable, "-c", _MANY, str(hosts.config_file)], capture_output=True, text=True, timeout=100, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    count, kind, said = lines[0].split(" ", 2)
    assert int(count) >= 10, lines[0]
    assert kind == "InvalidRuntimeError"
    assert "open files" in said and "ulimit -n" in said
    assert lines[1:] == ["3 7"]
    assert done.stderr == ""


def test_a_host_that_has_no_room_for_processes(make_hosts: Any, tmp_path: Path) -> None:
    """Whatever is asked of it is refused with the cause; it goes on, and works when there is room again."""
    hosts = make_hosts(1)
    (tmp_path / "file").write_text("x")
    with _connect(hosts) as runtime, RuntimeGroup([runtime]) as group:
        assert runtime.call(sum, [1, 2]) == 3
        agent = runtime._connection.agent_info.pid

        def limit(count: int) -> None:
            for process in hosts[0].processes():
                hosts[0].run(f"prlimit --nproc={count}: --pid {process.inner_pid}", user="lazy", check=False)

        limit(1)
        for ask in (
            lambda: runtime.execute_task(RuntimeTask("command").run_command("true"), execute_async=False),
            lambda: runtime.call(sum, [1, 2]),
            lambda: runtime.send_file(tmp_path / "file", "~/sent"),
            lambda: runtime.get_file("/etc/passwd", tmp_path / "got"),
            lambda: list(group.map(abs, [1])),
        ):
            with pytest.raises(LazyclusterError, match="the limit of processes is reached: ulimit -u"):
                ask()
        assert not hosts[0].path("~/sent").exists()
        limit(10_000)
        assert runtime.call(sum, [1, 2]) == 3
        runtime.send_file(tmp_path / "file", "~/sent")
        hosts[0].path("~/sent").unlink()
        assert runtime._connection.agent_info.pid == agent


def test_a_host_where_not_even_the_agent_can_be_started(make_hosts: Any) -> None:
    hosts = make_hosts(1, files={".bashrc": "ulimit -u 1\n"})
    with pytest.raises(InvalidRuntimeError, match="no process can be started on the host: its limit of processes"):
        _connect(hosts)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of the system with little memory, where the kernel lets one be made."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    root = Path("/sys/fs/cgroup" if unified else "/sys/fs/cgroup/memory")
    group = root / f"lazycluster-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(200_000_000))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the group to be empty")
        group.rmdir()


def _take(size: int) -> int:
    return len(bytearray(size))


def test_a_control_group_that_runs_out_of_memory(memory_group: Path) -> None:
    """The kernel kills, whoever is the largest; it is told as what it is, and the agent goes on."""
    with LocalRuntime() as runtime:
        for pid in (runtime._connection.agent_info.pid, processes.parent_of(runtime._connection.agent_info.pid)):
            (memory_group / "cgroup.procs").write_text(str(pid))
        moved = time.monotonic()
        until(lambda: time.monotonic() - moved > oom._FRESH, "what is known of the group before to be too old")
        assert runtime.call(_take, 20_000_000) == 20_000_000
        with pytest.raises(TaskExecutionError, match=r"out of memory") as caught:
            runtime.call(_take, 500_000_000)
        assert "control group" in str(caught.value)
        assert caught.value.exit_status == -9
        command = f"{sys.executable} -c 'print(len(bytearray(500_000_000)))'; exit $?"
        with pytest.raises(TaskExecutionError, match=r"out of memory"):
            runtime.execute_task(RuntimeTask("command").run_command(command), execute_async=False)
        assert runtime.call(_take, 10) == 10


@pytest.fixture
def renamed(make_hosts: Any) -> Iterator[Any]:
    yield make_hosts(1)


def test_a_host_whose_name_changes(renamed: Any) -> None:
    with _connect(renamed) as runtime:
        assert runtime.call(os.uname).nodename == "host1"
        renamed[0].run("hostname another-name")
        assert runtime.call(os.uname).nodename == "another-name"
        with _connect(renamed) as second:
            assert second.call(sum, [1, 2]) == 3
        assert runtime.call(sum, [1, 2]) == 3


def test_how_the_hosts_of_a_group_do(make_hosts: Any) -> None:
    hosts = make_hosts(2)
    options = {"config_file": hosts.config_file}
    with RuntimeGroup(hosts=hosts.names, connection_kwargs=options, python=sys.executable) as group:
        assert [(one.host, one.state, one.why, one.running) for one in group.status] == [
            ("host1", "open", "", 0),
            ("host2", "open", "", 0),
        ]
        changed = threading.Event()
        seen: list[Any] = []

        def note(status: Any) -> None:
            seen.append(status)
            changed.set()

        forget = group.on_state(note)
        with pytest.raises(TypeError, match="callable"):
            group.on_state(None)  # type: ignore[arg-type]
        runtime = group.get_runtime("host1")
        task = runtime.execute_task(_sleeping())
        assert [one.running for one in group.status] == [1, 0]
        task.cancel()
        group.get_runtime("host2").cleanup()
        assert changed.wait(_PATIENCE)
        assert (seen[0].host, seen[0].state) == ("host2", "closed")
        assert [one.state for one in group.status] == ["open", "closed"]
        forget()


def _sleeping() -> Any:
    return RuntimeTask("sleep").run_command("sleep 300")
