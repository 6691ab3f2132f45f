"""Progress: on a terminal, in a notebook, nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lazycluster import Environment
from lazycluster.core import event_loop, interruptible
from lazycluster.output import progress as _progress
from lazycluster.output.progress import Board, Progress, shown
from terminals import screens


class Terminal(io.StringIO):
    """A terminal that knows when something was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: dict[str, threading.Event] = {}

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        number = super().write(text)
        for part, event in self.wanted.items():
            if part in text:
                event.set()
        return number

    async def has(self, text: str) -> None:
        event = self.wanted.setdefault(text, threading.Event())
        while not event.is_set():
            await asyncio.sleep(0.005)

    @property
    def lines(self) -> list[str]:
        """Whatever stood on its one line."""
        shown = screens(self.getvalue())
        assert not any(line for lines in shown for line in lines[1:])
        return [lines[0] for lines in shown if lines[0]]

    @property
    def is_clean(self) -> bool:
        return self.getvalue() != "" and not any(screens(self.getvalue())[-1])


def _use(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    # Between the set-up of a test and its call, pytest puts streams of its own into the real `sys`.
    monkeypatch.setattr(_progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    stream = Terminal()
    monkeypatch.setattr(_progress, "_SILENT", 0.0)
    monkeypatch.setattr(_progress, "_EVERY", 0.01)
    _use(monkeypatch, stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    yield stream


async def _connect(terminal: Terminal, *, until: str) -> str:
    left = ["host1", "host2", "host3", "host4", "host5"]
    with Progress("Connecting", 5, "hosts", lambda: left) as progress:
        left.pop(0)
        progress.advance()
        await terminal.has(until)
    return "connected"


def test_a_terminal_shows_how_far_it_is_and_is_clean_afterwards(terminal: Terminal) -> None:
    assert event_loop.run(_connect(terminal, until="host2, host3, host4, ...")) == "connected"
    assert terminal.lines[0] == "lazycluster: Connecting: 1 of 5 hosts; waiting for host2, host3, host4, ... (0 s)"
    assert terminal.is_clean


def test_a_line_is_never_longer_than_the_terminal_is_wide(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    event_loop.run(_connect(terminal, until="..."))
    assert {len(line) for line in terminal.lines} == {37}  # and ^C


def test_names_cannot_steer_the_terminal(terminal: Terminal) -> None:
    async def work() -> None:
        with Progress("Connecting", 1, "hosts", lambda: ["\033]0;owned\007\nhost"]):
            await terminal.has("owned")

    event_loop.run(work())
    assert "\\x1b]0;owned\\x07 host" in terminal.lines[0]
    assert terminal.is_clean


def test_what_is_quick_is_not_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "_SILENT", 60.0)

    async def quick() -> int:
        with Progress("Connecting", 5):
            return 7

    assert event_loop.run(quick()) == 7
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("how", ["file", "closed", "none", "dumb", "setting", "block"])
def test_nothing_is_shown_where_it_is_not_wanted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    stream: Any = terminal
    if how == "file":
        stream = io.StringIO()
    elif how == "none":
        stream = None
    elif how == "closed":
        stream = Terminal()
        stream.close()
    elif how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif how == "setting":
        monkeypatch.setattr(Environment, "progress", False)
    _use(monkeypatch, stream)

    async def work() -> str:
        with Progress("Connecting", 5):
            await asyncio.sleep(0.05)  # some times as long as it takes until something is shown
            return "done"

    with shown(False if how == "block" else None), shown():
        assert event_loop.run(work()) == "done"
    assert terminal.getvalue() == ""
    if how == "file":
        assert stream.getvalue() == ""


def test_ends_are_what_they_were_without_it(terminal: Terminal) -> None:
    async def fails() -> None:
        with Progress("Connecting", 1):
            await terminal.has("Connecting")
            raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        event_loop.run(fails())

    async def lasts() -> None:
        with Progress("Sending", 1):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match="not done within"):
        event_loop.run(lasts(), timeout=0.05)
    assert terminal.is_clean


def test_an_interrupted_wait_cleans_the_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    async def lasts() -> None:
        with Progress("Sending", 1):
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    show = _progress._TerminalDisplay.show
    shows = iter([show, show])

    def interrupted(self: Any, *state: Any) -> None:
        try:
            next(shows)(self, *state)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(_progress._TerminalDisplay, "show", interrupted)
    with pytest.raises(KeyboardInterrupt), shown():
        try:
            event_loop.run(lasts())
        finally:
            monkeypatch.setattr(_progress._TerminalDisplay, "show", show)
    assert ended.is_set()
    assert terminal.is_clean


def test_several_waits_are_one_thing(terminal: Terminal) -> None:
    async def workers() -> None:
        with Progress("workers", 3) as progress:
            progress.advance(2)
            await terminal.has("2 of 3")

    with shown(), Progress("Starting the cluster"):
        event_loop.run(asyncio.sleep(0.01))
        event_loop.run(workers())
    assert terminal.lines[0].startswith("lazycluster: Starting the cluster (")
    assert terminal.lines[-1].startswith("lazycluster: Starting the cluster: workers: ")


def test_copies_to_many_hosts_are_summed_up_also_for_those_that_have_ended(terminal: Terminal) -> None:
    board = Board()
    ended: list[Progress] = []
    with board.in_use():
        for done, total in ((1_500_000, 1_500_000), (500_000, 1_500_000), (0, None)):
            part = Progress("Sending data.csv", unit="B")
            part.__enter__()
            part.set(done, total)
            ended.append(part)
    ended[0].__exit__()
    future: interruptible.Future[None] = interruptible.Future()
    joint = Board(True, [board])
    assert not joint.wait([future], timeout=0.05)
    joint.close()
    assert terminal.lines[0].startswith("lazycluster: Sending data.csv: 2.0 MB of 3.0 MB...")
    future.set_result(None)
    assert joint.wait([future])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (150_000, "150 KB"), (2.5e9, "2.5 GB"), (7e15, "7000.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert _progress.size(count) == text


def test_whenever_ctrl_c_comes_nothing_of_it_stays() -> None:
    """Between any two steps: what is waited for later is no part of what was interrupted."""

    def interrupted(step: int) -> bool:
        left = step

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename in (_progress.__file__, contextlib.__file__):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with shown():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    step = 1
    while interrupted(step):
        assert _progress._surrounding() is None, step
        step += 1
    assert step > 20
