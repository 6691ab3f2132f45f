"""The modules that an agent starts with, and what it works with instead of larger parts of the standard library."""

from __future__ import annotations

import ast
import json
import marshal
import math
import os
import re
import select
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

from changedagents import changed, read_again
from lazycluster.agent import bootstrap, json_text, operations, poller, services, zygote_link
from lazycluster.ssh import agent_program

FOLDER = Path(bootstrap.__file__).parent
FIRST = {  # the requests for which an agent needs no more modules than it starts with
    *("at_manager_end", "expand", "leftovers", "listen", "mkdir", "mkdtemp", "ping", "remove", "run", "session"),
    *("setup", "stop"),
}
# What only copies import, before which it is sent.
LATER = {"files", "partial_files", "stream"}
FURTHER = sorted((set(operations.HANDLERS) - FIRST) | {agent_program.COPIES})
# Where modules are imported or read by a name that no import statement has, and how often.
BY_NAME = {
    "bootstrap": 6,  # of the start
    "detached": 1,  # "functions" beside "commands"
    "environment_program": 2,  # itself
    "guardian": 1,  # of Python
    "json_text": 1,
    "limits": 1,  # itself
    "localmodules": 4,  # the user's
    "server": 1,  # handlers
    "services": 1,
    "zygote": 1,  # the user's
    "zygote_link": 3,
}
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
    """Also those that are imported within functions, but for copies, which bring theirs."""
    start = set(agent_program._START)
    handled = {module for name, (module, _) in operations.HANDLERS.items() if name in FIRST}
    missing = handled - start
    for module in start:
        missing |= set(imported(module)) - start - LATER
    assert not missing


@pytest.mark.parametrize("operation", FURTHER)
def test_a_request_brings_all_that_it_imports(operation: str) -> None:
    """In all its modules, and what copies begin with."""
    there = agent_program.further_modules(operation)
    wanted = {operations.HANDLERS[operation][0]} if operation in operations.HANDLERS else LATER
    for module in there:
        wanted |= set(imported(module))
    assert wanted <= there | set(agent_program._START)


def test_modules_that_are_imported_or_read_by_name() -> None:
    """`agent_program` has to know all of them."""
    found = {}
    for path in FOLDER.glob("*.py"):
        calls = re.findall(
            r"(?<!def )\b(?:import_module|get_source|texts|find_spec)\(", path.read_text(encoding="utf-8")
        )
        found.update({path.stem: len(calls)} if calls else {})
    assert found == BY_NAME
    texts = {"zygote", *zygote_link._MODULES, *zygote_link._POOL_MODULES}
    assert set(agent_program._BY_NAME["zygote_link"]) == texts
    assert set(agent_program._BY_NAME["services"]) == set(services._IN_PROGRAMS)
    assert texts.union(services._IN_PROGRAMS) <= agent_program._AS_TEXT


@pytest.mark.parametrize("tag", [sys.implementation.cache_tag, "cpython-38"])
def test_modules_are_sent_as_code_or_text(tag: str) -> None:
    """As code where that is of use, and never with a path of the manager."""
    names = agent_program.further_modules("call")
    sent = marshal.loads(zlib.decompress(agent_program.packed_modules(names, tag)))
    assert set(sent) == names
    for name, module in sent.items():
        as_text = name in agent_program._AS_TEXT or tag == "cpython-38"
        assert isinstance(module, str if as_text else CodeType)
    assert str(FOLDER).encode() not in zlib.decompress(agent_program.packed_modules(names, tag))
    assert str(FOLDER).encode() not in zlib.decompress(agent_program.payload(False, tag).partition(b"\n")[2])


def test_what_another_version_has_compiled_is_not_sent(tmp_path: Path) -> None:
    """One that was installed since the texts were read: agents are of one version."""
    with changed(tmp_path, ("ports", "def nonce(", "def nonce(")):
        assert "nonce" in agent_program._compiled("ports").co_names
        read_again()
        agent_program._modules()
        module = tmp_path / "agent" / "ports.py"
        module.write_text("another = 1\n")
        assert "nonce" in agent_program._compiled("ports").co_names
        read_again()
        agent_program._modules()
        module.unlink()
        assert "another" in agent_program._compiled("ports").co_names


def test_first_requests_bring_no_modules() -> None:
    """One that was renamed would be another one."""
    of_the_agent = {"at_manager_end", "listen", "ping", "session", "stop"}
    assert of_the_agent | set(operations.HANDLERS) >= FIRST
    assert not any(agent_program.further_modules(operation) for operation in FIRST)


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
