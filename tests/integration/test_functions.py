"""Functions through a real agent, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lazycluster.core import event_loop
from lazycluster.exceptions import AgentError, ConnectionLostError
from lazycluster.ssh.local_connection import LocalConnection
from lazycluster.ssh.ssh_connection import SshConnection
from lazycluster.tasks import functions
from lazycluster.tasks.functions import CallOutcome

_PYENV = Path.home() / ".pyenv" / "versions"
HERE = sys.executable


@asynccontextmanager
async def connected() -> AsyncIterator[LocalConnection]:
    connection = LocalConnection()
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


def with_connection(work: Callable[[LocalConnection], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with connected() as connection:
            return await work(connection)

    return event_loop.run(main(), timeout=90)


def call(function: Any, *args: Any, **options: Any) -> CallOutcome:
    options.setdefault("python", HERE)
    outcome: CallOutcome = with_connection(lambda connection: functions.call(connection, function, args, **options))
    return outcome


def test_value_and_output() -> None:
    printed: list[bytes] = []

    def speak(name: str) -> str:
        print(f"hello {name}")
        return name.upper()

    outcome = call(speak, "grün", stdout=printed.append)
    assert (outcome.status, outcome.value) == ("returned", "GRÜN")
    assert b"".join(printed) == "hello grün\n".encode()


def test_output_comes_as_it_is_printed() -> None:
    first = asyncio.Event()

    def speak() -> None:
        import sys

        print("now")
        sys.stdin.read()
        import time

        time.sleep(60)

    async def work(connection: LocalConnection) -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(
            functions.call(connection, speak, python=HERE, stdout=lambda _: first.set(), task="printing")
        )
        await asyncio.wait_for(first.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with_connection(work)


def test_cancelling_ends_the_process_group_and_what_it_started() -> None:
    pids: list[int] = []

    def start() -> None:
        import os
        import signal
        import subprocess
        import time

        children = [
            subprocess.Popen(["sleep", "1000"]),
            subprocess.Popen(["sleep", "1000"], start_new_session=True),
            subprocess.Popen(["sh", "-c", "trap '' TERM INT; while :; do sleep 1000; done"]),
        ]
        forked = os.fork()
        if not forked:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        print(os.getpid(), forked, *[child.pid for child in children])
        time.sleep(1000)

    async def work(connection: LocalConnection) -> None:
        told = asyncio.Event()

        def printed(data: bytes) -> None:
            pids.extend(int(word) for word in data.split())
            told.set()

        task = asyncio.get_running_loop().create_task(
            functions.call(connection, start, python=HERE, stdout=printed, task="cancelled")
        )
        await asyncio.wait_for(told.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [pid for pid in pids if _alive(pid)] == []

    with_connection(work)
    assert len(pids) == 5


def test_cancelling_before_the_process_is_there() -> None:
    async def work(connection: LocalConnection) -> None:
        for delay in (0, 0.01, 0.05, 0.1, 0.2):
            task = asyncio.get_running_loop().create_task(
                functions.call(connection, time.sleep, (60,), python=HERE, task=f"early{delay}")
            )
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        outcome = await functions.call(connection, lambda: 3, python=HERE)
        assert outcome.value == 3

    with_connection(work)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_result_though_a_child_of_it_holds_its_output() -> None:
    def leave() -> int:
        import os
        import subprocess

        pid = os.fork()
        if pid == 0:
            import time

            time.sleep(1000)
        print("before", flush=True)
        subprocess.Popen(["sleep", "1000"])
        return pid

    async def work(connection: LocalConnection) -> tuple[float, CallOutcome, list[bytes]]:
        printed: list[bytes] = []
        start = time.monotonic()
        outcome = await functions.call(connection, leave, python=HERE, stdout=printed.append)
        return time.monotonic() - start, outcome, printed

    duration, outcome, printed = with_connection(work)
    assert outcome.status == "returned"
    assert b"".join(printed) == b"before\n"
    assert duration < 10
    assert not _alive(outcome.value)


def test_end_of_the_process() -> None:
    assert call(sys.exit, 3) == CallOutcome("exited", exit=3)
    assert call(os._exit, 4) == CallOutcome("exited", exit=4)
    outcome = call(lambda: os.kill(os.getpid(), 9))
    assert (outcome.status, outcome.signal) == ("killed", signal.SIGKILL)
    assert "SIGKILL; the host may have run out of memory" in outcome.describe("f")


def test_remote_traceback() -> None:
    def outer() -> None:
        def inner() -> None:
            raise KeyError("lost")

        inner()

    outcome = call(outer)
    assert isinstance(outcome.exception, KeyError)
    text = outcome.describe("outer")
    assert text.startswith("outer() raised KeyError: 'lost'\nTraceback on the host:\n")
    assert 'raise KeyError("lost")' in text
    assert "lazycluster" not in text.replace(str(Path(__file__)), "")


def test_other_minor_version_is_refused_with_what_there_is() -> None:
    old = sorted(_PYENV.glob("3.8.*/bin/python3"))
    if not old or sys.version_info[:2] == (3, 8):
        pytest.skip("no Python 3.8 under pyenv")
    with pytest.raises(AgentError) as caught:
        call(platform.python_version, python=str(old[0]))
    assert caught.value.kind == "mismatch"
    message = str(caught.value)
    assert f"Python {platform.python_version()} on the manager, but 3.8" in message
    assert 'python="auto"' in message
    assert 'environment="manager"' in message
    assert any(one["version"][:2] == [3, 8] for one in caught.value.evidence["interpreters"])


def test_auto_takes_the_same_minor_version(tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to("/bin/false")
    outcome = call(platform.python_version_tuple, python="auto", env={"PATH": f"{tmp_path}:{Path(HERE).parent}:/bin"})
    assert outcome.value[:2] == platform.python_version_tuple()[:2]


@pytest.mark.parametrize(("python", "words"), [("/no/such/python", "No such file"), ("false", "without any output")])
def test_interpreter_that_does_not_start(python: str, words: str) -> None:
    with pytest.raises(AgentError, match=words) as caught:
        call(len, [], python=python)
    assert caught.value.kind == "python"


def test_working_directory(tmp_path: Path) -> None:
    assert call(os.getcwd, cwd=str(tmp_path)).value == str(tmp_path)
    with pytest.raises(AgentError, match="no/such"):
        call(os.getcwd, cwd=str(tmp_path / "no/such"))


def test_environment() -> None:
    strange = {"A": "a'b\"c $HOME `x`\nline", "Ü": "ü"}
    assert call(lambda: {key: os.environ[key] for key in ("A", "Ü")}, env=strange).value == strange


def test_hundreds_of_megabytes() -> None:
    import numpy

    array = numpy.arange(13_000_000)
    outcome = call(lambda a: a * 2, array)
    assert (outcome.value == array * 2).all()


def test_modules_are_imported_once_and_not_in_a_call_that_sets_them_up() -> None:
    def use() -> bool:
        import sys

        warm = "numpy" in list(sys.modules)
        import numpy

        return warm and bool(numpy.ones(1).all())

    def set_up() -> bool:
        import os
        import sys

        os.environ["OMP_NUM_THREADS"] = "1"
        return "numpy" in list(sys.modules)

    async def work(connection: LocalConnection) -> list[Any]:
        return [(await functions.call(connection, f, python=HERE)).value for f in (use, use, set_up, use)]

    first, *others = with_connection(work)
    assert first in (True, False)
    assert others == [True, False, True]


def test_many_at_once() -> None:
    async def work(connection: LocalConnection) -> list[Any]:
        outcomes = await asyncio.gather(
            *[functions.call(connection, lambda x: x * x, (i,), python=HERE) for i in range(60)]
        )
        return [outcome.value for outcome in outcomes]

    assert with_connection(work) == [i * i for i in range(60)]


def test_a_call_goes_on_when_what_it_was_forked_from_is_killed(tmp_path: Path) -> None:
    """As by a host that has no memory left: then the next ones are forked from another."""

    def kill_parent(number: int) -> int:
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.001)
        (tmp_path / f"killed-{number}").touch()
        while not (tmp_path / f"noticed-{number}").exists():
            time.sleep(0.001)
        if number % 2:
            os._exit(3)
        return 5

    async def work(connection: LocalConnection) -> None:
        for number in range(4):
            call = asyncio.ensure_future(functions.call(connection, kill_parent, (number,), python=HERE))
            while not (tmp_path / f"killed-{number}").exists():
                await asyncio.sleep(0.001)
            assert (await functions.call(connection, abs, (-1,), python=HERE)).value == 1
            (tmp_path / f"noticed-{number}").touch()
            outcome = await call
            if number % 2:
                assert outcome.status == "killed"
            else:
                assert outcome.value == 5

    with_connection(work)


def test_several_interpreters_and_environments() -> None:
    async def work(connection: LocalConnection) -> list[Any]:
        found = []
        for i in range(7):  # more than are kept
            outcome = await functions.call(connection, os.getenv, ("N",), python=HERE, env={"N": str(i)})
            found.append(outcome.value)
        return found

    assert with_connection(work) == [str(i) for i in range(7)]


def test_more_at_once_than_there_are_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:

        async def work(connection: LocalConnection) -> list[Any]:
            outcomes = await asyncio.gather(
                *[functions.call(connection, time.sleep, (0.5,), python=HERE) for _ in range(40)],
                connection.request("info"),
            )
            return [outcome.status for outcome in outcomes[:-1]]

        assert with_connection(work) == ["returned"] * 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_call_that_waits_for_descriptors_can_be_cancelled(tmp_path: Path) -> None:
    """It ends although nothing else does, and does not take the turn of the next one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def held(gate: str) -> int:
        with open(gate) as file:
            return len(file.read())

    async def work(connection: LocalConnection) -> None:
        started = asyncio.Event()

        def called(event: Callable[[Any], Any] = lambda _: None) -> asyncio.Future[CallOutcome]:
            return asyncio.ensure_future(functions.call(connection, held, (str(gate),), python=HERE, event=event))

        first = called(lambda _: started.set())
        others = [called() for _ in range(40)]
        turn = asyncio.Event()
        last = called(lambda _: turn.set())
        await asyncio.wait_for(started.wait(), 30)
        await connection.request("info")
        others[-1].cancel()  # it waits
        await asyncio.wait_for(asyncio.wait([others[-1]]), 30)
        for other in others:
            other.cancel()
        await asyncio.wait_for(turn.wait(), 30)
        await asyncio.wait_for(asyncio.wait(others), 30)
        assert not first.done()
        with await event_loop.in_thread(lambda: gate.open("w")):
            pass
        assert [outcome.value for outcome in await asyncio.gather(first, last)] == [0, 0]

    try:
        with_connection(work)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_on_a_host(hosts: Any) -> None:
    async def work() -> list[CallOutcome]:
        connection = SshConnection(hosts.names[0], {"config_file": hosts.config_file})
        await connection.open()
        try:
            letters = lambda n: b"y" * n  # noqa: E731
            calls: list[Any] = [(platform.node, []), (len, [b"x" * 20_000_000]), (letters, [9_000_000])]
            return [await functions.call(connection, function, arguments, python=HERE) for function, arguments in calls]
        finally:
            await connection.close()

    outcomes = event_loop.run(work(), timeout=60)
    assert [outcome.value for outcome in outcomes[:2]] == [hosts.names[0], 20_000_000]
    assert len(outcomes[2].value) == 9_000_000


def test_end_of_the_connection() -> None:
    async def work(connection: LocalConnection) -> None:
        started = asyncio.Event()
        task = asyncio.get_running_loop().create_task(
            functions.call(connection, time.sleep, (60,), python=HERE, event=lambda _: started.set())
        )
        await asyncio.wait_for(started.wait(), 10)
        await connection.close()
        with contextlib.suppress(ConnectionLostError):  # it depends on who is told first
            assert (await task).status == "killed"

    with_connection(work)
