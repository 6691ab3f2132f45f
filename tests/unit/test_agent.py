"""The agent, as a plain subprocess: what it runs, what it tells, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lazycluster.agent import processes
from lazycluster.core import event_loop
from lazycluster.exceptions import AgentError, ConnectionLostError, LazyclusterError
from lazycluster.ssh.local_connection import LocalConnection

Body = Callable[[LocalConnection], Awaitable[Any]]


def with_agent(body: Body) -> Any:
    async def whole() -> Any:
        connection = LocalConnection()
        await connection.open()
        try:
            return await body(connection)
        finally:
            await connection.close()

    return event_loop.run(whole(), timeout=60)


async def run(connection: LocalConnection, command: str, **params: Any) -> tuple[dict[str, Any], bytes, bytes]:
    out, err = bytearray(), bytearray()
    channel = connection.channel("run", {"command": command, **params}, stdout=out.extend, stderr=err.extend)
    return await channel.result(), bytes(out), bytes(err)


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def carrying(text: str) -> list[int]:
    found = []
    for pid in processes.parents():
        try:
            if text.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def test_command_output_and_status() -> None:
    async def body(connection: LocalConnection) -> None:
        assert await run(connection, "echo out; echo err >&2; exit 3") == (
            {"exit": 3, "signal": None},
            b"out\n",
            b"err\n",
        )
        assert (await run(connection, "kill -9 $$"))[0] == {"exit": None, "signal": 9}
        assert (await run(connection, "echo a; echo b >&2", merge=True))[1] == b"a\nb\n"
        assert (await run(connection, "cat"))[1] == b""  # no input: it ends at once

    with_agent(body)


def test_argv_arrives_unchanged() -> None:
    arguments = ["a b", "'quoted'", '"', "$HOME", "new\nline", "käse", ""]
    program = "import sys; sys.stdout.buffer.write('|'.join(sys.argv[1:]).encode())"

    async def body(connection: LocalConnection) -> bytes:
        return (await run(connection, "", argv=[sys.executable, "-c", program, *arguments]))[1]

    assert with_agent(body).decode() == "|".join(arguments)


def test_environment_values_are_not_interpreted() -> None:
    value = 'it\'s $HOME "`x`"\nsecond line äöü'

    async def body(connection: LocalConnection) -> bytes:
        return (await run(connection, 'printf %s "$VALUE"', env={"VALUE": value}))[1]

    assert with_agent(body).decode() == value


@pytest.mark.parametrize(
    ("params", "message"),
    [({"cwd": "/no/such/dir"}, "/no/such/dir"), ({"argv": ["no-such-program"]}, "no-such-program")],
)
def test_what_cannot_be_started_is_named(params: dict[str, Any], message: str) -> None:
    async def body(connection: LocalConnection) -> None:
        with pytest.raises(AgentError, match=message) as caught:
            await run(connection, "true", **params)
        assert caught.value.kind == "os"

    with_agent(body)


def test_unknown_and_broken_requests_harm_nothing() -> None:
    async def body(connection: LocalConnection) -> None:
        with pytest.raises(AgentError, match="unknown request"):
            await connection.request("nonsense")
        with pytest.raises(AgentError, match="KeyError"):
            await connection.request("ports")
        assert await connection.request("ping") == {}

    with_agent(body)


def test_input_is_fed_with_backpressure() -> None:
    size = 20_000_000

    async def body(connection: LocalConnection) -> None:
        out = bytearray()
        channel = connection.channel("run", {"command": "sleep 0.1; wc -c", "input": True}, stdout=out.extend)
        await channel.send(b"x" * size)
        await channel.send_end()
        assert (await channel.result())["exit"] == 0
        assert int(out) == size
        # A command that does not read all of its input is no error.
        channel = connection.channel("run", {"command": "head -c 1 >/dev/null", "input": True})
        await channel.send(b"x" * size)
        await channel.send_end()
        assert (await channel.result())["exit"] == 0

    with_agent(body)


def test_large_output_does_not_delay_others() -> None:
    async def body(connection: LocalConnection) -> None:
        count = 0

        def sink(data: bytes) -> None:
            nonlocal count
            count += len(data)

        channel = connection.channel("run", {"command": "head -c 300000000 /dev/zero"}, stdout=sink)
        for _ in range(5):
            await connection.request("ping")
        before = count
        assert (await channel.result())["exit"] == 0
        assert before < count == 300_000_000

    with_agent(body)


def test_step_ends_with_its_output_and_the_rest_with_the_agent() -> None:
    mark = f"777{os.getpid()}"

    async def body(connection: LocalConnection) -> None:
        assert (await run(connection, f"sleep {mark} >/dev/null 2>&1 &"))[0]["exit"] == 0
        assert carrying(mark)

    with_agent(body)
    assert not carrying(mark)


def test_end_reaches_whatever_a_command_started() -> None:
    mark = f"778{os.getpid()}"
    command = f"sleep {mark} & setsid sleep {mark} & (setsid sleep {mark} &) ; trap '' TERM; sleep {mark}; wait"

    async def body(connection: LocalConnection) -> None:
        channel = connection.channel("run", {"command": command, "task": "t1"})
        assert await until(lambda: len(carrying(f"sleep\0{mark}")) == 4)
        channel.control(signal="END")
        assert (await channel.result())["signal"] == signal.SIGKILL
        assert not carrying(f"sleep\0{mark}")

    with_agent(body)


def test_dropped_channel_ends_the_command() -> None:
    mark = f"779{os.getpid()}"

    async def body(connection: LocalConnection) -> None:
        channel = connection.channel("run", {"command": f"sleep {mark}"})
        assert await until(lambda: bool(carrying(mark)))
        channel.close()
        assert await until(lambda: not carrying(mark))

    with_agent(body)


def test_signals_go_to_the_group() -> None:
    async def body(connection: LocalConnection) -> None:
        out = bytearray()
        command = "trap 'echo caught; exit 5' INT; echo ready; sleep 30 >/dev/null 2>&1 & wait"
        channel = connection.channel("run", {"command": command}, stdout=out.extend)
        assert await until(lambda: b"ready" in out)
        channel.control(signal="INT")
        assert (await channel.result())["exit"] == 5
        assert bytes(out) == b"ready\ncaught\n"

    with_agent(body)


def test_ports_are_tried_by_binding() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def body(connection: LocalConnection) -> list[int]:
            found: list[int] = (await connection.request("ports", ports=[port]))["free"]
            return found

        assert with_agent(body) == []
    assert with_agent(body) == [port]


def test_nonce_tells_that_the_loopback_is_shared() -> None:
    async def body(connection: LocalConnection) -> None:
        answer = await connection.request("nonce")
        reader, writer = await asyncio.open_connection("127.0.0.1", answer["port"])
        assert (await reader.read()).decode() == answer["nonce"]
        writer.close()
        await writer.wait_closed()

    with_agent(body)


def test_setup_environment(tmp_path: Path) -> None:
    async def body(connection: LocalConnection) -> None:
        script = "echo noise; export A='x\ny'; cd /; B=not-exported"
        env = (await connection.request("setup", script=script, cwd=str(tmp_path)))["env"]
        assert env["A"] == "x\ny"
        assert "B" not in env
        with pytest.raises(AgentError, match="exit status 7") as caught:
            await connection.request("setup", script="echo this is why; exit 7")
        assert "this is why" in caught.value.evidence["output"]

    with_agent(body)


def test_paths(tmp_path: Path) -> None:
    async def body(connection: LocalConnection) -> None:
        made = await connection.request("mkdir", path="$WHERE/a b/c", env={"WHERE": str(tmp_path)})
        assert made["created"]
        assert Path(made["path"]) == tmp_path / "a b/c"
        assert Path(made["path"]).is_dir()
        assert not (await connection.request("mkdir", path=made["path"]))["created"]
        (tmp_path / "file").touch()
        with pytest.raises(AgentError, match="file"):
            await connection.request("mkdir", path=str(tmp_path / "file/x"))
        await connection.request("remove", path=str(tmp_path / "a b"))
        assert not (tmp_path / "a b").exists()
        (tmp_path / "home").mkdir()  # nothing is lost if this fails
        with pytest.raises(AgentError, match="it is the home directory"):
            await connection.request("remove", path="~", env={"HOME": str(tmp_path / "home")})
        temporary = Path((await connection.request("mkdtemp"))["path"])
        assert temporary.stat().st_mode & 0o777 == 0o700
        expanded = await connection.request("expand", path="~/$NOT_SET_AT_ALL")
        assert expanded["path"] == os.path.expanduser("~/$NOT_SET_AT_ALL")

    with_agent(body)


def test_info() -> None:
    async def body(connection: LocalConnection) -> dict[str, Any]:
        return await connection.request("info")

    info = with_agent(body)
    assert info["cpu_cores"] >= 1
    assert 0 < info["memory_free"] <= info["memory"]
    assert info["os"]
    assert 0 <= info["disk_free"] <= info["disk_total"]


@pytest.mark.parametrize("victim", ["agent", "guardian", "both"])
def test_nothing_survives_the_agents_sudden_death(victim: str, tmp_path: Path) -> None:
    mark = f"780{os.getpid()}"

    async def body(connection: LocalConnection) -> None:
        directory = Path(connection.agent_info.directory)
        connection.channel("run", {"command": f"sleep {mark} & setsid sleep {mark} & (setsid sleep {mark} &) ; wait"})
        assert await until(lambda: len(carrying(f"sleep\0{mark}")) == 3)
        agent = connection.agent_info.pid
        guardian = processes.parent_of(agent)
        assert guardian
        if victim in ("guardian", "both"):
            os.kill(guardian, signal.SIGKILL)
        if victim in ("agent", "both"):
            os.kill(agent, signal.SIGKILL)
        assert await until(lambda: connection.state == "lost")
        with pytest.raises(ConnectionLostError):
            await connection.request("ping")
        if victim == "both":
            # Nobody is left to do it; the next agent on this machine does.
            await connection.close()
            after = LocalConnection()
            os.utime(directory, (1, 1))
            await after.open()
            assert await until(lambda: not carrying(f"sleep\0{mark}") and not directory.exists())
            await after.close()
        assert await until(lambda: not carrying(f"sleep\0{mark}"))
        assert await until(lambda: not directory.exists())

    with_agent(body)


@pytest.mark.parametrize("forks", [False, True])
def test_nothing_survives_the_managers_sudden_death(forks: bool) -> None:
    """Nor if a child lives on that the manager has forked, as `multiprocessing` does."""
    mark = f"781{os.getpid()}"
    program = f"""
        import asyncio, os, time
        from lazycluster.core import event_loop
        from lazycluster.ssh.local_connection import LocalConnection

        async def main():
            connection = LocalConnection()
            await connection.open()
            def tell(data):
                child = os.fork() if {forks} else -1
                if child == 0:
                    time.sleep(600)
                print(child, connection.agent_info.directory, flush=True)
            connection.channel("run", {{"command": "trap '' TERM; sleep {mark} & setsid sleep {mark} & echo x; wait"}},
                               stdout=tell)
            await asyncio.sleep(60)

        event_loop.run(main())
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as manager:
        try:
            assert manager.stdout
            child, place = manager.stdout.readline().split()
            directory = Path(place)
            # The shell has spoken, but its children may not have become what they are to be.
            assert event_loop.run(until(lambda: len(carrying(f"sleep\0{mark}")) == 2))
        finally:
            manager.kill()
    try:
        assert event_loop.run(until(lambda: not carrying(f"sleep\0{mark}") and not directory.exists()))
    finally:
        if forks:
            os.kill(int(child), signal.SIGKILL)


def test_use_after_close_and_in_a_forked_child() -> None:
    async def opened() -> LocalConnection:
        connection = LocalConnection()
        await connection.open()
        return connection

    connection = event_loop.run(opened())
    pid = os.fork()
    if pid == 0:
        try:
            connection.check()
            os._exit(1)
        except LazyclusterError as error:
            os._exit(0 if "forked child" in str(error) else 2)
    assert os.waitpid(pid, 0)[1] == 0
    event_loop.run(connection.close())
    event_loop.run(connection.close())
    with pytest.raises(LazyclusterError, match="closed"):
        event_loop.run(connection.request("ping"))


def test_loop_run_cancels_and_waits_for_cleanup() -> None:
    cleaned: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append("yes")

    with pytest.raises(TimeoutError, match="not done within"):
        event_loop.run(slow(), timeout=0.05)
    assert cleaned == ["yes"]

    async def nested() -> None:
        coroutine: Coroutine[Any, Any, None] = asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="event-loop thread"):
            event_loop.run(coroutine)

    event_loop.run(nested())


def test_whoever_watches_a_connection_is_told_of_its_states() -> None:
    told: list[tuple[str, bool]] = []

    async def whole() -> None:
        connection = LocalConnection()
        connection.on_state(lambda state, why: told.append((state, bool(why))))
        forget = connection.on_state(lambda state, why: pytest.fail("it was forgotten"))
        forget()
        forget()

        def broken(state: str, why: str) -> None:
            raise ValueError("its own fault")

        connection.on_state(broken)
        await connection.open()
        lost = asyncio.Event()
        connection.on_lost.append(lambda _: lost.set())
        os.kill(connection.agent_info.pid, signal.SIGKILL)
        await lost.wait()
        assert connection.why
        await connection.close()

    event_loop.run(whole(), timeout=60)
    assert told == [("connecting", False), ("open", False), ("interrupted", True), ("lost", True), ("closed", False)]


_CORES = """
import os, resource, signal
from lazycluster.agent import processes

def dumped(spawned):
    if spawned is None:
        pid = os.fork()
        if not pid:
            os.abort()
    else:
        null = os.open(os.devnull, os.O_RDWR)
        pid = processes.spawn(["sh", "-c", "kill -ABRT $$"], dict(os.environ), ".", null, null, null, cores=spawned)
    return os.WCOREDUMP(os.waitpid(pid, 0)[1])

hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
before = dumped(None)
processes.forbid_cores()
processes.forbid_cores()
print(before, dumped(None), dumped(False), dumped(True), resource.getrlimit(resource.RLIMIT_CORE) == (1, hard))
"""


def test_no_core_dump_is_made_of_the_agent(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", _CORES], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, *after = ended.stdout.split()
    if before == "False":
        pytest.skip("this system makes none here")
    assert after == ["False", "False", "True", "True"]


def test_a_hard_limit_of_no_core_dumps_is_no_error() -> None:
    code = (
        "import resource; from lazycluster.agent import processes; resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        "processes.forbid_cores(); print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout in ("(0, 0)\n", "(1, 0)\n")
