"""Clusters that go on when the terminal, the notebook or the login ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazycluster.background import state
from lazycluster.background.client import end
from terminals import Terminal

LAZYCLUSTER = [sys.executable, "-m", "lazycluster"]
_USE = """
import lazycluster
with lazycluster.connect("night") as client:
    print(client.submit(pow, 2, 10).result())
"""


@pytest.fixture(autouse=True)
def state_home(hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory; what runs in it is ended, before the hosts are looked at."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path
    for found in state.all_named():
        end(found)


def run(*arguments: object, **env: str) -> tuple[int, str, str]:
    argv = [*LAZYCLUSTER, *map(str, arguments)]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, env={**os.environ, **env}
    )
    return done.returncode, done.stdout, done.stderr


def up(hosts: Any, *arguments: object, name: str = "night") -> str:
    status, out, err = run("up", name, "dask", "--config", hosts.config_file, "-w", "host[1-2]", *arguments)
    assert status == 0, err
    return out


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cluster_outlives_its_terminal_and_is_used_from_other_processes(hosts: Any) -> None:
    argv = [*LAZYCLUSTER, "up", "night", "dask", "--config", str(hosts.config_file), "-w", "host[1-2]"]
    with Terminal(argv) as terminal:
        terminal.until(r"lazycluster down night")
        assert terminal.end() == 0
    assert python(_USE) == "1024\n"
    status, out, err = run("scale", "night", 3)
    assert (status, out) == (0, "night has 3 workers\n"), err
    status, out, err = run("ls")
    assert status == 0 and "3/3" in out and "running" in out, out + err
    status, out, err = run("info", "night")
    assert status == 0 and "3 of 3 workers ready" in out, out + err
    status, out, err = run("dashboard", "night")
    assert status == 0 and out.startswith("http://127.0.0.1:"), out + err
    status, out, err = run("logs", "night", "host1-0")
    assert status == 0, err
    status, out, err = run("down", "night")
    assert status == 0 and out.startswith("night: ended ("), out + err
    assert state.all_named() == []
