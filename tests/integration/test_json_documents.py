"""The keys of --json documents, with the kinds of their values: tests/api/snapshot/json.txt says which there are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api import snapshot

_KEYS_OF_USERS = {"packages": "PACKAGE"}  # what is below is called as users' packages are
_KINDS = {str: "text", bool: "truth", int: "number", float: "number", type(None): "null"}
_FIXTURE = Path(__file__).parents[1] / "fixtures" / "1.0.0rc1" / "environments"
_MODES = {True: 0o700, False: 0o600}


def _keys(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            name = _KEYS_OF_USERS.get(path.rpartition(".")[2], "HOST" if not path else key)
            yield from _keys(one, f"{path}.{name}")
    elif isinstance(value, list):
        yield f"{path}: list"
        for one in [] if path.endswith(".gpus") else value:  # the machine of the tests may have GPUs, or none
            yield from _keys(one, f"{path}[]")
    else:
        yield f"{path}: {_KINDS[type(value)]}"


def _described(documents: list[Any], of_hosts: bool) -> list[str]:
    found = sorted({line for one in documents for line in _keys(one, "" if of_hosts else "$")} - {"$: list"})
    return [line.replace("$", "", 1) for line in found]


def _documents(config: str, *commands: tuple[str, ...]) -> list[Any]:
    found = []
    for command in commands:
        found.append(json.loads(_run(*command[:-1], "--json", "--config", config, *command[-1].split())))
    return found


def _run(*arguments: str) -> str:
    argv = [sys.executable, "-m", "lazycluster", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert not done.stderr.startswith(("Error", "Usage", "error")), done.stderr
    return done.stdout


@pytest.fixture
def kept(tmp_path: Path) -> str:
    """A directory with an environment, as hosts keep them."""
    folder = tmp_path / "kept"
    shutil.copytree(_FIXTURE, folder)
    (folder / "names.txt").unlink()
    for path in [folder, *folder.rglob("*")]:
        path.chmod(_MODES[path.is_dir()])
    return str(folder)


@pytest.mark.timeout(400)  # thirteen commands, each a process of its own
def test_keys_of_json_documents(
    make_hosts: Any, hosts: Any, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    bad = make_hosts(1, forwarding=False)
    _run("put", "--config", hosts.config_file, "-w", "host1", kept, "kept")
    documents = {
        "list-runtimes": _documents(hosts.config_file, ("list-runtimes", "-w host[1-2],nowhere.invalid")),
        "doctor": [
            *_documents(hosts.config_file, ("doctor", "host1 nowhere.invalid")),
            *_documents(bad.config_file, ("doctor", "host1")),
        ],
        "run": _documents(
            hosts.config_file,
            ("run", "-w host1,nowhere.invalid -- echo out"),
            ("run", "-w host1 -- exit 3"),
        ),
        "run --detach": _documents(
            hosts.config_file, ("run", "--detach", "-w host1,nowhere.invalid --name work -- echo out")
        ),
        "wait": _documents(hosts.config_file, ("wait", "work")),
        "ps": _documents(hosts.config_file, ("ps", "-w host1,nowhere.invalid")),
        "cancel": _documents(hosts.config_file, ("cancel", "-w host1,nowhere.invalid work")),
        "rm": _documents(hosts.config_file, ("rm", "work")),
        "env list": _documents(hosts.config_file, ("env", "list", "-w host1 --cache-dir ~/kept")),
        "cleanup": _documents(hosts.config_file, ("cleanup", "-w host1")),
    }
    hosts[0].run("rm -r ~/kept", user=hosts[0].user)
    lines: list[str] = []
    for command, some in documents.items():
        lines += [f"[lazycluster {command} --json]", *_described(some, command == "cleanup"), ""]
    now = snapshot.text_of("Keys of --json documents, and the kinds of their values", lines[:-1])
    if snapshot.WRITE in os.environ:
        (snapshot.FOLDER / "json.txt").write_text(now)
    found = snapshot.difference("json", now)
    assert not found, f"others read these keys:\n{found}\n\nIf CHANGELOG.md names it: {snapshot.COMMAND}"
