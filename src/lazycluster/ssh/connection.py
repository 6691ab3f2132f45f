"""The connection to one host: a process that brings an agent there, and the link to that agent."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError, LazyclusterError

from .link import AgentLink, Bytes, Channel, Event
from .process import WatchedProcess
from .program import OLDEST_PYTHON, expected, payload

State = Literal["new", "connecting", "open", "interrupted", "lost", "closed"]

logger = logging.getLogger("lazycluster")

HEARTBEAT = 20.0  # seconds; the agent ends everything after it has heard nothing for 15 of these
STOP_PATIENCE = 6.0  # seconds that the agent gets to end what it started
_NOISE_LIMIT = 1024 * 1024


@dataclass(frozen=True)
class Hello:
    """What the agent says about its host when it has started."""

    python: tuple[int, int, int]
    executable: str
    pid: int
    uid: int
    user: str
    home: str
    shell: str
    hostname: str
    directory: str
    identity: str
    platform: str
    boot_id: str
    machine_id: str
    network: str
    path: str

    @classmethod
    def parse(cls, message: dict[str, Any]) -> Hello:
        """Make one from the agent's message.

        Raises:
            ValueError: If it makes no sense.
        """
        kinds = {"python": list, "pid": int, "uid": int}
        values: dict[str, Any] = {field.name: message.get(field.name) for field in fields(cls)}
        wrong = [name for name, value in values.items() if not isinstance(value, kinds.get(name, str))]
        python = [part for part in message.get("python") or () if isinstance(part, int)]
        if wrong or len(python) != 3:
            raise ValueError(f"the agent says of its host what makes no sense: {', '.join(wrong or ['python'])}")
        return cls(**{**values, "python": tuple(python)})


StateCallback = Callable[[State, str], Any]


class StartError(Exception):
    """The agent did not start.

    Attributes:
        output: What came instead of the agent's mark.
        status: The exit status of the process, None if it still ran.
    """

    def __init__(self, output: str, status: int | None) -> None:
        self.output = output
        self.status = status
        super().__init__(output)


class Connection(abc.ABC):
    """The connection to one host. All methods are for the event loop's thread, unless they say otherwise.

    Attributes:
        host: The host as the user named it.
        why: Why it is in its state, where that is not what was asked for: what interrupted it, or how it was lost.
        generation: Which agent it leads to: it grows when the host has lost the one before, and all that this one ran.
        on_lost: Called when the connection is lost (not when it is closed), with the reason.
    """

    local = False

    def __init__(self, host: str) -> None:
        self.host = host
        self.why = ""
        self.generation = 0
        self._state: State = "new"
        self._state_callbacks: list[StateCallback] = []
        self.on_lost: list[Callable[[str], Any]] = []
        self._owner = os.getpid()
        self._process: WatchedProcess | None = None
        self._link: AgentLink | None = None
        self._hello: Hello | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._gone: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self.at_close: list[Callable[[], Any]] = []

    @property
    def state(self) -> State:
        """What it is: ``new``, ``connecting``, ``open``, ``interrupted``, ``lost`` or ``closed``.

        An interrupted one can be used: what runs goes on, and what is asked for is answered when the host can be
        reached again. It becomes ``open`` then, or ``lost`` if that takes too long. May be read from any thread.
        """
        return self._state

    def on_state(self, callback: StateCallback) -> Callable[[], None]:
        """Have a function called with the new state and the reason (or "") whenever the state changes, on the loop.

        Returns:
            What ends that; calling it again does nothing.
        """
        self._state_callbacks.append(callback)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._state_callbacks.remove(callback)

        return forget

    def _become(self, state: State, why: str = "") -> None:
        if state == self._state:
            return
        self._state, self.why = state, why
        for callback in list(self._state_callbacks):
            try:
                callback(state, why)
            except Exception:
                logger.exception("%s: whoever watches the connection failed", self.host)

    # --- what the kinds of connection differ in ------------------------------------------------
    @abc.abstractmethod
    async def open(self) -> None:
        """Connect and start the agent.

        Raises:
            InvalidRuntimeError: If that fails, with the reason.
        """

    @abc.abstractmethod
    async def bulk(self) -> socket.socket:
        """Return a blocking stream to a new process on the host that copies files; closing it ends that process."""

    async def _release(self) -> None:  # noqa: B027  (most have nothing)
        """Let go of what `open` took, after the process has ended."""

    # --- the agent -----------------------------------------------------------------------------
    @property
    def hello(self) -> Hello:
        """What is known of the host."""
        if self._hello is None:
            raise LazyclusterError(f"{self.host}: not connected")
        return self._hello

    def check(self) -> None:
        """Raise an error if the connection cannot be used. May be called from any thread."""
        if os.getpid() != self._owner:
            raise LazyclusterError(
                f"{self.host}: this runtime belongs to the process {self._owner}; a forked child cannot use it. "
                "Make a new Runtime in the child"
            )
        if self.state == "lost":
            raise ConnectionLostError(self.host, self._why())
        if self.state not in ("open", "interrupted"):
            raise LazyclusterError(f"{self.host}: the runtime was closed (cleanup() was called); make a new one")

    def channel(
        self,
        op: str,
        params: dict[str, Any] | None = None,
        *,
        stdout: Bytes | None = None,
        stderr: Bytes | None = None,
        output: Bytes | None = None,
        event: Event | None = None,
    ) -> Channel:
        """Send a request whose answers go to the functions given, as they come."""
        self.check()
        assert self._link is not None
        return self._link.open_channel(op, params or {}, stdout, stderr, output, event)

    async def request(self, op: str, **params: Any) -> dict[str, Any]:
        """Send a request and wait for its result.

        Raises:
            AgentError: If the agent answers with an error.
            ConnectionLostError: If the connection ends before.
        """
        channel = self.channel(op, params)
        try:
            return await channel.result()
        except asyncio.CancelledError:
            channel.close()
            raise

    # --- starting ------------------------------------------------------------------------------
    async def _bring_up(self, process: WatchedProcess, marker: str) -> None:
        """Start the agent through a process whose output is a shell's, until the agent's mark."""
        self._process = process
        fd_in, fd_out = process.take_streams()
        try:
            os.set_blocking(fd_in, False)
            version, tag, rest = await self._read_mark(fd_in, expected(marker), process)
            if version < OLDEST_PYTHON:
                text = ".".join(map(str, version))
                oldest = ".".join(map(str, OLDEST_PYTHON))
                raise InvalidRuntimeError(
                    self.host,
                    "python",
                    f"the host's Python is {text}, but {oldest} or newer is needed",
                    f'name a newer one with python="/path/to/python{oldest}"',
                )
        except BaseException:
            os.close(fd_in)
            os.close(fd_out)
            raise
        self._link = AgentLink(self.host, fd_in, fd_out, self._ended, rest)
        self._link.send_soon(payload(self.local, tag))
        try:
            self._hello = Hello.parse(await self._link.hello)
        except ValueError as error:
            raise InvalidRuntimeError(self.host, "protocol", str(error)) from None
        except ConnectionLostError:
            status = await process.exited if process.exited.done() else None
            raise StartError("the agent did not start", status) from None

    async def _read_mark(self, fd: int, mark: bytes, process: WatchedProcess) -> tuple[tuple[int, ...], str, bytes]:
        """Read until the mark's line; returns the version and the cache tag that it tells, and what came after."""
        loop = asyncio.get_running_loop()
        seen = bytearray()
        found: asyncio.Future[tuple[tuple[int, ...], str, bytes]] = loop.create_future()

        def readable() -> None:
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            seen.extend(data)
            start = seen.find(mark)
            end = seen.find(b"\n", start + len(mark)) if start >= 0 else -1
            if end >= 0:
                loop.remove_reader(fd)
                numbers, _, tag = seen[start + len(mark) : end].decode("ascii", "replace").partition(" ")
                version = tuple(int(part) for part in numbers.split(".") if part.isdigit())
                found.set_result((version, tag, bytes(seen[end + 1 :])))
            elif not data or len(seen) > _NOISE_LIMIT:
                loop.remove_reader(fd)
                found.set_exception(StartError("", None))

        loop.add_reader(fd, readable)
        try:
            return await found
        except StartError:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.exited), 1.0)
            status = process.exited.result() if process.exited.done() else None
            raise StartError(seen[-4096:].decode("utf-8", "replace"), status) from None
        except asyncio.CancelledError:
            loop.remove_reader(fd)
            self._noise = seen[-4096:].decode("utf-8", "replace")
            raise

    _noise = ""

    def _opened(self) -> None:
        self._become("open")
        self._beat()

    def _beat(self) -> None:
        if self._link is not None and self._link.is_open:
            self._link.open_channel("ping", {})
            self._heartbeat = asyncio.get_running_loop().call_later(HEARTBEAT, self._beat)

    # --- ending --------------------------------------------------------------------------------
    def _ended(self, error: Exception | None) -> None:
        """Handle the end of the agent's streams: find out why, then tell everyone who waits."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self.state == "open":
            self._become("interrupted", str(error) if error else "the host closed it")
            self._gone = asyncio.get_running_loop().create_task(self._lost())
        elif self._link is not None:
            self._link.fail_channels(self._why() if self.state == "lost" else "the connection was closed")

    async def _lost(self) -> None:
        assert self._process is not None and self._link is not None
        await self._process.end()  # it usually has ended; its last words are the reason
        self._become("lost", self._why())
        self._link.fail_channels(self._why())
        for tell in list(self.on_lost):
            tell(self._why())
        for call in self.at_close:
            call()
        await self._release()

    def _why(self) -> str:
        lines = [line.strip() for line in (self._process.errors if self._process else "").splitlines()]
        said = "; ".join(line for line in lines[-3:] if line)
        return said or "the agent on the host has ended"

    async def close(self) -> None:
        """End everything on the host, then the connection. Doing it again does nothing."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._gone is not None:
            await self._gone
            self._become("closed")
            return
        was_open = self.state == "open"
        self._become("closed")
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        for call in self.at_close:
            call()
        link = self._link
        if was_open and link is not None and link.is_open:
            with contextlib.suppress(LazyclusterError, asyncio.TimeoutError):
                await asyncio.wait_for(link.open_channel("stop", {}).result(), STOP_PATIENCE)
        await self._hang_up()
        await self._release()

    async def _hang_up(self) -> None:
        if self._link is not None:
            self._link.lost(None)
            self._link.fail_channels("the connection was closed")
        if self._process is not None:
            await self._process.end(self._patience())

    def _patience(self) -> float:
        """Seconds that the process gets to end by itself before it is terminated."""
        return 2.0
