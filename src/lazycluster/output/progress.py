"""Progress of what takes long: a line or bars on a terminal, a bar in a notebook, nothing elsewhere.

Code that does something reports it with a `Progress`. The thread that waits for it shows it, on a `Board`: so nothing
is written while nobody waits, and a notebook shows it below the right cell.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lazycluster.core import event_loop, interruptible
from lazycluster.exceptions import printable
from lazycluster.utils import Environment

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = [
    "Board",
    "Progress",
    "RelayedProgress",
    "can_be_shown",
    "in_notebook",
    "present",
    "relay_to",
    "shown",
]

T = TypeVar("T")

_SILENT = 2.0  # seconds; what is done sooner is not shown
_EVERY = 0.25  # seconds
_NAMED = 3  # of those that are waited for
_RATED = 30.0  # seconds over which the rate of a bar is taken

# Referred to weakly: Ctrl-C may come before a ``with`` block has taken its board back, and then nobody else does.
_board: ContextVar[weakref.ref[Board] | None] = ContextVar("lazycluster progress", default=None)


class Progress:
    """The progress of one thing; a context manager that lasts as long as it does.

    Args:
        what: What is done, e.g. ``Connecting``. Several with the same name, at once, are shown as one.
        total: How much there is to do, None if that is not known.
        unit: What is counted, e.g. ``hosts``, or ``B`` for bytes.
        waiting: Returns the names of those that are waited for.
        bar: Whether it has a bar of its own on a terminal, in place of a part of the line.
        style: The colour of its name beside that.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        unit: str = "",
        waiting: Callable[[], Iterable[str]] | None = None,
        *,
        bar: bool = False,
        style: str = "",
    ) -> None:
        self.what, self.unit = what, unit
        self.total, self.done = total, 0.0
        self.bar, self.style = bar, style
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
    """Everything that a thread waits for, shown as one thing.

    Args:
        wanted: Whether anything is shown; None: as `Environment.progress` says.
        of: Other boards, of which it shows everything.
        console: Standard error, if others print to it meanwhile.
    """

    def __init__(
        self, wanted: bool | None = None, of: Sequence[Board] = (), console: Callable[[], Console] | None = None
    ) -> None:
        self.wanted = Environment.progress if wanted is None else wanted
        self._console = console
        self._own: list[Progress] = []
        self._others = of
        self._begin = time.monotonic()
        self._display: _Display | None = None

    def add(self, part: Progress) -> None:
        """Show one more thing."""
        self._own.append(part)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Board]:
        """Show what is begun meanwhile in this context, and in coroutines that are started from it."""
        outer, mine = _board.get(), weakref.ref(self)
        try:
            _board.set(mine)
            yield self
        finally:
            if _board.get() is mine:  # else this is done late, when what Ctrl-C has left behind is thrown away
                _board.set(outer)

    def result(self, future: interruptible.Future[T], timeout: float | None = None) -> T:
        """Wait for a future and return its result; what takes long is shown."""
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
            self._display = _display(self._console) if self.wanted else _NoDisplay()
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
        everything = [part for board in (self, *self._others) for part in list(board._own)]
        parts, bars = ([part for part in everything if part.bar is kind] for kind in (False, True))
        names = list(dict.fromkeys(part.what for part in parts if at_end or not part.is_over))
        if self._display is not None and (names or bars):
            text, share = _described(names, parts)
            text = f"{text} ({_duration(time.monotonic() - self._begin)})" if names else ""
            self._display.show(text, share, [bar for bar in bars if not bar.is_over])

    def close(self) -> None:
        """Show the last state, or remove what is shown."""
        if self._display is not None:
            self._tell(at_end=True)
            self._display.close()
            self._display = None


def _surrounding() -> Board | None:
    """Return the board of the surrounding ``with`` block, or of that in which this coroutine was started."""
    reference = _board.get()
    return None if reference is None else reference()


def _all_done(futures: Sequence[interruptible.Future[Any]], timeout: float | None) -> bool:
    end = None if timeout is None else time.monotonic() + timeout
    return all(future.wait(None if end is None else max(0.0, end - time.monotonic())) for future in futures)


@contextlib.contextmanager
def shown(wanted: bool | None = None, console: Callable[[], Console] | None = None) -> Iterator[Board]:
    """Show the progress of what is waited for in the ``with`` block, as one thing.

    Args:
        wanted: Whether anything is shown; None: as the surrounding block says, or `Environment.progress`.
        console: Standard error, if others print to it meanwhile.
    """
    outer = _surrounding()
    if outer is not None and (wanted is not False or not outer.wanted):
        yield outer
        return
    board = Board(wanted, console=console)
    with board.in_use():
        try:
            yield board
        finally:
            board.close()


event_loop.wait_with(shown)


def present() -> Board:
    """Return a board for work that goes on after the present call: it is shown when that is waited for."""
    outer = _surrounding()
    return Board(None if outer is None else outer.wanted)


# --- texts ---------------------------------------------------------------------------------------
def _described(names: Sequence[str], parts: Sequence[Progress]) -> tuple[str, float | None]:
    """Return the text for the things with some names, and the share of the last one that is done."""
    texts, share = [], None
    for name in names:
        text, share = _of_one_kind(name, [part for part in parts if part.what == name])
        texts.append(text)
    return ": ".join(texts), share


def _of_one_kind(name: str, parts: Sequence[Progress]) -> tuple[str, float | None]:
    counted, share = _count(parts)
    text = f"{name}: {counted}" if counted else name
    waiting = [other for part in parts if not part.is_over for other in part.waiting()]
    if waiting:
        named = ", ".join(waiting[:_NAMED]) + (", ..." if len(waiting) > _NAMED else "")
        text += f"; waiting for {named}"
    return text, share


def _count(parts: Sequence[Progress]) -> tuple[str, float | None]:
    """Return how much is done of how much, as text and as a share, if that is known."""
    unit = parts[0].unit
    done = sum(part.done for part in parts)
    totals = [part.total for part in parts if part.total is not None]
    if not totals:
        return ((size(done) if unit == "B" else f"{done:g} {unit}") if done else ""), None
    total = max(sum(totals), done)
    known = len(totals) == len(parts)
    if unit == "B":
        text = f"{size(done)} of {size(total)}{'' if known else '...'}"
    else:
        text = f"{done:g} of {total:g} {unit}".rstrip()
    return text, (done / total if total and known else None)


def size(count: float) -> str:
    """Return a number of bytes as people read it: ``1.5 MB``."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


# --- displays ------------------------------------------------------------------------------------
class _Display(Protocol):
    def show(self, text: str, share: float | None, bars: Sequence[Progress]) -> None: ...

    def close(self) -> None: ...


class _NoDisplay:
    def show(self, text: str, share: float | None, bars: Sequence[Progress]) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Remove nothing."""


class _TerminalDisplay:
    """Lines on standard error that are removed at the end."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._rates: dict[Progress, deque[tuple[float, float]]] = {}
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def show(self, text: str, share: float | None, bars: Sequence[Progress]) -> None:
        from rich.console import Group

        shown = ([self._line(text)] if text else []) + ([self._table(bars)] if bars else [])
        self._update(Group(*shown) if shown else "")

    def _line(self, text: str) -> RenderableType:
        from rich.text import Text

        width = self._width()
        line = Text(printable(f"lazycluster: {text}").replace("\n", " "))
        if line.cell_len > width:
            line.truncate(width - 3)
            line.append("...")
        return line

    def _table(self, bars: Sequence[Progress]) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1, 0, 0))
        table.width = self._width()
        for ratio in (None, 1, None, None, None):
            table.add_column(ratio=ratio, no_wrap=True)
        for bar in bars:
            name = Text(printable(bar.what).replace("\n", " "), style=bar.style)
            table.add_row(name, ProgressBar(bar.total, bar.done), _count([bar])[0], *self._rate(bar))
        return table

    def _width(self) -> int:
        return self._live.console.width - 3  # with room for the ^C of a person, which would begin another line

    def _rate(self, bar: Progress) -> tuple[str, str]:
        """Return how much comes in a second, and the time that is left."""
        now, known = time.monotonic(), self._rates.setdefault(bar, deque())
        known.append((now, bar.done))
        while now - known[0][0] > _RATED:
            known.popleft()
        since, before = known[0]
        rate = (bar.done - before) / (now - since) if bar.done > before else 0.0
        if not rate:
            return "", ""
        return f"{size(rate)}/s", "" if bar.total is None else f"{_duration((bar.total - bar.done) / rate)} left"

    def _update(self, renderable: RenderableType) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            self._live.update(renderable, refresh=True)

    def close(self) -> None:
        self._update("")  # of what is higher than the terminal, the end of `Live` would leave a part
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()


class _NotebookDisplay:
    """A bar below the cell; its last state stays, as that of other bars in notebooks does."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._last = ""

    def show(self, text: str, share: float | None, bars: Sequence[Progress]) -> None:
        self._last = printable(text)
        value = "" if share is None else f' value="{min(1.0, share):.3f}"'
        self._put(f'<progress max="1"{value} style="vertical-align:middle"></progress>&ensp;')

    def close(self) -> None:
        if self._last:
            self._put("")

    def _put(self, bar: str) -> None:
        import html

        from IPython.display import display

        data = {
            "text/plain": self._last,
            "text/html": f'<div style="opacity:.8">{bar}<span>{html.escape(self._last)}</span></div>',
        }
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class _RelayedDisplay:
    """Texts for another process, which shows them; "" at the end."""

    def __init__(self, send: Callable[[str], Any]) -> None:
        self._send = send

    def show(self, text: str, share: float | None, bars: Sequence[Progress]) -> None:
        self._send(text)

    def close(self) -> None:
        self._send("")


_relay: Callable[[str], Any] | None = None


def relay_to(send: Callable[[str], Any] | None) -> None:
    """Have the progress of this process shown by another one, by a function that gets its texts; None: by nobody."""
    global _relay
    _relay = send


class RelayedProgress:
    """The progress of another process, shown here: a context manager whose `show` takes its texts."""

    def __init__(self, wanted: bool | None = None) -> None:
        self._wanted = Environment.progress if wanted is None else wanted
        self._display: _Display | None = None

    def show(self, text: str) -> None:
        """Show a text in the place of the last one; "" for nothing."""
        if not text:
            self.close()
        elif self._wanted:
            self._display = self._display or _display(None)
            self._display.show(text, None, ())

    def close(self) -> None:
        """Remove what is shown."""
        display, self._display = self._display, None
        if display is not None:
            display.close()

    def __enter__(self) -> RelayedProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _display(console: Callable[[], Console] | None) -> _Display:
    if _relay is not None:
        return _RelayedDisplay(_relay)
    if in_notebook():
        return _NotebookDisplay()
    return _TerminalDisplay((console or _standard_error)()) if can_be_shown() else _NoDisplay()


def can_be_shown() -> bool:
    """Return whether standard error is a terminal that can show progress, and may."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    except (AttributeError, ValueError):  # there is no standard error, or it was closed
        return False


def _standard_error() -> Console:
    from rich.console import Console

    class StandardError(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False  # a cursor that is hidden would stay so if the process is killed

        def on_broken_pipe(self) -> None:
            """Do not end the process, as rich does."""

    return StandardError(file=sys.stderr, force_terminal=True, force_jupyter=False, highlight=False, markup=False)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook. Imports nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None
