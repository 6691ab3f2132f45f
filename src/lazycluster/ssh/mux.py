"""A client of OpenSSH's multiplexing protocol for the control socket of a master.

A process per forwarding (``ssh -O forward``) costs some 4 ms each and tells little about what happened. Here many
forwardings go over a few connections to the master, and each is answered on its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias, TypeVar

from lazycluster.exceptions import LazyclusterError

from .mux_wire import MuxClient, MuxReply, MuxRequest, Reader, pack

__all__ = ["LOOPBACK", "Direction", "Forward", "Mux", "MuxError", "MuxSession"]

T = TypeVar("T")

LOOPBACK = "127.0.0.1"

TIMEOUT = 30.0
"""Seconds until a master that does not answer is given up. It answers at once, and a host after one round trip: the
seconds are for a host that is busy, and more than ssh itself needs to notice a dead one."""

# The master reads one request of each of its clients in turn, and the requests of one client wait for the host's
# answers, one by one.
_CLIENTS = 4
_WORTH_A_CLIENT = 4
_PIPELINE = 128  # so many requests fit into the buffer of a socket, even while the master reads none of them
_GONE = (EOFError, OSError, asyncio.TimeoutError)
_REST_LIMIT = 1.0  # seconds for the rest of a command's output, which the host may send after the exit status


class MuxError(LazyclusterError):
    """A master refused a request, or could not be asked.

    Attributes:
        refused: Whether it (or the host) said no, rather than not answering.
    """

    def __init__(self, message: str, refused: bool = True) -> None:
        self.refused = refused
        super().__init__(message)


Answer: TypeAlias = "tuple[int, Reader] | MuxError"


class Direction(IntEnum):
    """Side on which a forwarding listens: this machine (``-L``) or the host (``-R``)."""

    LOCAL = 1
    REMOTE = 2


@dataclass(frozen=True)
class Forward:
    """A forwarding: connections to a port are carried on to a port of the other side.

    Attributes:
        direction: Which side listens.
        listen_port: The port that listens; 0 lets the host choose, for ``REMOTE`` only.
        connect_port: The port on the other side.
        listen_host: The address that listens.
        connect_host: The address that is connected to, as the other side sees it.
    """

    direction: Direction
    listen_port: int
    connect_port: int
    listen_host: str = LOOPBACK
    connect_host: str = LOOPBACK

    def fields(self) -> tuple[int | str, ...]:
        """Return it as the protocol wants it."""
        return (int(self.direction), self.listen_host, self.listen_port, self.connect_host, self.connect_port)

    def __str__(self) -> str:
        of = "the host" if self.direction is Direction.REMOTE else "the manager"
        return f"port {self.listen_port} of {of}"

    @property
    def key(self) -> tuple[Any, ...]:
        """Identity of the forwarding for a master: its listener, or, where the host chooses the port, both ends."""
        listener = (self.direction, self.listen_host, self.listen_port)
        return listener if self.listen_port else (*listener, self.end)

    @property
    def end(self) -> tuple[str, int]:
        """Address that it leads to."""
        return self.connect_host, self.connect_port


class MuxSession:
    """A command on the host, on the connection of a master, with descriptors of ours as its stdio.

    It must be held as long as it lasts: the master ends a session whose client has gone.
    """

    def __init__(self, client: MuxClient, session_id: int) -> None:
        self._client = client
        self._id = session_id

    async def wait(self) -> int:
        """Wait for the end of the command and of what it printed; may be called once.

        Returns:
            Its exit status; 255 if the connection ended first.
        """
        status = 255
        try:
            while True:
                kind, reader = await self._client.receive()
                if kind == MuxReply.EXIT and reader.u32() == self._id:
                    status = reader.u32()
                    break
            await asyncio.wait_for(self._client.receive(), _REST_LIMIT)  # the master closes when all has been passed on
        except _GONE:
            pass
        finally:
            self.close()
        return status

    def close(self) -> None:
        """Give the session up: the master closes its ends of the descriptors, and the command sees end of file."""
        self._client.close()


class Mux:
    """A multiplexing master that listens on a control socket. To be used on one event loop."""

    def __init__(self, control_path: str, *, timeout: float = TIMEOUT) -> None:
        """Prepare; nothing is connected yet, and no connection is kept: an idle one keeps a master from ending.

        Args:
            control_path: The control socket.
            timeout: Seconds to wait for an answer.
        """
        self.control_path = control_path
        self.timeout = timeout
        self._ids = itertools.count(1)
        self._slots = asyncio.Semaphore(_CLIENTS)
        self._background: set[asyncio.Future[Any]] = set()
        self._open: dict[tuple[Any, ...], Forward] = {}
        self._leads: dict[tuple[Any, ...], list[tuple[str, int]]] = {}

    @property
    def forwards(self) -> list[Forward]:
        """The open forwardings."""
        return list(self._open.values())

    async def check(self) -> int:
        """Return the process id of the master.

        Raises:
            MuxError: If it does not answer.
        """
        kind, reader = await self._single(MuxRequest.ALIVE_CHECK)
        if kind != MuxReply.ALIVE:
            raise MuxError(f"unexpected answer {kind:#x} of the master on {self.control_path}")
        return reader.u32()

    async def terminate(self) -> None:
        """End the master and all that it forwards, now. No error if it has ended already."""
        # The master tends to be gone before its answer is sent.
        with contextlib.suppress(MuxError):
            await self._single(MuxRequest.TERMINATE)

    async def open_forwards(self, forwards: Sequence[Forward]) -> list[int | MuxError]:
        """Open forwardings, many at once.

        If this is cancelled, what was opened is closed.

        Args:
            forwards: What to open.

        Returns:
            For each the port that listens, or why none does.
        """
        # The master goes on with what it has been sent: a request that is forgotten half-way would leave a listener
        # that nobody knows. So it is always settled, and undone after.
        opening = self._in_background(self._open_all(list(forwards)))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._in_background(self._undo(opening, list(forwards)))
            raise

    async def close_forwards(self, forwards: Sequence[Forward]) -> list[MuxError | None]:
        """Close forwardings: connections through them go on, but their ports no longer listen.

        ssh does not wait for the host: a port on the host may still listen for a round trip's time.

        Args:
            forwards: What to close, exactly as it was opened (with port 0 where the host chose).

        Returns:
            For each None, or why it is not closed.
        """
        return await asyncio.shield(self._in_background(self._close_all(list(forwards))))

    async def new_session(self, command: str, stdin: int, stdout: int, stderr: int) -> MuxSession:
        """Run a command on the host.

        Args:
            command: For the login shell on the host.
            stdin: A descriptor. It and the others are duplicated, and may be closed on return. The master makes what
                they refer to non-blocking.
            stdout: A descriptor.
            stderr: A descriptor.

        Returns:
            The session.

        Raises:
            MuxError: If the host refuses, e.g. because of its ``MaxSessions``, or the master does not answer.
        """
        no_escape = 0xFFFFFFFF
        body = ("", 0, 0, 0, 0, no_escape, "", command)
        return await self._open_session(MuxRequest.NEW_SESSION, body, (stdin, stdout, stderr))

    async def connect(self, port: int, stdin: int, stdout: int, host: str = LOOPBACK) -> MuxSession:
        """Connect to a port as the host sees it, without a port that listens here.

        Args:
            port: The port.
            stdin: A descriptor that is read for what is to be sent; it and the other are duplicated.
            stdout: A descriptor that what is received is written to.
            host: The address that the host is to connect to.

        Returns:
            What ends the connection.

        Raises:
            MuxError: If the host cannot or must not connect, or the master does not answer.
        """
        return await self._open_session(MuxRequest.NEW_STREAM, ("", host, port), (stdin, stdout))

    async def aclose(self) -> None:
        """Wait until nothing is under way in the background."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _open_session(
        self, request: MuxRequest, body: tuple[int | str, ...], descriptors: Sequence[int]
    ) -> MuxSession:
        client = await self._connect()
        try:
            return await asyncio.wait_for(self._start(client, request, body, descriptors), self.timeout)
        except _GONE as error:
            client.close()
            raise self._lost(error) from error
        except BaseException:
            client.close()
            raise

    async def _start(
        self, client: MuxClient, request: MuxRequest, body: tuple[int | str, ...], descriptors: Sequence[int]
    ) -> MuxSession:
        number = next(self._ids)
        await client.send(pack(request, number, *body))
        for descriptor in descriptors:
            await client.send_descriptor(descriptor)
        while True:
            kind, reader = await client.receive()
            if reader.u32() != number:
                continue
            if kind == MuxReply.SESSION_OPENED:
                return MuxSession(client, reader.u32())
            if kind in (MuxReply.FAILURE, MuxReply.DENIED):
                hint = " (its MaxSessions?)" if request is MuxRequest.NEW_SESSION else ""
                raise MuxError(f"the host refused{hint}: {reader.text()}")

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _undo(self, opening: asyncio.Task[list[int | MuxError]], forwards: list[Forward]) -> None:
        results = await opening
        await self._close_all([f for f, result in zip(forwards, results, strict=True) if isinstance(result, int)])

    async def _open_all(self, forwards: list[Forward]) -> list[int | MuxError]:
        results: list[int | MuxError] = [MuxError("it is forwarded already")] * len(forwards)
        fresh = []
        for index, forward in enumerate(forwards):
            # The master says "ok" to a forwarding that it has, and whoever closes it first closes it for both.
            if forward.key not in self._open:
                self._open[forward.key] = forward
                self._leads.setdefault(forward.key, []).append(forward.end)
                fresh.append(index)
        answers = await self._ask_all(MuxRequest.OPEN_FORWARD, [forwards[index] for index in fresh])
        for index, answer in zip(fresh, answers, strict=True):
            results[index] = result = await self._opened(forwards[index], answer)
            if isinstance(result, MuxError):
                self._open.pop(forwards[index].key, None)
        return results

    async def _opened(self, forward: Forward, answer: Answer) -> int | MuxError:
        result = _port(forward, answer)
        if forward.direction is Direction.LOCAL or forward.listen_port == 0:
            self._leads.pop(forward.key, None)
            return result
        # When the host has refused a port (it was taken), ssh keeps the entry that says where the port leads to; if the
        # port is forwarded later, connections go to where the first, refused request led. Closing removes the oldest
        # entry of the port: so that is done until ours is the oldest.
        leads = self._leads[forward.key]
        while isinstance(result, int) and leads[0] != forward.end:
            closed = (await self._ask_all(MuxRequest.CLOSE_FORWARD, [forward]))[0]
            if (error := _error(closed)) is not None:
                return error
            leads.pop(0)
            leads.append(forward.end)
            result = _port(forward, (await self._ask_all(MuxRequest.OPEN_FORWARD, [forward]))[0])
        return result

    async def _close_all(self, forwards: list[Forward]) -> list[MuxError | None]:
        results = []
        for forward, answer in zip(forwards, await self._ask_all(MuxRequest.CLOSE_FORWARD, forwards), strict=True):
            results.append(error := _error(answer))
            if error is None:
                self._open.pop(forward.key, None)
                leads = self._leads.get(forward.key, [])
                del leads[:1]
                if not leads:
                    self._leads.pop(forward.key, None)
        return results

    async def _single(self, request: MuxRequest) -> tuple[int, Reader]:
        answer = (await self._batch(request, [()]))[0]
        if isinstance(answer, MuxError):
            raise answer
        if (error := _error(answer)) is not None:
            raise error
        return answer

    async def _ask_all(self, request: MuxRequest, forwards: list[Forward]) -> list[Answer]:
        bodies = [forward.fields() for forward in forwards]
        clients = max(1, min(_CLIENTS, len(bodies) // _WORTH_A_CLIENT))
        parts = await asyncio.gather(*(self._batch(request, bodies[n::clients]) for n in range(clients)))
        answers: list[Answer] = [MuxError("not asked", refused=False)] * len(bodies)
        for number, part in enumerate(parts):
            answers[number::clients] = part
        return answers

    async def _batch(self, request: MuxRequest, bodies: list[tuple[int | str, ...]]) -> list[Answer]:
        answers: list[Answer] = []
        if not bodies:
            return answers
        async with self._slots:
            try:
                client = await self._connect()
            except MuxError as error:
                return [error] * len(bodies)
            try:
                for start in range(0, len(bodies), _PIPELINE):
                    answers += await self._pipeline(client, request, bodies[start : start + _PIPELINE])
            finally:
                client.close()
        return answers

    async def _pipeline(
        self, client: MuxClient, request: MuxRequest, bodies: list[tuple[int | str, ...]]
    ) -> list[Answer]:
        waiting = {next(self._ids): index for index in range(len(bodies))}
        answers: list[Answer] = [MuxError("not answered", refused=False)] * len(bodies)
        messages = b"".join(pack(request, number, *bodies[index]) for number, index in waiting.items())
        try:
            await asyncio.wait_for(client.send(messages), self.timeout)
            while waiting:
                kind, reader = await asyncio.wait_for(client.receive(), self.timeout)
                index = waiting.pop(reader.u32(), -1)
                if index >= 0:
                    answers[index] = kind, reader
        except _GONE as error:
            for index in waiting.values():
                answers[index] = self._lost(error)
        return answers

    async def _connect(self) -> MuxClient:
        try:
            return await asyncio.wait_for(MuxClient.connect(self.control_path), self.timeout)
        except _GONE as error:
            raise self._lost(error) from error

    def _lost(self, error: BaseException) -> MuxError:
        why = f"no answer within {self.timeout:g} s" if isinstance(error, asyncio.TimeoutError) else str(error)
        return MuxError(f"the ssh process of this connection does not answer: {why}", refused=False)


def _error(answer: Answer) -> MuxError | None:
    if isinstance(answer, MuxError):
        return answer
    kind, reader = answer
    if kind in (MuxReply.FAILURE, MuxReply.DENIED):
        return MuxError(reader.text())
    return None


def _port(forward: Forward, answer: Answer) -> int | MuxError:
    if (error := _error(answer)) is not None:
        return error
    assert not isinstance(answer, MuxError)
    kind, reader = answer
    return reader.u32() if kind == MuxReply.REMOTE_PORT else forward.listen_port
