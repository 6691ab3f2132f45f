"""The link to a host drops while something runs there: it goes on, and nothing of it is lost or doubled."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leaks
from lazycluster import Runtime, RuntimeTask
from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError, TaskExecutionError
from lazycluster.ssh import connection

Make = Callable[..., Any]

_PATIENCE = 40.0

#: What prints numbered lines, as a program that works does; it takes two seconds.
COUNT = "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo line $i; sleep 0.01; done"
LINES = "".join(f"line {number}\n" for number in range(1, 201))


def connect(hosts: Any, number: int = 0, **settings: Any) -> Runtime:
    """Connect to a host whose link is watched closely."""
    settings = {"config_file": hosts.config_file, "link_timeout": 2, "grace": 60, **settings}
    return Runtime(hosts.names[number], connection_kwargs=settings)


class States:
    """What a connection says of itself."""

    def __init__(self, runtime: Runtime) -> None:
        self.connection = runtime._connection
        self.seen: list[str] = []
        self._news = threading.Condition()
        self.connection.on_state(self._told)

    def _told(self, state: str, why: str) -> None:
        with self._news:
            self.seen.append(state)
            self._news.notify_all()

    def wait_for(self, *states: str) -> None:
        """Wait until it has been in these, one after the other."""
        wanted = list(states)
        with self._news:
            done = self._news.wait_for(lambda: self.seen[: len(wanted)] == wanted, _PATIENCE)
        assert done, self.seen


def ssh_of(runtime: Runtime) -> int:
    """The ssh process of a runtime."""
    process = runtime._connection._process
    assert process is not None
    return int(process.pid)


def kill_ssh(host: Any, runtime: Runtime) -> None:
    os.kill(ssh_of(runtime), signal.SIGKILL)


def kill_sshd_session(host: Any, runtime: Runtime) -> None:
    for found in host.sessions():
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGKILL)


def work(count: int) -> str:
    for number in range(count):
        print("step", number, flush=True)
        time.sleep(0.02)
    return "x" * 3_000_000


@pytest.mark.parametrize("cut", [kill_ssh, kill_sshd_session])
def test_a_command_and_a_function_go_on_without_their_link(hosts: Any, cut: Callable[..., None]) -> None:
    with connect(hosts) as runtime:
        states = States(runtime)
        command = runtime.execute_task(RuntimeTask("count").run_command(COUNT))
        function = runtime.execute_task(RuntimeTask("work").call(work, 100))
        for _ in range(3):
            states.seen.clear()
            cut(hosts[0], runtime)
            states.wait_for("interrupted", "open")
        command.join()
        assert command.execution_log == [LINES]
        assert function.result() == "x" * 3_000_000
        assert function.execution_log == ["".join(f"step {number}\n" for number in range(100))]
        assert runtime.call(pow, 2, 10) == 1024
        assert runtime._connection.generation == 1


def _echo(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection = server.accept()[0]
            with connection:
                connection.sendall(connection.recv(100))


def _asked(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"hello")
        return client.recv(100)


_ASK = (
    "import socket, sys\ns = socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=10)\n"
    "s.sendall(b'hello')\nprint(s.recv(100).decode())"
)


def test_an_unplugged_host_goes_on_and_hands_everything_over(make_hosts: Make) -> None:
    """More output than memory is meant for, and ports in both directions that come back as they were."""
    hosts = make_hosts(1)
    with connect(hosts) as runtime, socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo, args=[server], daemon=True).start()
        port = int(server.getsockname()[1])
        there = runtime.expose_port_to_runtime(port, 24200)
        back = runtime.expose_port_from_runtime(24200, 24201)
        assert (there, back) and _asked(24201) == b"hello"
        states = States(runtime)
        # It prints as soon as the host is cut off, which it sees by the file.
        large = "while [ ! -e go ]; do sleep 0.05; done; head -c 30000000 /dev/zero | tr '\\0' x; echo; echo end >&2"
        command = runtime.execute_task(RuntimeTask("large").run_command(large))
        began = time.monotonic()
        hosts[0].cut_off()
        hosts[0].run(f"touch {runtime.working_dir}/go")
        states.wait_for("interrupted")
        noticed = time.monotonic() - began
        later = runtime.execute_task(RuntimeTask("later").call(pow, 2, 5))
        _until(lambda: "head -c" not in str(hosts[0].processes()), "the command to have printed everything")
        assert not command.future.done()
        hosts[0].restore()
        states.wait_for("interrupted", "open")
        command.join()
        log = command.execution_log_file_path
        assert log
        with open(log, "rb") as file:
            assert hashlib.sha256(file.read()).digest() == hashlib.sha256(b"x" * 30_000_000 + b"\nend\n").digest()
        assert later.result() == 32
        assert runtime._connection.generation == 1
        assert _asked(24201) == b"hello"
        assert hosts[0].run(["python3", "-c", _ASK, "24200"]).stdout == "hello\n"
        server.shutdown(socket.SHUT_RDWR)
    assert noticed < 10


def _until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


def test_a_host_that_lost_its_agent_says_so_and_can_be_used_again(hosts: Any) -> None:
    with connect(hosts) as runtime:
        states = States(runtime)
        first = runtime.working_dir
        assert runtime.call(os.getcwd) == first
        task = runtime.execute_task(RuntimeTask("sleep").run_command("sleep 300"))
        os.kill(_pid_here(hosts[0], runtime._connection.agent_info.pid), signal.SIGKILL)
        with pytest.raises(TaskExecutionError, match="the agent on the host has ended, and with it what ran there"):
            task.join()
        states.wait_for("interrupted", "open")
        assert runtime._connection.generation == 2
        assert runtime.call(os.getcwd) == runtime.working_dir != first
        assert runtime.execute_task(
            RuntimeTask("x").run_command("echo $WORKING_DIR"), execute_async=False
        ).execution_log == [f"{runtime.working_dir}\n"]


def _pid_here(host: Any, inner: int) -> int:
    return next(found.pid for found in host.processes() if found.inner_pid == inner)


def test_a_host_that_was_restarted_says_so_and_can_be_used_again(make_hosts: Make) -> None:
    hosts = make_hosts(1)
    with connect(hosts) as runtime:
        states = States(runtime)
        task = runtime.execute_task(RuntimeTask("sleep").run_command("sleep 300"))
        assert runtime.call(pow, 2, 3) == 8
        hosts[0].power_off()
        states.wait_for("interrupted")
        hosts[0].power_on()
        with pytest.raises(TaskExecutionError, match="the host was restarted; what ran on it is lost"):
            task.join()
        states.wait_for("interrupted", "open")
        assert runtime.call(pow, 2, 4) == 16


def test_after_the_grace_the_host_is_clean_and_the_manager_is_told(make_hosts: Make) -> None:
    hosts = make_hosts(1)
    with connect(hosts, grace=3, reconnect=60) as runtime:
        states = States(runtime)
        task = runtime.execute_task(RuntimeTask("sleep").run_command("sleep 300 & setsid sleep 300 & wait"))
        _until(lambda: str(hosts[0].processes()).count("sleep 300") >= 2, "the command")
        hosts[0].cut_off()
        states.wait_for("interrupted")
        _until(lambda: not hosts[0].processes(), "the host to be clean")
        assert not hosts[0].tmp_entries()
        hosts[0].restore()
        with pytest.raises(TaskExecutionError, match="nobody came back to it in time"):
            task.join()
        states.wait_for("interrupted", "open")
        assert runtime.call(pow, 2, 4) == 16


def test_a_host_that_stays_away_is_lost(make_hosts: Make) -> None:
    hosts = make_hosts(1)
    with connect(hosts, reconnect=2, grace=2) as runtime:
        states = States(runtime)
        task = runtime.execute_task(RuntimeTask("sleep").run_command("sleep 300"))
        assert runtime.call(pow, 2, 3) == 8
        hosts[0].cut_off()
        with pytest.raises(TaskExecutionError, match="could not be reached again within"):
            task.join()
        states.wait_for("interrupted", "lost")
        with pytest.raises(ConnectionLostError):
            runtime.call(pow, 2, 3)
        _until(lambda: not hosts[0].processes(), "the host to be clean")
        hosts[0].restore()


def test_without_grace_everything_ends_with_the_link(hosts: Any) -> None:
    with connect(hosts, grace=0) as runtime:
        states = States(runtime)
        task = runtime.execute_task(RuntimeTask("sleep").run_command("sleep 300"))
        assert runtime.call(pow, 2, 3) == 8
        kill_ssh(hosts[0], runtime)
        with pytest.raises(TaskExecutionError, match="the connection was lost"):
            task.join()
        states.wait_for("interrupted", "lost")


def test_a_runtime_can_be_left_while_its_link_is_down(make_hosts: Make, caplog: pytest.LogCaptureFixture) -> None:
    hosts = make_hosts(1)
    with connect(hosts, grace=3, reconnect=60) as runtime:
        states = States(runtime)
        runtime.execute_task(RuntimeTask("sleep").run_command("sleep 300"))
        assert runtime.call(pow, 2, 3) == 8
        hosts[0].cut_off()
        states.wait_for("interrupted")
    assert "it does not answer, so something may be left there" in caplog.text
    _until(lambda: not hosts[0].processes(), "the host to be clean")
    hosts[0].restore()


_SLEEPER = """
    import hashlib, sys
    from lazycluster import RuntimeGroup, RuntimeTask

    def main():
        settings = {{"config_file": {config!r}, "link_timeout": 2, "grace": 60}}
        with RuntimeGroup(hosts={names!r}, connection_kwargs=settings, python=sys.executable) as group:
            tasks = [group.execute_task(RuntimeTask("count").run_command({command!r}), host=host) for host in {names!r}]
            later = [runtime.execute_task(RuntimeTask("call").call(bytes, 5_000_000)) for runtime in group.runtimes]
            print("working", flush=True)
            logs = [task.execution_log_file_path for task in tasks if task.join() is None]
            print([hashlib.sha256(open(log, "rb").read()).hexdigest() for log in logs], flush=True)
            print([len(task.result()) for task in later], flush=True)

    main()
"""


def test_a_manager_that_sleeps_loses_nothing(hosts: Any) -> None:
    """It is stopped for longer than its silence is taken for an interruption."""
    command = f"{COUNT}; head -c 20000000 /dev/zero; touch ~/printed"
    names = hosts.names[:2]
    program = textwrap.dedent(_SLEEPER).format(config=hosts.config_file, names=names, command=command)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "working\n"
        manager.send_signal(signal.SIGSTOP)
        for host in hosts[:2]:
            _until(host.path("~/printed").exists, "everything to be printed while the manager sleeps")
        manager.send_signal(signal.SIGCONT)
        expected = hashlib.sha256(LINES.encode() + bytes(20_000_000)).hexdigest()
        assert manager.stdout.readline() == f"{[expected] * 2}\n"
        assert manager.stdout.readline() == "[5000000, 5000000]\n"
    assert manager.returncode == 0
    for host in hosts[:2]:
        host.path("~/printed").unlink()


_ENDED = """
    import os, signal, sys, threading
    from lazycluster import RuntimeGroup, RuntimeTask

    settings = {{"config_file": {config!r}, "link_timeout": 2, "grace": {grace}}}
    group = RuntimeGroup(hosts={names!r}, connection_kwargs=settings, python=sys.executable)
    group.expose_port_to_runtimes({port}, 24300)
    task = RuntimeTask("x").run_command("nohup setsid sleep 7104 >/dev/null 2>&1 & sleep 7105")
    group.execute_task(task, broadcast=True)
    processes = [runtime._connection._process.pid for runtime in group.runtimes]
    if {returned}:
        back = [threading.Event() for _ in processes]
        for runtime, event in zip(group.runtimes, back):
            runtime._connection.on_state(lambda state, why, event=event: state == "open" and event.set())
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        for event in back:
            event.wait()
    print(*[runtime._connection._process.pid for runtime in group.runtimes], flush=True)
    threading.Event().wait()
"""


def _working(hosts: Any, server: socket.socket, grace: int, returned: bool) -> tuple[subprocess.Popen[str], list[int]]:
    port = server.getsockname()[1]
    names = [host.name for host in hosts]
    program = textwrap.dedent(_ENDED).format(
        config=hosts.config_file, names=names, port=port, grace=grace, returned=returned
    )
    manager = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert manager.stdout is not None
    clients = [int(word) for word in manager.stdout.readline().split()]
    for host in hosts:
        _until(lambda host=host: str(host.processes()).count("sleep 710") >= 2, "the command")
    return manager, clients


def _clean(hosts: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := [entry for host in hosts for entry in host.leftovers()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_hosts_are_clean_when_the_manager_is_killed_after_its_links_have_returned(hosts: Any) -> None:
    """Also with a connection in a tunnel, which by itself keeps ssh alive."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        manager, _ = _working(hosts, server, 60, returned=True)
        guest = hosts[0].inside(["python3", "-c", _HOLD, "24300"])
        with subprocess.Popen(guest, stdout=subprocess.PIPE), server.accept()[0] as held:
            manager.kill()
            manager.communicate()
            _clean(hosts, leaks.PATIENCE)
            held.close()


_HOLD = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.recv(1)"


@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_hosts_are_clean_after_the_grace_when_the_manager_is_killed_together_with_ssh(hosts: Any, pause: float) -> None:
    """Also when it has just started the next ssh: that one has its log to open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        manager, clients = _working(hosts, server, 3, returned=False)
        command = Path(f"/proc/{clients[0]}/cmdline").read_text().split("\0")
        private = Path(command[command.index("-S") + 1]).parent
        for pid in clients:
            os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        manager.kill()
        manager.communicate()
        _clean(hosts, 3 + 1 + leaks.PATIENCE)
        _until(lambda: not private.exists(), "the manager's own directory to be removed")


def test_a_host_that_ends_everything_at_logout_gives_no_grace(
    make_hosts: Make, caplog: pytest.LogCaptureFixture
) -> None:
    hosts = make_hosts(1, env={"XDG_SESSION_ID": "5"})
    if not os.path.isdir("/etc/systemd"):
        pytest.skip("needs a directory /etc/systemd to put another one in its place")
    hosts[0].run("mkdir /tmp/systemd && echo KillUserProcesses=yes > /tmp/systemd/logind.conf")
    hosts[0].run("mount --bind /tmp/systemd /etc/systemd")
    caplog.set_level("INFO", "lazycluster")
    with connect(hosts) as runtime:
        states = States(runtime)
        task = runtime.execute_task(RuntimeTask("sleep").run_command("sleep 300"))
        assert runtime.call(pow, 2, 3) == 8
        assert "KillUserProcesses=yes in /etc/systemd/logind.conf" in caplog.text
        kill_ssh(hosts[0], runtime)
        with pytest.raises(TaskExecutionError, match="the connection was lost"):
            task.join()
        states.wait_for("interrupted", "lost")
    hosts[0].run("umount /etc/systemd && rm -r /tmp/systemd")


def test_a_copy_goes_on_where_it_was(hosts: Any, tmp_path: Path) -> None:
    """A file that is complete is not sent again, and every one arrives as it is."""
    source, back = tmp_path / "source", tmp_path / "back"
    source.mkdir()
    sizes = [3_000_000] * 20 + [60_000_000]
    for number, size in enumerate(sizes):
        with (source / f"file{number:02}").open("wb") as file:
            file.write(os.urandom(1000) * (size // 1000))
    there = hosts[0].path("~/copied")
    with connect(hosts) as runtime:
        for task, partly in (
            (RuntimeTask("send").send_file(str(source), "~/copied"), lambda: len(_files(there)) > 3),
            (RuntimeTask("get").get_file("~/copied", str(back)), lambda: len(_files(back)) > 3),
        ):
            states = States(runtime)
            running = runtime.execute_task(task)
            _until(partly, "some of the files")
            kill_ssh(hosts[0], runtime)
            states.wait_for("interrupted", "open")
            running.join()
            assert "there already, unchanged" in running.execution_log[0]
    for copied in (there, back):
        assert {path.name: _digest(path) for path in copied.iterdir()} == {p.name: _digest(p) for p in source.iterdir()}
    subprocess.run(["rm", "-r", there], check=True)


def test_a_copy_waits_for_its_link_longer_than_for_an_answer(
    hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, there = tmp_path / "source", hosts[0].path("~/copied")
    source.mkdir()
    for number in range(40):
        (source / f"file{number:02}").write_bytes(os.urandom(1000) * 3000)
    with connect(hosts) as runtime:
        running = runtime.execute_task(RuntimeTask("send").send_file(str(source), "~/copied"))
        _until(lambda: len(_files(there)) > 3, "some of the files")
        monkeypatch.setattr(connection, "ANSWER_LIMIT", 0.5)
        hosts[0].cut_off()
        try:
            _until(lambda: runtime._connection._unanswered is not None, "a question that is not answered in time")
        finally:
            monkeypatch.undo()
            hosts[0].restore()
        running.join()
    assert {path.name: _digest(path) for path in there.iterdir()} == {p.name: _digest(p) for p in source.iterdir()}
    subprocess.run(["rm", "-r", there], check=True)


@pytest.mark.soak
def test_a_large_file_goes_on_where_it_was(hosts: Any, tmp_path: Path) -> None:
    """What has come of it is not sent once more, in either direction, and the whole is right."""
    size = 1 << 28
    source, back = tmp_path / "source", tmp_path / "back"
    with source.open("wb") as file:
        for number in range(size >> 20):
            file.write(number.to_bytes(4, "big") * (1 << 18))
    table = Path(f"/proc/{hosts[0].pid}/net/dev")

    def moved(column: int) -> int:
        return sum(int(line.split()[column]) for line in table.read_text().splitlines() if "eth" in line)

    with connect(hosts) as runtime:
        for task, column in (
            (RuntimeTask("send").send_file(str(source), "~/large"), 1),
            (RuntimeTask("get").get_file("~/large", str(back)), 9),
        ):
            states, before = States(runtime), moved(column)
            running = runtime.execute_task(task)
            _until(lambda: moved(column) - before > size // 2, "half of it")  # noqa: B023
            kill_ssh(hosts[0], runtime)
            states.wait_for("interrupted", "open")
            running.join()
            assert moved(column) - before < 1.4 * size
    assert _digest(hosts[0].path("~/large")) == _digest(source) == _digest(back)
    hosts[0].path("~/large").unlink()


def _files(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.exists() else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_a_task_does_not_go_on_where_its_working_directory_is_gone(hosts: Any, tmp_path: Path) -> None:
    """A copy finds its way to the next agent; the step behind it would find nothing of what was before."""
    source, there = tmp_path / "source", hosts[0].path("~/copied")
    source.mkdir()
    for number in range(20):
        (source / f"file{number:02}").write_bytes(os.urandom(1000) * 3000)
    steps = RuntimeTask("steps").run_command("touch made").send_file(str(source), "~/copied").run_command("ls made")
    with connect(hosts) as runtime:
        for retries in (0, 1):
            states = States(runtime)
            task = runtime.execute_task(steps, retries=retries)
            _until(lambda: len(_files(there)) > 3, "some of the files")
            os.kill(_pid_here(hosts[0], runtime._connection.agent_info.pid), signal.SIGKILL)
            states.wait_for("interrupted", "open")
            if retries:
                task.join()
                assert task.execution_log[-1] == "made\n"
            else:
                with pytest.raises(TaskExecutionError, match="its agent has ended since the task began"):
                    task.join()
            assert {path.name: _digest(path) for path in there.iterdir()} == {
                path.name: _digest(path) for path in source.iterdir()
            }
            subprocess.run(["rm", "-r", there], check=True)


def test_an_attempt_that_ends_without_a_word_is_not_the_last(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(hosts) as runtime:
        states, attempt, tries = States(runtime), runtime._connection._attempt, []

        async def silent_at_first(timeout: float) -> None:
            tries.append(timeout)
            if len(tries) == 1:
                raise InvalidRuntimeError("host1", "ssh", "ssh ended (exit status None) and said: nothing")
            await attempt(timeout)

        monkeypatch.setattr(runtime._connection, "_attempt", silent_at_first)
        kill_ssh(hosts[0], runtime)
        states.wait_for("interrupted", "open")
        assert len(tries) == 2
        assert runtime.call(pow, 2, 3) == 8
