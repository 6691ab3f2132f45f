"""What a forked child holds of its parent's connections: nothing. And the loop, which each process has of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable

import pytest

from lazycluster.core import event_loop, forks


def in_child(work: Callable[[], bool]) -> bool:
    """Return what a forked child finds."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def is_null(fd: int) -> bool:
    return os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev


def test_a_child_does_not_hold_what_is_not_for_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        forks.close_in_children(ours.fileno())
        assert in_child(lambda: is_null(ours.fileno()) and not is_null(theirs.fileno()))
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"


def test_a_child_of_a_child_holds_nothing_either() -> None:
    read, write = os.pipe()
    forks.close_in_children(write)
    assert in_child(lambda: in_child(lambda: is_null(write)))
    os.close(read)
    os.close(write)


def test_a_file_with_the_number_of_one_that_was_closed_is_kept() -> None:
    read, write = os.pipe()
    forks.close_in_children(read, write)
    os.close(read)
    other = os.open("/proc/self/stat", os.O_RDONLY)
    assert other == read
    assert in_child(lambda: is_null(write) and bool(os.read(other, 10)))
    os.close(other)
    os.close(write)


def test_the_loop_can_be_asked_for_while_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a finalizer, if garbage is collected just then."""
    monkeypatch.setattr(event_loop, "_running", {})
    make, nested = asyncio.new_event_loop, []

    def collecting() -> asyncio.AbstractEventLoop:
        if not nested:
            nested.append(None)
            nested[0] = event_loop.get_loop()  # type: ignore[call-overload]
        return make()

    monkeypatch.setattr(asyncio, "new_event_loop", collecting)
    found: list[asyncio.AbstractEventLoop] = []
    threads = [threading.Thread(target=lambda: found.append(event_loop.get_loop()), daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 8 and len({*found, *nested}) == 1
    assert asyncio.run_coroutine_threadsafe(asyncio.sleep(0, "it runs"), found[0]).result(20) == "it runs"
    found[0].call_soon_threadsafe(found[0].stop)


def test_a_child_has_a_loop_of_its_own() -> None:
    loop = event_loop.get_loop()

    def own() -> bool:
        return event_loop.get_loop() is not loop and event_loop.run(asyncio.sleep(0, "it runs")) == "it runs"

    assert in_child(own)
    assert event_loop.get_loop() is loop
