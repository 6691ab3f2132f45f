"""Passing of descriptors over unix sockets."""

from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazycluster.agent import descriptors

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def _open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_descriptors_come_with_their_bytes_and_are_not_inherited(pair: Pair) -> None:
    read, write = os.pipe()
    assert descriptors.send(pair[0], [read, write], b"word") == 4
    data, fds = descriptors.receive(pair[1], 2)
    assert data == b"word"
    assert not any(map(os.get_inheritable, fds))
    os.write(fds[1], b"x")
    assert os.read(read, 1) == b"x"
    for fd in (read, write, *fds):
        os.close(fd)


def test_bytes_alone_and_the_end_of_the_stream(pair: Pair) -> None:
    descriptors.send(pair[0], [], b"word")
    assert descriptors.receive(pair[1], 2) == (b"word", [])
    pair[0].close()
    assert descriptors.receive(pair[1], 2) == (b"", [])


def test_more_than_are_wanted_are_refused_altogether(pair: Pair) -> None:
    before = _open_files()
    descriptors.send(pair[0], [0] * 9, b"word")
    assert descriptors.receive(pair[1], 2) == (b"word", [])
    assert _open_files() == before


def test_those_that_come_although_files_run_out_are_closed(pair: Pair) -> None:
    before = _open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors.send(pair[0], [0, 0, 0], b"word")
    free = min(set(range(1024)) - set(map(int, before)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # room for one of the three
    try:
        received = descriptors.receive(pair[1], 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert received == (b"word", [])
    assert _open_files() == before


def test_control_data_that_end_in_the_middle_of_a_number() -> None:
    read, write = os.pipe()

    class Connection:
        def recvmsg(self, *_: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
            payload = struct.pack("2i", read, write)[:-1]
            return b"word", [(socket.SOL_SOCKET, socket.SCM_RIGHTS, payload)], 0, None

    assert descriptors.receive(Connection(), 2) == (b"word", [read])  # type: ignore[arg-type]
    os.close(read)
    os.close(write)


def test_a_connection_to_nobody_leaves_nothing_open(tmp_path: Path) -> None:
    before = _open_files()
    with pytest.raises(OSError, match="No such file"):
        descriptors.send_to(str(tmp_path / "none"), [0], b"word")
    assert _open_files() == before
