"""Links that drop at the worst of moments: while they are made, brought back, or a new agent is prepared."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lazycluster.agent import wire
from lazycluster.core import event_loop
from lazycluster.exceptions import ConnectionLostError, LazyclusterError
from lazycluster.ssh import connection as connection_module
from lazycluster.ssh import link as link_module
from lazycluster.ssh import ssh_connection
from lazycluster.ssh.link import AgentLink
from lazycluster.ssh.local_connection import LocalConnection
from lazycluster.ssh.mux import Direction, Forward, MuxError
from lazycluster.ssh.ssh_connection import SshConnection

FORWARDS = [Forward(Direction.REMOTE, 24300 + number, 24400 + number) for number in range(3)]


class Ended:
    """A process that has ended."""

    errors = ""

    async def end(self, patience: float = 1.0) -> None:
        """It has."""


class Returning(SshConnection):
    """One whose agents say nothing, over sockets; each attempt succeeds.

    Args:
        renewed: Whether there is a new agent each time.
    """

    def __init__(self, renewed: bool, **settings: float) -> None:
        super().__init__("host", settings)
        self._process = Ended()  # type: ignore[assignment]
        self._renewed = renewed
        self._far: list[socket.socket] = []
        self.attempts = 0

    def drop(self) -> None:
        while self._far:
            self._far.pop().close()

    async def open(self) -> None:
        self._become("connecting")
        await self._attempt(1)
        self.grace = 60.0
        self._opened()

    async def _attempt(self, timeout: float) -> None:
        self.attempts += 1
        ours, theirs = socket.socketpair()
        self._far.append(theirs)
        fds = os.dup(ours.fileno()), ours.detach()
        if self._link is not None and not self._renewed:
            self._link.attach(*fds)
            return
        self._link = link = AgentLink(self.host, *fds, lambda error: self._ended(link, error))
        self.generation += 1

    async def _release_process(self) -> None:
        pass

    async def _reopen_forwards(self) -> None:
        pass

    async def _release(self) -> None:
        self.drop()

    async def start_another_agent(self) -> AgentLink:
        raise NotImplementedError

    async def open_copy_stream(self) -> socket.socket:
        raise NotImplementedError


async def back_or_lost(connection: Returning, attempts: int = 2) -> None:
    """Wait until it is, after so many attempts at least; whatever it was meanwhile."""
    changed = asyncio.Event()
    connection.on_state(lambda *_: changed.set())
    while connection.state != "lost" and (connection.state != "open" or connection.attempts < attempts):
        changed.clear()
        await changed.wait()


def with_connection(body: Callable[[Any], Awaitable[None]], renewed: bool = True, **settings: float) -> None:
    async def whole() -> None:
        connection = Returning(renewed, **settings)
        await connection.open()
        try:
            await body(connection)
        finally:
            if connection._link is not None:
                connection._link.lost("the test has ended")  # nobody answers that it has stopped
            await connection.close()

    event_loop.run(whole(), timeout=30)


def test_a_link_that_drops_while_a_new_agent_is_prepared_is_brought_back_and_that_done_again() -> None:
    async def body(connection: Returning) -> None:
        begun: list[int] = []

        async def prepare() -> None:
            begun.append(connection.generation)
            if len(begun) == 1:
                connection.drop()
                await asyncio.Event().wait()  # for an answer that does not come

        connection.on_renewal.append(prepare)
        connection.drop()
        await back_or_lost(connection)
        assert (connection.state, begun, connection.attempts) == ("open", [2, 3], 3)

    with_connection(body, reconnect=15)


def test_a_new_agent_is_prepared_however_long_that_takes() -> None:
    async def body(connection: Returning) -> None:
        async def prepare() -> None:
            await asyncio.sleep(1.2)

        connection.on_renewal.append(prepare)
        connection.drop()
        await back_or_lost(connection)
        assert connection.state == "open"

    with_connection(body, reconnect=1)


def test_what_cannot_be_prepared_is_tried_again_and_then_told() -> None:
    async def body(connection: Returning) -> None:
        tries: list[int] = []

        async def prepare() -> None:
            tries.append(connection.generation)
            raise LazyclusterError("no such module")

        connection.on_renewal.append(prepare)
        connection.drop()
        await back_or_lost(connection)
        assert len(tries) > 1 and set(tries) == {2}
        assert "no such module" in connection.why

    with_connection(body, reconnect=1)


@pytest.mark.parametrize("how", ["at once", "when it is told that it is open"])
def test_a_link_that_has_dropped_before_it_is_open_is_brought_back(how: str) -> None:
    async def body(connection: Returning) -> None:
        def drop(state: str, _: str) -> None:
            if state == "open" and connection.attempts == 2:
                connection.drop()

        attempt = connection._attempt

        async def dropping(timeout: float) -> None:
            await attempt(timeout)
            if connection.attempts == 2:
                connection.drop()
                while connection._link is not None and connection._link.is_attached:
                    await asyncio.sleep(0.01)

        if how == "at once":
            connection._attempt = dropping  # type: ignore[method-assign]
        else:
            connection.on_state(drop)
        connection.drop()
        await back_or_lost(connection, attempts=3)
        assert connection.state == "open" and connection._link is not None and connection._link.is_attached

    with_connection(body, renewed=False)


def test_an_agent_that_ends_right_after_its_hello_is_lost() -> None:
    async def whole() -> None:
        connection = LocalConnection()
        bring_up = connection._bring_up

        async def short(process: Any, marker: str) -> None:
            await bring_up(process, marker)
            os.kill(connection.agent_info.pid, signal.SIGKILL)
            while connection._link is not None and connection._link.is_attached:
                await asyncio.sleep(0.01)

        connection._bring_up = short  # type: ignore[method-assign]
        await connection.open()
        with pytest.raises(ConnectionLostError):
            await asyncio.wait_for(connection.request("ping"), 15)
        await connection.close()

    event_loop.run(whole(), timeout=60)


def test_whoever_starts_an_agent_that_ends_meanwhile_is_told_at_once() -> None:
    async def body(connection: Returning) -> None:
        connection._reconnecting = asyncio.ensure_future(asyncio.Event().wait())  # type: ignore[arg-type]
        read, write = os.pipe()
        other = AgentLink("host", read, os.dup(write), lambda error: connection._ended(other, error))
        os.close(write)
        other.detach()
        connection._ended(other, None)
        with pytest.raises(ConnectionLostError):
            await asyncio.wait_for(other.started, 5)
        connection._reconnecting.cancel()

    with_connection(body)


def test_what_an_agent_said_before_it_stopped_listening_is_heard() -> None:
    async def body(connection: Returning) -> None:
        link = connection._link
        assert link is not None
        channel = link.open_channel("stop", {})
        far = connection._far[0]
        far.sendall(wire.json_frame(1, wire.RESULT, {"ok": True}))
        connection.drop()
        link.send_heartbeat()  # to nobody
        assert await channel.result() == {}

    with_connection(body, renewed=False)


@pytest.mark.parametrize("closed", [False, True])
def test_a_link_that_nobody_listens_to_ends_even_if_the_other_way_does_not(
    closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_LAST_WORDS", 0.01)

    async def whole() -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        link = AgentLink("host", ours_in, ours_out, ended.set_result)
        os.close(theirs_in)
        for _ in range(2):
            link.send_heartbeat()
        if closed:
            link.detach()
        else:
            assert isinstance(await asyncio.wait_for(ended, 10), BrokenPipeError)
        await asyncio.sleep(0.05 if closed else 0)
        assert ended.done() is not closed
        assert not link.is_attached
        os.close(theirs_out)

    asyncio.run(whole())


def test_an_agent_that_ends_without_a_word_when_it_is_asked_to_stop_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "_STOP_PATIENCE", 1000.0)

    async def body(connection: Returning) -> None:
        closing = asyncio.ensure_future(connection.close())
        await asyncio.sleep(0)
        connection.drop()
        await asyncio.wait_for(closing, 10)

    with_connection(body, renewed=False, link_timeout=1000)


class FakeMux:
    """One that answers all with the same."""

    forwards: tuple[Forward, ...] = ()

    def __init__(self, answer: MuxError, then: Callable[[], None]) -> None:
        self._answer = answer
        self._then = then

    async def open_forwards(self, forwards: list[Forward]) -> list[MuxError]:
        self._then()
        return [self._answer] * len(forwards)


@pytest.mark.parametrize(
    ("refused", "drops", "left"), [(False, True, FORWARDS), (False, False, FORWARDS), (True, False, [])]
)
def test_ports_are_given_up_only_if_they_are_refused(
    refused: bool, drops: bool, left: list[Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_connection, "_PORTS_LIMIT", 60.0 if drops else 0.0)

    async def whole() -> None:
        connection = SshConnection("host")
        read, write = os.pipe()
        connection._link = link = AgentLink("host", read, write, lambda _: None)
        connection._mux = FakeMux(  # type: ignore[assignment]
            MuxError("no", refused), link.detach if drops else lambda: None
        )
        connection._forwards = {forward.key: forward for forward in FORWARDS}
        try:
            if refused:
                await connection._reopen_forwards()
            else:
                with pytest.raises(ConnectionLostError):
                    await asyncio.wait_for(connection._reopen_forwards(), 15)
        finally:
            link.detach()
        assert list(connection._forwards.values()) == left

    event_loop.run(whole())
