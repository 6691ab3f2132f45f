"""Hosts that run something else than our agent, and lie in every answer; nobody calls a function on them."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import liar
from lazycluster import DetachedTask, Environment, EnvironmentSpec, Runtime, RuntimeGroup, RuntimeTask
from lazycluster.agent import json_text, stream, wire
from lazycluster.cli.diagnosis import Diagnosis
from lazycluster.core import event_loop
from lazycluster.exceptions import InvalidRuntimeError, LazyclusterError, NoPortsLeftError
from lazycluster.ssh import agent_replies
from lazycluster.ssh.ssh_connection import SshConnection


@pytest.fixture(autouse=True)
def _main_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "main_directory", str(tmp_path / "main"))


@pytest.fixture
def harm(tmp_path: Path) -> Path:
    """The directory that a host makes on the manager if something of it is unpickled."""
    return tmp_path / "harm"


@pytest.fixture
def python(hosts: Any, harm: Path) -> Iterator[Callable[..., str]]:
    """What puts a liar on a host, and returns the path that Python is expected at."""
    folder = hosts[0].path("~/liar")
    for module in (json_text, wire, stream, agent_replies):
        file = folder / f"{module.__name__.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(module.__file__), file)
    shutil.copy(liar.__file__, folder)
    folder.chmod(0o777)  # it is written to by the host's user

    def placed(lie: str, hello: Any = None, line: str | None = None, from_the_start: bool = False) -> str:
        (folder / "settings.json").write_text(json.dumps({"lie": lie, "harm": str(harm), "hello": hello, "line": line}))
        (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} {hosts[0].home}/liar/liar.py "$@"\n')
        (folder / "python3").chmod(0o755)
        (folder / "lies").unlink(missing_ok=True)
        if from_the_start:
            (folder / "lies").touch()
        return f"{hosts[0].home}/liar/python3"

    yield placed
    shutil.rmtree(folder)


@pytest.fixture
def connect(hosts: Any, python: Callable[..., str]) -> Callable[..., Runtime]:
    """What connects to a host that lies from then on, or from the start."""

    def connected(lie: str, hello: Any = None, line: str | None = None, **options: Any) -> Runtime:
        from_the_start = options.pop("from_the_start", False)
        program = python(lie, hello, line, from_the_start)
        runtime = Runtime("host1", connection_kwargs={"config_file": hosts.config_file}, python=program, **options)
        if not from_the_start:
            assert runtime.echo("lie") == "lie"
        return runtime

    return connected


def _sent(path: Path) -> str:
    (path / "sent").write_text("x")
    return str(path / "sent")


def _first_task(runtime: Runtime) -> DetachedTask:
    return next(iter(runtime.detached_tasks()), DetachedTask(runtime._connection, {"id": "0" * 16}))


def _run(runtime: Runtime) -> Any:
    return runtime.execute_task(RuntimeTask("plain").run_command("true"), execute_async=False)


ASKED: dict[str, Callable[[Runtime, Path], Any]] = {
    "info": lambda runtime, _: runtime.refresh_info(),
    "print_info": lambda runtime, _: runtime.print_info(),
    "machine": lambda runtime, _: (runtime.os, runtime.memory_in_mb, runtime.cpu_cores, runtime.gpu_count),
    "shown": lambda runtime, _: (runtime._repr_html_(), repr(runtime)),
    "filter": lambda runtime, _: runtime.check_filter(True, 1, 1, ["x"], ["true"]),
    "executables": lambda runtime, _: runtime.check_filter(installed_executables=["x"], filter_commands=["true"]),
    "valid": lambda runtime, _: runtime.is_valid_runtime(),
    "has_free_port": lambda runtime, _: runtime.has_free_port(25000),
    "get_free_port": lambda runtime, _: runtime.get_free_port([25000, 25001]),
    "create_dir": lambda runtime, _: runtime.create_dir("x"),
    "create_tempdir": lambda runtime, _: runtime.create_tempdir(),
    "delete_dir": lambda runtime, _: runtime.delete_dir("x"),
    "echo": lambda runtime, _: runtime.echo("x"),
    "command": lambda runtime, _: _run(runtime),
    "command, its output": lambda runtime, _: (_run(runtime), runtime.print_log()),
    "send_file": lambda runtime, path: runtime.send_file(_sent(path), "there", execute_async=False),
    "get_file": lambda runtime, path: runtime.get_file("there", str(path / "got"), execute_async=False),
    "get_folder": lambda runtime, path: runtime.get_file("~", str(path / "got") + "/", execute_async=False),
    "detached": lambda runtime, _: runtime.detached_tasks(),
    "detached, result": lambda runtime, _: _first_task(runtime).result(0.1),
    "detached, state": lambda runtime, _: (repr(_first_task(runtime)), _first_task(runtime).state),
    "detached, log": lambda runtime, _: _first_task(runtime).log(),
    "detached, join": lambda runtime, _: _first_task(runtime).join(0.1),
    "detached, cancel": lambda runtime, _: _first_task(runtime).cancel(),
    "detached, remove": lambda runtime, _: _first_task(runtime).remove(),
    "detach": lambda runtime, _: runtime.execute_task(RuntimeTask().run_command("x"), detach=True).result(0.1),
    "environments": lambda runtime, _: RuntimeGroup([runtime]).list_environments(),
    "environments, remove": lambda runtime, _: RuntimeGroup([runtime]).remove_environments(["x"]),
    "environments, prune": lambda runtime, _: RuntimeGroup([runtime]).prune_environments(size_limit=1),
    "group": lambda runtime, _: RuntimeGroup([runtime]).detached_tasks(),
    "group, port": lambda runtime, _: RuntimeGroup([runtime]).get_free_port([25000]),
}


def _refused(name: str, ask: Callable[[], Any]) -> bool:
    """Ask; whether that ends in an error, which then names the host."""
    try:
        ask()
    except (LazyclusterError, ValueError, TimeoutError) as error:
        # What is documented: ValueError for a directory that is a file.
        assert isinstance(error, (LazyclusterError, TimeoutError)) or name == "delete_dir", (name, error)
        assert "host1" in str(error) or isinstance(error, NoPortsLeftError), (name, error)
        assert "\x1b" not in str(error)
        return True
    except BaseException as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return False


@pytest.mark.parametrize("lie", liar.LIES)
def test_no_code_runs_and_each_error_names_the_host(connect: Callable[..., Runtime], harm: Path, lie: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, connect(lie) as runtime:
        port = server.getsockname()[1]
        asked = {
            **ASKED,
            "to": lambda runtime, _: runtime.expose_port_to_runtime(port, 25000),
            "to one of several": lambda runtime, _: runtime.expose_port_to_runtime(port, range(25000, 25003)),
            "from": lambda runtime, _: runtime.expose_port_from_runtime(25000, range(35000, 35010)),
        }
        refused = set()
        for name, ask in asked.items():
            if _refused(name, lambda ask=ask: ask(runtime, harm.parent)):
                refused.add(name)
            assert not harm.exists(), name
        assert {"command", "detached, result", "detach", "send_file", "get_file"} <= refused
        assert runtime._connection.state == "open"  # what makes no sense ends its own request


@pytest.mark.parametrize("lie", liar.LIES)
def test_a_host_that_lies_from_the_start(connect: Callable[..., Runtime], harm: Path, lie: str) -> None:
    def use() -> None:
        with connect(lie, from_the_start=True) as runtime:
            runtime.execute_task(RuntimeTask("plain").run_command("true"), execute_async=False)

    assert _refused("command", use)
    assert not harm.exists()


@pytest.mark.parametrize(
    "hello",
    [
        {"pid": -1}, {"uid": 10**30}, {"python": [3, 13]}, {"python": [10**400, 1, 1]}, {"booted": float("nan")},
        {"home": "\ud800"}, {"directory": 7}, {"user": None}, {"pid": "DIGITS"}, {"network": [[[[]]]]},
    ],
)  # fmt: skip
def test_what_a_host_says_of_itself_is_checked(connect: Callable[..., Runtime], hello: dict[str, Any]) -> None:
    with pytest.raises(InvalidRuntimeError, match="host1") as caught:
        connect("bare", hello)
    assert caught.value.reason == "protocol"


@pytest.mark.parametrize(
    "line", ["", "3.13.0", "x y", "1" * 5000 + ".1.1 tag", "3.13.0 tag more", "\udcb2.1.1 tag", "3..1 t"]
)
def test_a_first_line_that_is_none_is_no_host_without_an_answer(connect: Callable[..., Runtime], line: str) -> None:
    with pytest.raises(InvalidRuntimeError, match="host1"):
        connect("bare", line=line)


def test_names_that_are_no_text_are_names(connect: Callable[..., Runtime]) -> None:
    """A host may have directories whose names are not UTF-8."""
    with connect("bare", {"home": "/\udcff", "user": "\udce4"}) as runtime:
        assert runtime._connection.agent_info.home == "/\udcff"


@pytest.mark.parametrize("lie", ["wrong", "too-large", "digits"])
def test_what_others_say_is_told_all_the_same(
    connect: Callable[..., Runtime],
    hosts: Any,
    lie: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # the reason is in one line then
    honest = Runtime("host2", connection_kwargs={"config_file": hosts.config_file})
    with connect(lie) as lying, honest, RuntimeGroup([lying, honest]) as group:
        task = honest.execute_task(RuntimeTask("plain").run_command("true"), detach=True)
        assert [found.id for found in group.detached_tasks()] == [task.id]
        assert "host1: its detached tasks are not listed: host1: its answer to" in caplog.text
        task.remove()
        assert list(group.list_environments()) == ["host2"]
        assert list(group.prune_environments(unused_for=1e9)) == ["host2"]
        group.print_runtime_info()
        rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("host")}
        assert "invalid" in rows["host1"]
        assert str(honest.cpu_cores) in rows["host2"].split()


def test_a_group_of_which_no_host_can_be_asked(connect: Callable[..., Runtime]) -> None:
    with connect("wrong") as runtime, RuntimeGroup([runtime]) as group:
        for ask in (group.detached_tasks, group.list_environments, lambda: group.remove_environments("x")):
            with pytest.raises(LazyclusterError, match="host1"):
                ask()


@pytest.mark.parametrize("lie", ["lowest", "nothing", "wrong"])
def test_a_file_for_all_hosts_comes_to_the_others(
    connect: Callable[..., Runtime], hosts: Any, lie: str, tmp_path: Path
) -> None:
    """It is asked which hosts share a directory; a host that has none at all is not asked for ever."""
    honest = Runtime("host2", connection_kwargs={"config_file": hosts.config_file})
    with connect(lie) as lying, honest, RuntimeGroup([lying, honest]) as group:
        task = RuntimeTask("copy").send_file(_sent(tmp_path), "~/liar-sent/x")
        with pytest.raises(LazyclusterError, match="host1"):
            group.execute_task(task, broadcast=True, execute_async=False)
        sent = hosts[1].path("~/liar-sent")
        assert (sent / "x").read_text() == "x"
        shutil.rmtree(sent)


@pytest.mark.parametrize("lie", ["lowest", "highest", "too-large", "digits"])
def test_an_environment_on_a_host_that_lies(
    connect: Callable[..., Runtime], harm: Path, tmp_path: Path, lie: str
) -> None:
    (tmp_path / "requirements.txt").write_text("# none\n")
    for environment in (str(tmp_path / "requirements.txt"), EnvironmentSpec("~/venv")):
        with connect(lie, environment=environment) as runtime:
            # What passes for an environment is used: the host alone has something of it.
            told = _refused("prepare", runtime.prepare)
            assert told or runtime.environment_path is not None or lie in ("lowest", "nothing")
        assert not harm.exists()


@pytest.mark.parametrize("lie", ["highest", "too-large", "digits", "bare"])
def test_a_checkup_of_a_host_that_lies(python: Callable[..., str], hosts: Any, harm: Path, lie: str) -> None:
    program = python(lie, from_the_start=True)

    async def check() -> Diagnosis:
        diagnosis = Diagnosis("host1")
        connection = SshConnection("host1", {"config_file": hosts.config_file}, python=program)
        try:
            await diagnosis.run(connection)
        finally:
            await connection.close()
        return diagnosis

    diagnosis = event_loop.run(check())
    states = {step.name: step.state for step in diagnosis.steps}
    assert states["temporary files"] == "failed"
    assert [name for name, state in states.items() if state == "not reached"] == ["clock"]  # asked with the files
    assert not harm.exists()
