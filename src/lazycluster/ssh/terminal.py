"""Asking a person on the terminal, without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import termios
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeAlias

from lazycluster.exceptions import printable

__all__ = ["Asker", "ask_on_terminal", "ask_through", "is_asking", "when_answered"]

Asker: TypeAlias = Callable[[str, bool], Awaitable["str | None"]]
"""Asks a person a question, which may be secret; returns None if nobody answers."""

_LONGEST = 4096

_open = 0  # questions
_held: list[Callable[[], Any]] = []
_asker: Asker | None = None


def ask_through(asker: Asker | None) -> None:
    """Have a person asked by something else than this process's terminal, which it may not have."""
    global _asker
    _asker = asker


def is_asking() -> bool:
    """Return whether a question stands on the terminal, behind which nothing should be printed."""
    return _open > 0


def when_answered(call: Callable[[], Any]) -> None:
    """Call something as soon as no question is open: at once, or later. For the event loop's thread."""
    if is_asking():
        _held.append(call)
    else:
        call()


@contextlib.contextmanager
def _question() -> Iterator[None]:
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        while _held and not is_asking():
            _held.pop(0)()


@contextlib.contextmanager
def _echo_off(terminal: int) -> Iterator[None]:
    before = termios.tcgetattr(terminal)
    hidden = [*before]
    hidden[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


async def _read_line(terminal: int) -> str | None:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[str | None] = loop.create_future()

    def readable() -> None:
        try:
            line = os.read(terminal, _LONGEST)
        except OSError:
            line = b""
        if not done.done():
            # A terminal hands over whole lines; none at all is the end of the input (Ctrl-D).
            done.set_result(line.decode(errors="surrogateescape").rstrip("\r\n") if line else None)

    loop.add_reader(terminal, readable)
    try:
        return await done
    finally:
        loop.remove_reader(terminal)


async def ask_on_terminal(question: str, *, secret: bool) -> str | None:
    """Ask a person on the controlling terminal; one question at a time is the caller's business.

    Args:
        question: What to show.
        secret: Do not show what is typed.

    Returns:
        The line, or None if there is no terminal or the input ended.
    """
    if _asker is not None:
        return await _asker(question, secret)
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with _question(), _echo_off(terminal) if secret else contextlib.nullcontext():
            os.write(terminal, printable(question).encode(errors="replace"))  # a host may have put it
            try:
                return await _read_line(terminal)
            finally:
                if secret:
                    os.write(terminal, b"\n")
    except (OSError, termios.error):
        return None
    finally:
        os.close(terminal)
