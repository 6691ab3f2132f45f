"""How far things are that take long: a line on a terminal, a bar in a notebook, nothing elsewhere.

Whoever does something says how far it is, with a `Progress`. Whoever waits for it shows that: in the thread that waits
anyway, so that nothing is written while nobody waits, and a notebook shows it below the right cell.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import html
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from lazycluster.core import event_loop, interruptible
from lazycluster.exceptions import printable
from lazycluster.utils import Environment

__all__ = ["Board", "Progress", "present", "shown"]

T = TypeVar("T")

_SILENT = 2.0  # seconds; who waits shorter need not read anything
_EVERY = 0.25
_NAMED = 3  # of those that are waited for

# Referred to weakly: Ctrl-C may come before a ``with`` block has taken its board back, and then nobody else does.
_board: ContextVar[weakref.ref[Board] | None] = ContextVar("lazycluster progress", default=None)


class Progress:
    """How far one thing is; a context manager that lasts as long as it does.

    Args:
        what: What is done, e.g. ``Connecting``. Several with the same name, at once, are shown as one.
        total: How much there is to do, None if nobody knows.
        unit: What is counted, e.g. ``hosts``, or ``B`` for bytes.
        waiting: Returns the names of those that are waited for.
    """

    def __init__(
        self, what: str, total: float | None = None, unit: str = "", waiting: Callable[[], Iterable[str]] | None = None
    ) -> None:
        self.what, self.unit = what, unit
        self.total, self.done = total, 0.0
        self.is_over = False
        self._waiting = waiting

    def advance(self, number: float = 1) -> None:
        """Note that so much more is done."""
        self.done += number

    def set(self, done: float, total: float | None) -> None:
        """Note how much is done, of how much. May be called from any thread."""
        self.done, self.total = done, total

    def waiting(self) -> list[str]:
        """Return the names of those that are waited for."""
        return [] if self._waiting is None else list(self._waiting())

    def __enter__(self) -> Progress:
        board = _surrounding()
        if board is not None:
            board.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        self._waiting = None  # coroutines that go on have this in their context: it must not keep what was waited for


class Board:
    """What one waits for, and what is shown of it.

    Args:
        wanted: Whether anything is shown; None: as `Environment.progress` says.
        of: Other boards, of which it shows everything.
    """

    def __init__(self, wanted: bool | None = None, of: Sequence[Board] = ()) -> None:
        self.wanted = Environment.progress if wanted is None else wanted
        self._own: list[Progress] = []
        self._others = of
        self._begin = time.monotonic()
        self._display: _Display | None = None

    def add(self, part: Progress) -> None:
        """Show something more."""
        self._own.append(part)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Board]:
        """Have it show what is begun meanwhile in this context, and in coroutines that are started from it."""
        outer, mine = _board.get(), weakref.ref(self)
        try:
            _board.set(mine)
            yield self
        finally:
            if _board.get() is mine:  # else this is done late, when what Ctrl-C has left behind is thrown away
                _board.set(outer)

    def result(self, future: interruptible.Future[T], timeout: float | None = None) -> T:
        """Wait for a future and return its result, as it does itself; what takes long is shown."""
        if not self.wait([future], timeout):
            raise concurrent.futures.TimeoutError
        return future.result()

    def wait(self, futures: Sequence[interruptible.Future[Any]], timeout: float | None = None) -> bool:
        """Wait for futures; what takes long is shown.

        Returns:
            Whether all are done.
        """
        silent = self._silent()
        if timeout is not None and timeout <= silent:
            return _all_done(futures, timeout)
        if _all_done(futures, silent):
            return True
        return self._show_until(futures, None if timeout is None else timeout - silent)

    def _silent(self) -> float:
        return max(0.0, self._begin + _SILENT - time.monotonic())

    def _show_until(self, futures: Sequence[interruptible.Future[Any]], timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._display is None:
            self._display = _display() if self.wanted else _NoDisplay()
        every = None if isinstance(self._display, _NoDisplay) else _EVERY
        while True:
            self._tell()
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            step = min((seconds for seconds in (every, left) if seconds is not None), default=None)
            if _all_done(futures, step):
                return True
            if left is not None and step == left:
                return False

    def _tell(self, at_end: bool = False) -> None:
        parts = [part for board in (self, *self._others) for part in list(board._own)]
        names = list(dict.fromkeys(part.what for part in parts if at_end or not part.is_over))
        if self._display is not None and names:
            text, share = _said(names, parts)
            self._display.show(f"{text} ({_seconds(time.monotonic() - self._begin)})", share)

    def close(self) -> None:
        """Show the last state, or remove what is shown."""
        if self._display is not None:
            self._tell(at_end=True)
            self._display.close()
            self._display = None


def _surrounding() -> Board | None:
    """Return the board of the ``with`` block that this is in, or that this coroutine was started in."""
    reference = _board.get()
    return None if reference is None else reference()


def _all_done(futures: Sequence[interruptible.Future[Any]], timeout: float | None) -> bool:
    end = None if timeout is None else time.monotonic() + timeout
    return all(future.wait(None if end is None else max(0.0, end - time.monotonic())) for future in futures)


@contextlib.contextmanager
def shown(wanted: bool | None = None) -> Iterator[Board]:
    """Show how far things are while they are waited for in the ``with`` block, as one thing.

    Args:
        wanted: Whether anything is shown; None: as the surrounding block says, or `Environment.progress`.
    """
    outer = _surrounding()
    if outer is not None and (wanted is not False or not outer.wanted):
        yield outer
        return
    board = Board(wanted)
    with board.in_use():
        try:
            yield board
        finally:
            board.close()


event_loop.wait_with(shown)


def present() -> Board:
    """Return a board for work that goes on after the present call: it is shown to whoever waits for that."""
    outer = _surrounding()
    return Board(None if outer is None else outer.wanted)


# --- what is said --------------------------------------------------------------------------------
def _said(names: Sequence[str], parts: Sequence[Progress]) -> tuple[str, float | None]:
    """Return what is said of the things with some names, and the share of the last one that is done."""
    texts, share = [], None
    for name in names:
        text, share = _of_one_kind(name, [part for part in parts if part.what == name])
        texts.append(text)
    return ": ".join(texts), share


def _of_one_kind(name: str, parts: Sequence[Progress]) -> tuple[str, float | None]:
    unit = parts[0].unit
    done = sum(part.done for part in parts)
    totals = [part.total for part in parts if part.total is not None]
    text, share = name, None
    if totals:
        total = max(sum(totals), done)
        known = len(totals) == len(parts)
        share = done / total if total and known else None
        if unit == "B":
            counted = f"{size(done)} of {size(total)}{'' if known else '...'}"
        else:
            counted = f"{done:g} of {total:g} {unit}".rstrip()
        text = f"{name}: {counted}"
    elif done:
        text = f"{name}: {size(done) if unit == 'B' else f'{done:g} {unit}'}"
    waiting = [other for part in parts if not part.is_over for other in part.waiting()]
    if waiting:
        named = ", ".join(waiting[:_NAMED]) + (", ..." if len(waiting) > _NAMED else "")
        text += f"; waiting for {named}"
    return text, share


def size(count: float) -> str:
    """Return a number of bytes as people read it: ``1.5 MB``."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


# --- where it is shown ---------------------------------------------------------------------------
class _Display(Protocol):
    def show(self, text: str, share: float | None) -> None: ...

    def close(self) -> None: ...


class _NoDisplay:
    def show(self, text: str, share: float | None) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Remove nothing."""


class _TerminalDisplay:
    """A line on standard error that is gone at the end."""

    def show(self, text: str, share: float | None) -> None:
        width = shutil.get_terminal_size().columns - 1
        line = printable(f"lazycluster: {text}").replace("\n", " ")
        _write(f"\r\033[K{line if len(line) <= width else line[: width - 3] + '...'}")

    def close(self) -> None:
        _write("\r\033[K")


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stderr.write(text)
        sys.stderr.flush()


class _NotebookDisplay:
    """A bar below the cell; its last state stays, as that of other bars in notebooks does."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._last = ""

    def show(self, text: str, share: float | None) -> None:
        self._last = printable(text)
        value = "" if share is None else f' value="{min(1.0, share):.3f}"'
        self._put(f'<progress max="1"{value} style="vertical-align:middle"></progress>&ensp;')

    def close(self) -> None:
        if self._last:
            self._put("")

    def _put(self, bar: str) -> None:
        from IPython.display import display

        data = {
            "text/plain": self._last,
            "text/html": f'<div style="opacity:.8">{bar}<span>{html.escape(self._last)}</span></div>',
        }
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _display() -> _Display:
    if in_notebook():
        return _NotebookDisplay()
    try:
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    except (AttributeError, ValueError):  # there is no standard error, or it was closed
        terminal = False
    return _TerminalDisplay() if terminal else _NoDisplay()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. Imports nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None
