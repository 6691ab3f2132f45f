"""What a host says of itself steers no terminal, and cannot be taken for a line about another host."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lazycluster.cli
from lazycluster.cli import console, fanout, streams
from lazycluster.cli.commands import cleanup, configuration, copy, doctor, env, runtimes
from lazycluster.cli.diagnosis import Diagnosis
from lazycluster.cli.fanout import HostOutcome
from lazycluster.cli.options import Targets
from lazycluster.core import event_loop
from lazycluster.environments.cache import HostCache, KeptEnvironment, Removal
from lazycluster.exceptions import one_line, printable
from lazycluster.output.progress import Board

_CLI = Path(lazycluster.cli.__file__).parent
_EVIL = "x\nhost2: fine\r\n\x1b[2J\u202ehost2  active\x85host2 \u2028host2\thost2"


@pytest.fixture(autouse=True)
def fresh_consoles() -> Any:
    """Those that print to what pytest has put there."""
    for make in (console.output, console.errors):
        make.cache_clear()
    yield
    for make in (console.output, console.errors):
        make.cache_clear()


def _shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    text = out + err
    assert text and not re.search(r"[^\n\t\x20-\x7e]", text), ascii(text)
    return text.split("\n")


def _only_about_host1(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _shown(capsys)
    assert any("host2" in line for line in lines)  # it is shown, but as what it is
    assert not [line for line in lines if line.startswith(("host2", " host2"))], lines


def test_one_line() -> None:
    assert one_line("a\tb\nc\r\nd\x1be\u2029") == r"a\tb\nc\nd\x1be\u2029"
    assert one_line("caf\u00e9 \u4e2d") == "caf\u00e9 \u4e2d"
    assert printable("a\nb") == "a\nb"


def test_errors_of_copies(capsys: pytest.CaptureFixture[str]) -> None:
    copies = copy.Copying(["host1"], Board(False), quiet=True)
    result = SimpleNamespace(files=0, bytes=0, skipped=0, seconds=0.0, left_out=(_EVIL,), unused=())
    copies.add("host1", result)  # type: ignore[arg-type]
    copies.done(HostOutcome("host1", 1, f"cannot copy: {_EVIL}\n  Next step: none", "error"))
    _only_about_host1(capsys)


@pytest.mark.parametrize("kind", ["lines", "gather"])
def test_errors_of_commands(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    shown = streams.printer(kind, ["host1"], True)
    outcome = HostOutcome("host1", 1, _EVIL, "error")

    async def work() -> None:
        shown.done(outcome)

    shown.during(work())
    shown.finish([outcome])
    lines = _shown(capsys)
    assert not [line for line in lines if line.startswith(("host2", " host2"))], lines


def test_list_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    listing = runtimes._Listing(Targets(["host1"]), True)
    listing.infos["host1"] = {"latency": 0.1, "os": _EVIL, "python_version": _EVIL, "gpus": [{"name": _EVIL}]}
    listing.show(HostOutcome("host1"))
    assert len(capsys.readouterr().out.splitlines()) == 1
    outcome = HostOutcome("host1", 255, f"not usable as a runtime (lost): {_EVIL}", "unreachable")
    listing.show(outcome)
    listing.show(HostOutcome("host1"))
    listing.finish([outcome])
    _only_about_host1(capsys)
    watched = runtimes._Watched.__new__(runtimes._Watched)
    watched.info, watched.activity, watched.cpu = {"os": _EVIL, "python_version": _EVIL}, {"tasks": _EVIL}, "-"
    assert all("\n" not in text and "\x1b" not in text for text in runtimes._shown(watched).values())


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    diagnosis = Diagnosis("host1")
    for step, state in zip(diagnosis.steps, ("ok", "failed", "differs", "ok"), strict=False):
        diagnosis._set(step.name, state, _EVIL, _EVIL)
    doctor._show(diagnosis)
    _only_about_host1(capsys)


def test_environments(capsys: pytest.CaptureFixture[str]) -> None:
    kept = KeptEnvironment("host1", _EVIL, _EVIL, _EVIL, _EVIL, {}, 1, 1.0, 1.0, False, _EVIL)
    env._show_cache(HostCache("host1", _EVIL, (kept,), 1))
    env._show_removal(Removal("host1", (), (_EVIL,), (_EVIL,)))
    assert len(_shown(capsys)) == 6
    console.tell(_EVIL)
    console.show_error("\n".join(console.lines_of(f"host1: {_EVIL}")))
    cleanup._show("host1", {"processes": [{"pid": 1, "command": _EVIL}], "directories": [_EVIL]})
    _only_about_host1(capsys)


def test_add_runtime_with_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    agent_info = SimpleNamespace(user=_EVIL, hostname=_EVIL, python=(3, 13, 0))

    async def answered(chosen: Targets, work: Any) -> list[HostOutcome]:
        return [await work(SimpleNamespace(host="host1", agent_info=agent_info))]

    monkeypatch.setattr(fanout, "everywhere", answered)
    assert configuration._check("host1", None, False) == 0
    assert len(_shown(capsys)) == 3
    assert event_loop.get_loop() is not None


def test_lines_are_printed_in_one_place() -> None:
    """Other ways to print a line do not look at what is in it."""
    found = set()
    for path in _CLI.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("echo", "secho"):
                found.add(path.name)
    assert found == {"console.py", "completion.py"}  # the latter: programs for shells
