"""One request to an agent, and what comes of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lazycluster.agent import wire
from lazycluster.core import memory_pressure
from lazycluster.exceptions import AgentError

from .agent_replies import check_answer, decoded

if TYPE_CHECKING:
    from .link import AgentLink

__all__ = ["Bytes", "Channel", "Event", "message_frame"]

_NONSENSE_SHOWN = 300  # characters

logger = logging.getLogger("lazycluster")

Bytes = Callable[[bytes], Any]
Event = Callable[[dict[str, Any]], Any]


def message_frame(number: int, kind: int, message: dict[str, Any]) -> bytes:
    """Return a frame with a message that is not sent in parts.

    Raises:
        ValueError: It is so long that the agent would take it for nonsense, and end with all that it runs.
    """
    frame = wire.json_frame(number, kind, message)
    size = len(frame) - wire.HEADER.size
    if size > wire.FROM_MANAGER:
        mebibytes = 1024 * 1024
        raise ValueError(
            f"a request of {size / mebibytes:.1f} MiB is too large: a command, its environment and the like may have "
            f"{wire.FROM_MANAGER // mebibytes} MiB together.\n"
            "  Next step: send what is large as a file (send_file), or as an argument of a function"
        )
    return frame


class Collected:
    """A binary result as it comes, in parts; it is given up if memory runs out and nothing else takes more.

    Attributes:
        held: How many bytes have come.
        channel: What they come through; it fails if they are given up.
    """

    def __init__(self) -> None:
        self.held = 0
        self.channel: Channel | None = None
        self._parts: list[bytes] = []
        memory_pressure.hold(self)

    def add(self, data: bytes) -> None:
        """Take a part."""
        self._parts.append(data)
        self.held += len(data)

    def taken(self) -> list[bytes]:
        """Return the parts, which are the caller's from now on."""
        parts, self._parts, self.held = self._parts, [], 0
        return parts

    def give_up(self, error: MemoryError) -> None:
        """Let go of what has come, and have whoever waits for the whole get an error."""
        self.taken()
        if self.channel is not None:
            self.channel.give_up(error)


class Channel:
    """The manager's side of one request, which the agent answers with output, events and one result."""

    def __init__(
        self,
        link: AgentLink,
        number: int,
        request: Mapping[str, Any],
        stdout: Bytes | None,
        stderr: Bytes | None,
        output: Bytes | None,
        event: Event | None,
    ) -> None:
        self._link = link
        self._number = number
        self._asked = {key: request[key] for key in ("op", "do", "action") if key in request}
        self._sinks = {wire.STDOUT: stdout, wire.STDERR: stderr, wire.OUTPUT: output}
        self._event = event
        self._credit = wire.WINDOW
        self._more_credit = asyncio.Event()
        self._done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def result(self) -> dict[str, Any]:
        """Wait for the end and return the fields of the result.

        Raises:
            AgentError: If the agent answered with an error.
            ConnectionLostError: If the connection ended before the answer came.
        """
        message = await asyncio.shield(self._done)
        if message.pop("ok", False) is True:
            try:
                check_answer(self._asked, message)
            except ValueError as error:
                raise self._nonsense(error) from None
            return message
        evidence = {key: value for key, value in message.items() if key not in ("error", "message")}
        raise AgentError(self._link.host, str(message.get("error")), str(message.get("message")), evidence)

    def _nonsense(self, error: Exception) -> AgentError:
        text = f"{type(error).__name__}: {error}"[:_NONSENSE_SHOWN]
        return AgentError(
            self._link.host,
            "protocol",
            f"its answer to {self._asked.get('op')!r} is invalid ({text}).\n"
            "  Next step: find out who has changed what runs on that host; our agent does not answer that",
        )

    async def ended(self, seconds: float) -> bool:
        """Wait for the end for so many seconds at most; returns whether it has come."""
        await asyncio.wait([self._done], timeout=seconds)
        return self._done.done()

    async def send(self, data: bytes | memoryview) -> None:
        """Send input, no faster than it is consumed. What comes after the channel's end is dropped."""
        view = memoryview(data)
        while view and not self._done.done():
            if not self._credit:
                self._more_credit.clear()
                await self._more_credit.wait()
                continue
            part = view[: min(self._credit, wire.MAX_PAYLOAD)]
            self._credit -= len(part)
            view = view[len(part) :]
            await self._link.send(wire.HEADER.pack(len(part), self._number, wire.INPUT), part)

    async def send_end(self) -> None:
        """Say that no more input comes."""
        if not self._done.done():
            await self._link.send(wire.frame(self._number, wire.INPUT_END))

    def control(self, **message: Any) -> None:
        """Say something about the work, e.g. ``signal="TERM"``."""
        if not self._done.done():
            self._link.send_soon(message_frame(self._number, wire.CONTROL, message))

    def close(self) -> None:
        """Drop the channel; the agent ends the work. Does nothing after the result has come."""
        if not self._done.done():
            self._abandon()
            self._done.cancel()

    def _abandon(self) -> None:
        self._link.send_soon(wire.json_frame(self._number, wire.CONTROL, {"abandon": True}))
        self._link.forget(self._number)
        self._more_credit.set()

    def received(self, kind: int, payload: bytes) -> None:
        """Handle one frame from the agent."""
        if kind == wire.RESULT:
            self._result(payload)
        elif kind == wire.CREDIT:
            self._credit += int.from_bytes(payload[:4], "big")
            self._more_credit.set()
        elif kind == wire.EVENT:
            if self._event is not None:
                self._take(self._tell, payload)
        else:
            sink = self._sinks.get(kind)
            if sink is not None and kind == wire.OUTPUT:
                self._take(sink, payload)
            elif sink is not None:
                sink(payload)

    def _result(self, payload: bytes) -> None:
        try:
            message = decoded(payload)  # what is no message leaves the channel to the end of the link
        except ValueError as error:
            self._link.forget(self._number)
            self.fail(self._nonsense(error))
            return
        self._link.forget(self._number)
        if not self._done.done():
            self._done.set_result(message)
        self._more_credit.set()

    def _tell(self, payload: bytes) -> None:
        assert self._event is not None
        self._event(decoded(payload))

    def _take(self, sink: Callable[[Any], Any], said: Any) -> None:
        """Hand on what has a form; if it has not, nobody may wait for what will not come."""
        try:
            sink(said)
        except (OSError, MemoryError, wire.FrameError):
            raise  # of a file here, or of this process; or it is no message at all
        except Exception as error:
            logger.debug("%s: the answer to a request cannot be handled", self._link.host, exc_info=True)
            self.give_up(self._nonsense(error))

    def give_up(self, error: Exception) -> None:
        """Drop the channel, which ends the work, with an error for whoever waits for its result."""
        if not self._done.done():
            self._abandon()
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the channel because the link has gone."""
        if not self._done.done():
            self._done.set_exception(error)
            self._done.exception()  # whoever waits gets it; that nobody does is no error
        self._more_credit.set()
