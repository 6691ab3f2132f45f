"""The modules that an agent starts with, and what it works with instead of larger parts of the standard library."""

from __future__ import annotations

import ast
import json
import math
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazycluster.agent import bootstrap, json_text, poller, server
from lazycluster.ssh import agent_program

FOLDER = Path(bootstrap.__file__).parent
# What only requests import that bring all modules, and copies, before which they are sent.
LATER = {"files", "partial_files", "stream"}
RARE = {"limits", "ps", "spool"}  # of those of the start, what few connections import
# What takes as long to import as Python to start, and what it is imported for.
LARGE = {"argparse", "collections", "ctypes", "enum", "functools", "json", "re", "selectors", "shutil", "signal"}
LARGE |= {"socket", "subprocess", "tempfile", "typing"}


def imported(module: str) -> Iterator[str]:
    """Yield the names of our modules that one imports."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    for_types = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for part in branch.body
        for node in ast.walk(part)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in for_types:
            yield from [node.module] if node.module else [name.name for name in node.names]


def test_an_agent_starts_with_all_modules_that_its_first_requests_import() -> None:
    """Also those that are imported within functions, but for copies and requests that bring all modules."""
    start = set(agent_program._START)
    handled = {module for name, (module, _) in server._HANDLERS.items() if name in agent_program.START_OPERATIONS}
    missing = handled - start
    for module in start:
        missing |= set(imported(module)) - start - LATER
    assert not missing


def test_requests_of_the_start_are_those_that_there_are() -> None:
    """A request that was renamed would be sent without the modules that it needs."""
    of_the_agent = {"at_manager_end", "listen", "ping", "session", "stop"}
    assert set(agent_program.START_OPERATIONS) - of_the_agent <= set(server._HANDLERS)


def test_the_start_of_an_agent_imports_nothing_large() -> None:
    """Each would cost every connection several milliseconds of the host's processor."""
    names = ", ".join(f"lazycluster.agent.{name}" for name in agent_program._START if name not in RARE)
    package = f"import sys; m = sys.modules['lazycluster'] = type(sys)('m'); m.__path__ = [{str(FOLDER.parent)!r}]"
    code = f"{package}; before = set(sys.modules); import {names}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & LARGE


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, -2.5, 1e300, None, True, False, "x"], "b": {"c": []}},
        {"text": 'quote " backslash \\ line\n tab\t nul\0 é € 😀 \udc80'},
        {"big": 2**80, "key with ü": "\u2028"},
        {"infinite": [math.inf, -math.inf]},
        [],
        "text",
        3,
    ],
)
def test_json_is_what_the_package_makes_of_it(value: object) -> None:
    """Manager and agent may have different implementations."""
    assert json_text.dumps(value) == json.dumps(value, separators=(",", ":")).encode("ascii")
    assert json_text.loads(json_text.dumps(value)) == value


@pytest.mark.parametrize(
    "text", ["", " ", "{", "[1,]", '{"a":1} x', "nul", '"\n"', "{'a':1}", "1 2", "\ufeff1", "[" * 100_000]
)
def test_what_is_no_json_is_refused(text: str) -> None:
    """A host may send anything."""
    with pytest.raises((ValueError, RecursionError)):
        json_text.loads(text.encode())


def test_spaces_around_json_are_passed_over() -> None:
    """As what a shell prints ends with a line break."""
    assert json_text.loads(b' \t\r\n{"a" : [ 1 , 2 ] }\n') == {"a": [1, 2]}


def test_what_json_cannot_hold_is_refused() -> None:
    """Instead of being sent as something else."""
    with pytest.raises(TypeError, match="no form"):
        json_text.dumps({"a": object()})


def test_json_without_its_fast_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other implementations of Python lack it."""
    monkeypatch.setattr(json_text, "_fast", None)
    assert json_text.loads(json_text.dumps({"a": ["\udc80", 1.5]})) == {"a": ["\udc80", 1.5]}
    with pytest.raises(ValueError, match="Expecting"):
        json_text.loads(b"x")


@pytest.mark.parametrize("has_epoll", [True, False])
def test_descriptors_that_are_ready(has_epoll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both of the system's ways."""
    if not has_epoll:
        monkeypatch.delattr(select, "epoll", raising=False)
    waiting = poller.Poller()
    read, write = os.pipe()
    try:
        waiting.register(read, poller.READ)
        assert waiting.wait(0.0) == []
        waiting.register(write, poller.WRITE)
        assert waiting.wait(None) == [(write, poller.WRITE)]
        os.write(write, b"x")
        assert sorted(waiting.wait(10.0)) == [(read, poller.READ), (write, poller.WRITE)]
        waiting.modify(write, 0)
        assert waiting.wait(10.0) == [(read, poller.READ)]
        waiting.unregister(read)
        waiting.unregister(write)
        assert waiting.wait(0.01) == []
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("has_epoll", [True, False])
def test_a_broken_pipe_is_ready_for_whoever_waits(has_epoll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits to write learns that nobody reads, and whoever waits to read that the end has come."""
    if not has_epoll:
        monkeypatch.delattr(select, "epoll", raising=False)
    waiting = poller.Poller()
    read, write = os.pipe()
    waiting.register(write, poller.WRITE)
    os.close(read)
    assert [(fd, mask & poller.WRITE) for fd, mask in waiting.wait(10.0)] == [(write, poller.WRITE)]
    waiting.unregister(write)
    os.close(write)


def test_a_descriptor_may_be_closed_before_it_is_forgotten() -> None:
    """`epoll` has forgotten it then."""
    waiting = poller.Poller()
    read, write = os.pipe()
    waiting.register(read, poller.READ)
    os.close(read)
    os.close(write)
    waiting.unregister(read)
    assert waiting.wait(0.0) == []
