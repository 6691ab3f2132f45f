"""What login shells print before Python has started."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from lazycluster.core import event_loop
from lazycluster.ssh.start_marker import StartError, skip_to_marker

_MARKER = b"\nlazy0123 "


def _read(*said: bytes) -> bytes:
    ours, theirs = socket.socketpair()

    def say() -> None:
        with theirs:
            for part in said:
                theirs.sendall(part)

    thread = threading.Thread(target=say)
    with ours:
        thread.start()
        try:
            event_loop.run(asyncio.wait_for(skip_to_marker(ours, _MARKER), 30))
            assert ours.getblocking()
            return b"".join(iter(lambda: ours.recv(65536), b""))
        finally:
            thread.join()


@pytest.mark.parametrize(
    "noise",
    [b"", b"noise", b"\n", b"\n\n", b"\nlazy", b"\nlazy0123", b"\nlazy0123 x\n", b"\nla\nlazy0123 \r", b"x" * 99],
)
def test_nothing_is_read_but_the_noise(noise: bytes) -> None:
    assert _read(noise + _MARKER + b"\nthe rest\n") == b"the rest\n"
    assert _read(noise, _MARKER[:4], _MARKER[4:], b"\n", b"\nlazy0123 \n") == b"\nlazy0123 \n"


def test_a_stream_without_a_mark() -> None:
    with pytest.raises(StartError, match="no such file"):
        _read(b"python3: no such file")
