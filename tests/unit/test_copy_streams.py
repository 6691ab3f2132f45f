"""The streams of one connection that wait for the next copy, where a host allows few of them."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

from lazycluster.ssh.extra_sessions import SessionRefusedError
from lazycluster.ssh.transfer import _StreamPool


def test_a_stream_that_is_given_back_while_the_host_refuses_another_one_is_used() -> None:
    """Nobody else has one then that could be waited for."""

    async def work() -> None:
        asked, refuse = asyncio.Event(), asyncio.Event()
        ours, theirs = socket.socketpair()
        answers = [ours]

        async def open_copy_stream() -> socket.socket:
            if answers:
                return answers.pop()
            asked.set()
            await refuse.wait()
            raise SessionRefusedError("it needs a further ssh session", "allow more")

        connection: Any = SimpleNamespace(
            at_close=[], on_lost=[], check=lambda: None, open_copy_stream=open_copy_stream
        )
        pool = _StreamPool(connection)
        first, _ = await pool.take(connection)
        second = asyncio.ensure_future(pool.take(connection))
        await asked.wait()
        pool.give_back(first, usable=True)
        refuse.set()
        assert await second == (ours, True)
        pool.give_back(ours, usable=False)
        theirs.close()

    asyncio.run(work())
