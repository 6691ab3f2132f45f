"""Services: started, fed, watched, started again, ended; on an agent without ssh."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import leaks
from lazycluster.agent import wire
from lazycluster.cluster.exceptions import ServiceError
from lazycluster.cluster.master_process import MasterProcess
from lazycluster.cluster.service_spec import SCRATCH, ServiceSpec, Source
from lazycluster.cluster.services import Service
from lazycluster.cluster.usage import Meter, ProcessUsage
from lazycluster.cluster.worker_hosts import WorkerHost
from lazycluster.core import event_loop
from lazycluster.ssh.channel import Channel
from lazycluster.ssh.local_connection import LocalConnection
from lazycluster.utils import Environment

MARKER = "@@"


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "main"))


def _run(work: Callable[[LocalConnection], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        connection = LocalConnection()
        await connection.open()
        try:
            return await work(connection)
        finally:
            await connection.close()

    return event_loop.run(main(), 60)


def _source(tmp_path: Path, text: str) -> Source:
    folder = tmp_path / "program"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    start = "import json, os, sys\n"
    start += "def say(event, **more):\n    print('@@' + json.dumps({'event': event, **more}), flush=True)\n"
    (folder / "app.py").write_text(start + "def main():\n" + textwrap.indent(textwrap.dedent(text), "    "))
    return Source(folder, "app", "some_program")


def _service(connection: LocalConnection, source: Source | None = None, **options: Any) -> Service:
    program = ServiceSpec("thing", source=source, marker=MARKER if source else "", **options)
    return Service(program, WorkerHost("here", connection, sys.executable), "thing 1")


async def _state(service: Service, *states: str) -> None:
    deadline = time.monotonic() + 20
    while service.state not in states:
        assert time.monotonic() < deadline, service.state
        await asyncio.sleep(0.01)


def test_it_is_fed_gets_ready_and_ends(tmp_path: Path) -> None:
    source = _source(
        tmp_path,
        """
        line = sys.stdin.readline()
        say("hello", path=sys.path[-1], scratch=os.environ["LAZYCLUSTER_SCRATCH"])
        print("working on", line.strip())
        say("ready", got=json.loads(line))
        sys.stdin.read()
        """,
    )

    async def work(connection: LocalConnection) -> None:
        service = _service(connection, source)
        service.start()
        await service.send({"a": [1, "ü"]})
        hello = await service.wait_for("hello")
        assert Path(hello["scratch"]).is_dir()
        assert await service.wait_for("ready") == {"got": {"a": [1, "ü"]}}
        assert service.state == "ready"
        os.kill(service.pid or 0, 0)
        await service.stop()
        await service.stop()
        assert service.state == "ended"
        assert service.exit_status == -15
        assert not Path(hello["scratch"]).exists()
        assert service.last_output() == 'working on {"a": [1, "\\u00fc"]}\n'
        assert service.log_file.stat().st_mode & 0o077 == 0

    _run(work)


@pytest.mark.parametrize(
    "said",
    [
        {"state": []},
        {"state": "ready", "pid": "7", "detail": {}},
        {"state": "starting", "pid": 7, "gpus": [7]},
        {"state": "message", "event": "hello", "detail": 7},
        {"state": "starting", "pid": 7, "gpus": [], "restarts": "many"},
    ],
)
def test_nobody_waits_for_an_agent_that_makes_no_sense(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    received = Channel.received

    def changed(self: Channel, kind: int, payload: bytes) -> None:
        hostile = kind == wire.EVENT and b'"starting"' in payload
        received(self, kind, json.dumps(said).encode() if hostile else payload)

    async def work(connection: LocalConnection) -> None:
        service = _service(connection, command=("sleep", "600"))
        monkeypatch.setattr(Channel, "received", changed)
        service.start()
        with pytest.raises(ServiceError, match="is invalid"):
            await service.wait_for("ready")

    _run(work)


def test_it_is_started_again_with_what_it_was_told_last(tmp_path: Path) -> None:
    source = _source(
        tmp_path,
        """
        say("ready", got=json.loads(sys.stdin.readline()))
        sys.stdin.readline()
        os.kill(os.getpid(), 9)
        """,
    )

    async def work(connection: LocalConnection) -> None:
        service = _service(connection, source, restarts=1)
        service.start()
        await service.send("first")
        assert await service.wait_for("ready") == {"got": "first"}
        await service.send("second")
        assert await service.wait_for("ready") == {"got": "second"}
        assert service.restarts == 1
        assert service.exit_status == -9
        await service.send("third")
        await _state(service, "failed")
        assert service.error is not None
        assert "after 1 restarts" in service.error.problem
        assert service.error.exit_status == -9

    _run(work)


def test_an_end_before_it_is_ready_is_final_and_tells_why(tmp_path: Path) -> None:
    source = _source(tmp_path, "print('no luck', flush=True)\nsys.exit(3)\n")

    async def work(connection: LocalConnection) -> None:
        service = _service(connection, source, restarts=5)
        service.start()
        with pytest.raises(ServiceError) as caught:
            await service.wait_for("ready")
        assert caught.value.exit_status == 3
        assert caught.value.output == "no luck"
        assert caught.value.host == "here"
        assert service.restarts == 0
        assert "no luck" in str(caught.value)
        assert str(service.log_file) in str(caught.value)

    _run(work)


def test_an_end_with_status_0_is_no_failure() -> None:
    async def work(connection: LocalConnection) -> None:
        service = _service(connection, command=("true",), restarts=5)
        service.start()
        await _state(service, "ended")
        assert service.exit_status == 0
        assert service.restarts == 0

    _run(work)


def test_a_program_that_is_not_there() -> None:
    async def work(connection: LocalConnection) -> None:
        service = _service(connection, command=("/no/such/program",))
        service.start()
        with pytest.raises(ServiceError, match="/no/such/program"):
            await service.message()

    _run(work)


def test_readiness_is_a_text_in_its_output() -> None:
    async def work(connection: LocalConnection) -> None:
        script = "echo begin; echo now it is READY, yes; exec sleep 60"
        service = _service(connection, command=("sh", "-c", script), ready="READY")
        service.start()
        await service.wait_for("ready")
        assert service.last_output() == "begin\nnow it is READY, yes\n"
        await service.stop()

    _run(work)


def test_all_that_it_started_ends_with_it(tmp_path: Path) -> None:
    script = "trap '' TERM; (setsid sleep 1234.5 &); sleep 1234.5 & echo READY; wait; wait; sleep 1234.5"

    async def work(connection: LocalConnection) -> None:
        service = _service(connection, command=("sh", "-c", script), ready="READY", patience=0.2)
        service.start()
        await service.wait_for("ready")
        await service.stop()
        assert service.exit_status == -9
        assert leaks.running("sleep 1234.5") == []

    _run(work)


def test_a_service_never_waits_for_a_slow_manager(tmp_path: Path) -> None:
    done = tmp_path / "done"
    script = f"yes 0123456789abcdef | head -c 20000000; echo; echo READY; touch '{done}'; exec sleep 60"

    async def work(connection: LocalConnection) -> int:
        service = _service(connection, command=("sh", "-c", script), ready="READY")
        service.start()
        deadline = time.monotonic() + 50
        while not done.exists():  # the whole manager stands still meanwhile, and that is the point
            assert time.monotonic() < deadline
            time.sleep(0.05)
        await service.wait_for("ready")
        while not (text := service.log_file.read_bytes()).endswith(b"READY\n"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert b"bytes of output were dropped here" in text
        await service.stop()
        return len(text)

    assert _run(work) < 20_000_000


def test_output_without_newlines_and_with_any_bytes(tmp_path: Path) -> None:
    script = "head -c 3000000 /dev/zero; printf '\\377@@not json\\n'; exec sleep 60"

    async def work(connection: LocalConnection) -> None:
        program = ServiceSpec("thing", command=("sh", "-c", script), marker=MARKER)
        service = Service(program, WorkerHost("here", connection), "thing 1")
        service.start()
        deadline = time.monotonic() + 20
        while service.log_file.stat().st_size < 3_000_012 and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert service.log_file.read_bytes() == bytes(3_000_000) + b"\xff@@not json\n"
        await service.stop()

    _run(work)


def test_the_agent_ends_its_services(tmp_path: Path) -> None:
    async def work(connection: LocalConnection) -> Service:
        service = _service(connection, command=("sleep", "60"))
        service.start()
        await _state(service, "ready")
        return service

    service = _run(work)
    assert service.state in ("failed", "ended")
    with pytest.raises(ProcessLookupError):
        os.kill(service.pid, 0)


def test_the_interface_of_a_process() -> None:
    sent: list[str] = []
    process = MasterProcess(["master"], 42, sent.append)
    assert process.poll() is None
    assert process.args == ["master"]
    assert process.stdin is process.stdout is process.stderr is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    process.kill()
    process.send_signal(2)
    assert sent == ["TERM", "KILL", "INT"]
    process.ended(-9)
    process.ended(0)
    process.kill()
    assert sent == ["TERM", "KILL", "INT"]
    assert process.wait() == process.poll() == process.returncode == -9
    with process:
        pass


def test_a_service_is_over_with_its_process_whoever_holds_its_output(tmp_path: Path) -> None:
    source = _source(
        tmp_path,
        """
        import subprocess
        subprocess.Popen(["sleep", "100"])
        say("ready")
        sys.stdin.readline()
        print("last words", flush=True)
        os._exit(7)
        """,
    )

    async def work(connection: LocalConnection) -> None:
        service = _service(connection, source)
        service.start()
        await service.wait_for("ready")
        await service.send("go")
        await _state(service, "failed")
        assert service.exit_status == 7
        assert service.last_output() == "last words\n"

    _run(work)


def test_what_it_uses_with_all_that_it_has_started(tmp_path: Path) -> None:
    busy = "x = bytearray(64 << 20)\nprint(flush=True)\nwhile True: pass"
    source = _source(
        tmp_path,
        f"""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", {busy!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        say("ready")
        sys.stdin.read()
        """,
    )

    async def work(connection: LocalConnection) -> None:
        service, meter = _service(connection, source), Meter()
        assert await meter.look([service], 10) == {}
        service.start()
        await service.wait_for("ready")
        seen: list[ProcessUsage] = []
        deadline = time.monotonic() + 30
        while not (seen and seen[-1].cpu):  # the agent looks twice a second
            assert time.monotonic() < deadline
            seen += (await meter.look([service], 10)).values()
            await asyncio.sleep(0.05)
        assert seen[0].cpu is None
        assert seen[0].memory > 64 << 20
        assert seen[-1].cpu is not None and 0 < seen[-1].cpu < 10_000
        await service.stop()
        deadline = time.monotonic() + 30
        while (await connection.request("usage"))["services"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    _run(work)


# --- programs of others --------------------------------------------------------------------------
def _foreign(script: str, **options: Any) -> ServiceSpec:
    return ServiceSpec("thing", command=("sh", "-c", script), **options)


def test_files_variables_and_arguments_of_other_programs() -> None:
    script = 'cat "$FILE"; stat -c %a "$FILE"; echo "$1" "$SECRET" "$OWN"; pwd; echo ready now >&2; exec sleep 600'
    spec = ServiceSpec(
        "thing",
        command=("sh", "-c", script, "sh", f"{SCRATCH}/x"),
        files={"settings": f"of {SCRATCH}\n"},
        env={"FILE": f"{SCRATCH}/settings", "OWN": "program's"},
        secrets={"SECRET": "s3cret"},
        cwd=SCRATCH,
        ready="ready now",
        stop_signal="INT",
    )
    assert "s3cret" not in repr(spec)
    assert "of " not in repr(spec)

    async def work(connection: LocalConnection) -> None:
        service = Service(ServiceSpec("thing"), WorkerHost("here", connection, env={"OWN": "host's"}), "thing 1")
        assert await service.come_up(spec, {}) is None
        scratch = Path(service.last_output().splitlines()[0].removeprefix("of "))
        assert service.last_output().splitlines() == [
            f"of {scratch}", "600", f"{scratch}/x s3cret host's", str(scratch), "ready now"
        ]  # fmt: skip
        assert scratch.is_dir()
        await service.stop()
        assert service.exit_status == -2
        assert not scratch.exists()

    _run(work)


@pytest.mark.parametrize("bad", [{"files": {"b": "\udc80"}}, {"env": {"NULL": "\0"}}])
def test_of_a_program_that_cannot_be_started_no_secret_is_left(bad: dict[str, Any]) -> None:
    spec = _foreign("exec sleep 600", **{"files": {"a": "s3cret"}, "secrets": {"A": "s3cret"}, **bad})

    async def work(connection: LocalConnection) -> None:
        service = Service(spec, WorkerHost("here", connection), "thing 1")
        with pytest.raises(ServiceError):
            await service.come_up(spec, {})
        await service.stop()
        assert list(Path(connection.agent_info.directory).glob("service-*")) == []

    _run(work)


def test_another_program_is_ready_when_its_port_answers() -> None:
    port = _free_port()
    program = f"import socket, time; time.sleep(0.5); s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    spec = ServiceSpec("thing", command=(sys.executable, "-c", program), ready_port="it")

    async def work(connection: LocalConnection) -> None:
        service = Service(spec, WorkerHost("here", connection), "thing 1")
        assert await service.come_up(spec, {"it": port}) is None
        with socket.create_connection(("127.0.0.1", port)):
            pass
        other = service.again()
        assert await other.come_up(spec, {"it": port}) == port
        await other.stop()
        assert other.pid is None
        await service.stop()

    _run(work)


def test_what_another_program_says_of_a_port_that_is_taken() -> None:
    spec = _foreign("echo cannot: Address already in use; exit 1", ready="never", port_taken="already in use")

    async def work(connection: LocalConnection) -> None:
        service = Service(spec, WorkerHost("here", connection), "thing 1")
        assert await service.come_up(spec, {"it": 7}) == 7
        service = service.again()
        with pytest.raises(ServiceError, match="cannot: Address already in use"):
            await service.come_up(_foreign("echo cannot: Address already in use; exit 1", ready="never"), {"it": 7})

    _run(work)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
