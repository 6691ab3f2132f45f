"""What `put` and `get` say, beside their bars."""

from __future__ import annotations

import asyncio
import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from lazycluster.cli import fanout
from lazycluster.cli.commands import copy, runtimes
from lazycluster.cli.fanout import HostOutcome
from lazycluster.cli.options import Targets
from lazycluster.core import event_loop
from lazycluster.output import progress
from lazycluster.ssh.transfer import TransferResult
from terminals import screens


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error."""
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return stream


@pytest.mark.parametrize("piped", [False, True])
def test_bars_do_not_overwrite_what_is_said(piped: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    consoles = {
        name: Console(file=file, force_terminal=is_terminal, highlight=False, width=100)
        for name, file, is_terminal in (("output", out, not piped), ("errors", terminal, True))
    }
    for name, console in consoles.items():
        monkeypatch.setattr(copy, name, lambda console=console: console)

    async def copied(copying: copy.Copying) -> None:
        for host in ("host1", "host2"):
            show = copying.progress(host)
            assert show is not None
            show(1, 3, 0)
        while "host2" not in terminal.getvalue():
            await asyncio.sleep(0.005)
        result = TransferResult(path="x", files=1, bytes=3_000_000, sent=1, skipped=0, seconds=2.0)
        copying.add("host1", result)
        copying.done(HostOutcome("host1"))
        copying.done(HostOutcome("host2", 1, "cannot copy: x\n  Next step: none", "error"))

    with progress.shown(console=lambda: consoles["errors"]) as board:
        event_loop.run(copied(copy.Copying(["host1", "host2"], board, quiet=False)))
    said, shown = out.getvalue(), terminal.getvalue().replace("\x1b[?25l", "").replace("\x1b[?25h", "")
    assert said if piped else not said  # of two that write to one terminal, one does not know of the other's lines
    kept = [line for line in screens(shown)[-1] if line]  # nor does an empty line stay where the bars were
    line = "host1: 1 file, 2.9M in 2.0 s, 1.4M/s"
    assert said.splitlines() == ([line] if piped else [])
    assert kept == [*([] if piped else [line]), "host2: cannot copy: x", "  Next step: none"]
    assert any(row.startswith("host1 ━") and row.endswith("1 B of 3 B") for rows in screens(shown) for row in rows)


def test_what_left_nothing_out_anywhere_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    copies = copy.Copying(["host1", "host2"], progress.Board(False), quiet=True)
    for host, unused in (("host1", ("a", "b\n")), ("host2", ("b\n", "c")), ("host2", ("a", "b\n", "c"))):
        copies.add(host, TransferResult("x", 0, 0, 0, 0, 0.0, unused=unused))
        copies.done(HostOutcome(host))
    copies.warn(["a", "b\n", "b\n", "c", "d"])
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == ["--exclude 'b\\n' left nothing out: it is a name, or a path below what is copied"]


def test_of_copies_that_failed_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    copy.Copying(["host1"], progress.Board(False), quiet=True).warn(["a"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["put", "list-runtimes"])
def test_nothing_else_says_how_far_it_is_on_the_same_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    displays = []

    def display(console: object) -> progress._NoDisplay:
        displays.append(console)
        return progress._NoDisplay()

    async def slow(*_: object) -> list[HostOutcome]:
        await asyncio.sleep(0.05)
        return [HostOutcome("host1")]

    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setattr(progress, "_display", display)
    monkeypatch.setattr(fanout, "everywhere", slow)
    monkeypatch.setattr(runtimes._Watched, "follow", slow)
    targets = Targets(["host1"])
    assert (copy._copy(targets, slow, 1, False) if command == "put" else runtimes._watch(targets, False)) == 0
    assert displays == ([copy.errors] if command == "put" else [])  # one, which knows what is printed beside it
    assert copy._copy(targets, slow, 1, True) == 0
    assert len(displays) == (command == "put")  # quiet
    event_loop.run(slow())
    assert displays[-1] is None  # where nothing else does
