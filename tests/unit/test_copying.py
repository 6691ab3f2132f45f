"""What `put` and `get` say, beside their bars."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from lazycluster.cli import copy_progress, fanout
from lazycluster.cli.commands import copy, runtimes
from lazycluster.cli.fanout import HostOutcome
from lazycluster.cli.options import Targets
from lazycluster.core import event_loop
from lazycluster.output import progress
from lazycluster.ssh.transfer import TransferResult


@pytest.mark.parametrize("piped", [False, True])
def test_bars_do_not_overwrite_what_is_said(piped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    consoles = {
        name: Console(file=file, force_terminal=terminal, highlight=False)
        for name, file, terminal in (("output", out, not piped), ("errors", err, True))
    }
    for name, console in consoles.items():
        monkeypatch.setattr(copy_progress, name, lambda console=console: console)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with copy_progress.Copying(["host1", "host2"], quiet=False) as copies:
        for host in ("host1", "host2"):
            show = copies.progress(host)
            assert show is not None
            show(1, 3, 0)
        result = TransferResult(path="x", files=1, bytes=3_000_000, sent=1, skipped=0, seconds=2.0)
        copies.add("host1", result)
        copies.done(HostOutcome("host1"))
        copies.done(HostOutcome("host2", 1, "cannot copy: x\n  Next step: none", "error"))
    said, shown = out.getvalue(), err.getvalue()
    assert "host1: 1 file, 2.9M in 2.0 s, 1.4M/s" in (said if piped else shown)
    assert said if piped else not said  # of two that write to one terminal, one does not know of the other's lines
    assert "cannot copy: x" in shown
    assert shown.endswith("\r\x1b[1A\x1b[2K")  # nor does an empty line stay where the bars were


def test_what_left_nothing_out_anywhere_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with copy_progress.Copying(["host1", "host2"], quiet=True) as copies:
        for host, unused in (("host1", ("a", "b\n")), ("host2", ("b\n", "c")), ("host2", ("a", "b\n", "c"))):
            copies.add(host, TransferResult("x", 0, 0, 0, 0, 0.0, unused=unused))
            copies.done(HostOutcome(host))
    copies.warn(["a", "b\n", "b\n", "c", "d"])
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == ["--exclude 'b\\n' left nothing out: it is a name, or a path below what is copied"]


def test_of_copies_that_failed_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    copy_progress.Copying(["host1"], quiet=True).warn(["a"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["put", "list-runtimes"])
def test_nothing_else_says_how_far_it_is_on_the_same_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    displays = []

    def display() -> progress._NoDisplay:
        displays.append(command)
        return progress._NoDisplay()

    async def slow(*_: object) -> list[HostOutcome]:
        await asyncio.sleep(0.05)
        return [HostOutcome("host1")]

    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setattr(progress, "_display", display)
    monkeypatch.setattr(fanout, "everywhere", slow)
    monkeypatch.setattr(runtimes._Watched, "follow", slow)
    targets = Targets(["host1"])
    assert (copy._copy(targets, slow, 1, True) if command == "put" else runtimes._watch(targets, False)) == 0
    assert not displays
    event_loop.run(slow())
    assert displays  # where nothing else does
