"""Whoever reads the output of ``run`` slowly, or not at all for a while, holds its hosts back and loses nothing."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lazycluster.cli import streams
from lazycluster.cli.console import OutputGoneError
from lazycluster.cli.streams import Printer
from lazycluster.ssh.openssh import SshConnection
from patience import until

_GRACE = 3.0  # seconds without a word from its manager, after which a host ends everything
_SIZE = 40_000_000


async def _run(hosts: Any, out: Printer, command: str) -> dict[str, Any]:
    settings = {"config_file": hosts.config_file, "grace": _GRACE, "link_timeout": 2}
    connection = SshConnection("host1", settings)
    await connection.open()
    try:
        channel = connection.channel("run", {"command": command}, stdout=lambda data: out.output("host1", data))
        with out.reading(connection):
            return await channel.result()
    finally:
        assert connection.interruptions == 0
        await connection.close()


@contextlib.contextmanager
def _pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.FileIO]:
    """Have a pipe as standard output; gives the end to read from."""
    reading, writing = os.pipe()
    with io.FileIO(reading) as reader, open(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)  # not in a fixture: pytest sets its own again when the test begins
        yield reader
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), writing)  # for what has no reader any more


def test_a_pager_that_stands_still_for_longer_than_the_grace(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = streams.printer("lines", ["host1"], label=False)
    with ThreadPoolExecutor() as pool, _pipe(monkeypatch) as pipe:

        def read() -> int:
            total = len(pipe.read(1))
            time.sleep(2 * _GRACE + 1)  # it is this that is tested
            while total < _SIZE and (data := pipe.read(1 << 20)):
                total += len(data)
            return total

        reading = pool.submit(read)
        assert out.during(_run(hosts, out, f"yes 0123456789abcde | head -c {_SIZE}"))["exit"] == 0
        assert reading.result(60) == _SIZE


def test_a_pager_that_is_left_while_it_stands_still(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = streams.printer("lines", ["host1"], label=False)
    with ThreadPoolExecutor() as pool, _pipe(monkeypatch) as pipe:

        def leave() -> None:
            pipe.read(1)
            until(lambda: out._size >= streams._QUEUED, "more than is taken")
            pipe.close()

        leaving = pool.submit(leave)
        with pytest.raises(OutputGoneError):
            out.during(_run(hosts, out, "yes"))
        leaving.result(60)
    assert not hosts[0].processes()
