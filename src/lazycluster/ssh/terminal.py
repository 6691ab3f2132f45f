"""Asking a person on the terminal, without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import termios
from collections.abc import Iterator

__all__ = ["ask_on_terminal"]

_LONGEST = 4096


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
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with _echo_off(terminal) if secret else contextlib.nullcontext():
            os.write(terminal, question.encode(errors="replace"))
            try:
                return await _read_line(terminal)
            finally:
                if secret:
                    os.write(terminal, b"\n")
    except (OSError, termios.error):
        return None
    finally:
        os.close(terminal)
