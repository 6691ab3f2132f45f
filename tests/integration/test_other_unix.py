"""A real host, from a manager whose system lacks what only Linux has."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import otherunix
from lazycluster import Runtime, RuntimeTask
from sshhosts.options import PASSWORD


@contextmanager
def without(*kinds: str) -> Iterator[None]:
    """Deny it until the host is disconnected: what is looked for afterwards is looked for in /proc."""
    with pytest.MonkeyPatch.context() as patch:
        otherunix.deny(patch, *kinds)
        yield


def work(runtime: Runtime, directory: Path) -> None:
    """Run a command and a function, copy files both ways, and open tunnels both ways."""
    task = RuntimeTask("commands").run_command("hostname").run_function(os.getcwd)
    runtime.execute_task(task, execute_async=False)
    assert task.execution_log[0].strip() == runtime.host
    assert next(iter(task.function_returns))
    (directory / "sent").write_bytes(b"content" * 100_000)
    runtime.send_file(str(directory / "sent"), "copy")
    runtime.get_file("copy", str(directory / "back"))
    assert (directory / "back").read_bytes() == b"content" * 100_000
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        there, here = runtime.get_free_port(range(21000, 21999)), 23917
        runtime.expose_port_to_runtime(server.getsockname()[1], there)
        runtime.expose_port_from_runtime(there, here)
        with socket.create_connection(("127.0.0.1", here)) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"there and back")
                assert accepted.recv(14) == b"there and back"


@pytest.mark.parametrize(
    "kinds", [(kind,) for kind in otherunix.KINDS] + [()], ids=lambda kinds: ",".join(kinds) or "all"
)
def test_a_host_can_be_used_and_nothing_is_left(hosts: Any, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    settings = {"config_file": hosts.config_file}
    with without(*kinds), Runtime(hosts.names[0], connection_kwargs=settings) as runtime:
        work(runtime, tmp_path)


def test_a_password_is_given(make_hosts: Callable[..., Any], tmp_path: Path) -> None:
    hosts = make_hosts(1, password=True)
    settings = {"config_file": hosts.config_file, "password": PASSWORD}
    with without(), Runtime(hosts.names[0], connection_kwargs=settings) as runtime:
        work(runtime, tmp_path)
