"""Standard input for many hosts that cannot be kept."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest

from lazycluster.cli.streams import SharedInput
from lazycluster.exceptions import LazyclusterError


class Command:
    """A command that takes what it is given."""

    async def send(self, data: bytes) -> None:
        pass

    async def send_end(self) -> None:
        pass


def test_a_full_directory_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, bytes(1000))
    os.close(writing)

    async def body() -> None:
        shared = SharedInput()
        assert shared._file is not None
        shared._file.close()
        shared._file = open("/dev/full", "w+b", buffering=0)  # noqa: SIM115  (closed by `close`)
        channel: Any = Command()
        try:
            with pytest.raises(LazyclusterError, match=r"cannot pass on standard input: .*No space left"):
                await asyncio.wait_for(shared.feed(channel), 60)
        finally:
            shared.close()

    with open(reading, "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        asyncio.run(body())
