"""Frames to and from one agent: the manager's side of `agent/wire.py`."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lazycluster.agent import wire
from lazycluster.core import memory_pressure
from lazycluster.exceptions import ConnectionLostError, InvalidRuntimeError, printable
from lazycluster.output import log_limit
from lazycluster.utils import Environment

from .agent_program import further_modules, packed_modules, payload
from .agent_replies import decoded
from .channel import Bytes, Channel, Event, message_frame

_READ_SIZE = 256 * 1024
_HIGH_WATER = 1024 * 1024
_TURN = 0.005  # seconds for what one host says, before others have their turn
_NO_MEMORY_PAUSE, _NO_MEMORY_TRIES = 0.5, 10  # seconds between tries to handle what there is no memory for
_LAST_WORDS = 2.0  # seconds for what an agent said before it stopped listening
_ASK_EVERY = 0.5  # seconds between two questions to an agent that is waited for
_WARN_AGAIN = 60.0  # seconds without the same problem after which it is logged once more
_CRASH = 16 * 1024  # characters of an agent's traceback that are logged

logger = logging.getLogger("lazycluster")


class AgentLink:
    """Frames to and from one agent, over streams that may be replaced. Lives on the loop's thread.

    Args:
        host: The host, for messages.
        fd_in: What the agent says is read here.
        fd_out: What the agent is told is written here. The link owns both and closes them.
        on_ended: Called when the streams have ended, with the error if there was one.
        early: What was already read of the agent's stream.

    Attributes:
        started: Done with what the agent says first, of its host.
        heard: When something came from the agent, in the loop's time.
        is_held: Whether nobody listens to it at present, see `hold`.
        problem: What it said last of something that went wrong, and when, in the loop's time.
    """

    def __init__(
        self, host: str, fd_in: int, fd_out: int, on_ended: Callable[[Exception | None], Any], early: bytes = b""
    ) -> None:
        self.host = host
        self.started: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._decoder = wire.Decoder(wire.FROM_AGENT)
        self.problem = 0.0, ""
        self._acknowledged = 0  # of how many bytes the agent knows that they have arrived
        self._channels: dict[int, Channel] = {}
        self._next = 1
        self._outbox = wire.Outbox()
        self._writing = False
        self._closing: asyncio.TimerHandle | None = None  # since nobody reads what is written
        self._room = asyncio.Event()
        self._room.set()
        self._cache_tag = ""
        self._sent_modules: frozenset[str] = frozenset()
        self._sent_for: set[str] = set()  # requests whose modules the agent has
        self._lost_error: ConnectionLostError | None = None
        self._in = self._out = -1
        self.is_held = False
        self._listening = False
        self._tries = 0
        self._undecoded: deque[bytes] = deque()  # what was read and not decoded yet
        self._resuming: asyncio.Handle | None = None  # handles what is left of what was read
        self.attach(fd_in, fd_out)
        if early:
            self._loop.call_soon(self._feed, early)  # not at once: whoever is told must know this object

    def start_agent(self, local: bool, cache_tag: str) -> None:
        """Send what the agent starts with; see `agent_program.payload`."""
        self._cache_tag = cache_tag
        self.send_soon(payload(local, cache_tag))

    # --- streams -------------------------------------------------------------------------------
    def attach(self, fd_in: int, fd_out: int, early: bytes = b"") -> None:
        """Go on with these streams."""
        self._in, self._out = fd_in, fd_out
        os.set_blocking(fd_in, False)
        os.set_blocking(fd_out, False)
        self.heard = self._loop.time()
        self._listen()
        self._flush()
        if early:
            self._feed(early)

    def detach(self) -> None:
        """Close the streams; what is to be sent waits for others."""
        if not self.is_attached:
            return
        self._listen(False)
        self._write_later(False)
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        for fd in {self._in, self._out}:
            os.close(fd)
        self._in = self._out = -1

    def hold(self, held: bool) -> None:
        """Read nothing for the time being, which makes the host wait when it has too much to say; or go on."""
        if held == self.is_held:
            return
        self.is_held, self.heard = held, self._loop.time()
        self._listen()

    def _listen(self, wanted: bool = True) -> None:
        """Read when something comes, unless there is a reason not to."""
        wanted = wanted and self.is_attached and not self.is_held and self._resuming is None
        if wanted != self._listening:
            self._listening = wanted
            if wanted:
                self._loop.add_reader(self._in, self._readable)
            else:
                self._loop.remove_reader(self._in)

    @property
    def is_attached(self) -> bool:
        """True while there are streams."""
        return self._in >= 0

    @property
    def received(self) -> int:
        """Number of bytes that have come from the agent."""
        return self._decoder.total

    def begin_retaining(self) -> None:
        """Count what is sent from here on, and retain it until the agent has acknowledged it."""
        self._outbox.done = 0
        self._outbox.retains = True

    def stop_retaining(self) -> None:
        """Retain nothing of what is sent: no other streams will come."""
        self._outbox.retain_nothing()

    def rewind(self, total: int) -> None:
        """Have everything after the first `total` bytes sent again.

        Raises:
            FrameError: If that cannot be.
        """
        self._outbox.rewind(total)

    def send_heartbeat(self) -> None:
        """Tell the agent that somebody is here, and what has arrived; it does the same."""
        self._acknowledged = self.received
        self.send_soon(wire.ack_frame(self._acknowledged))

    @property
    def is_open(self) -> bool:
        """True until the link is lost."""
        return self._lost_error is None

    async def wait_while_heard(self, work: asyncio.Future[Any], limit: float, quiet: float) -> bool:
        """Wait for what the agent is to do; but not if it says nothing at all, though it is asked to.

        Args:
            work: Done when that is done.
            limit: Seconds for it.
            quiet: Seconds without a word after which it is not waited for.

        Returns:
            Whether it is done.
        """
        since = self._loop.time()
        while not work.done():
            now = self._loop.time()
            if self.is_held:
                since = now  # nobody listens
            left = min(since + limit, max(self.heard, since) + quiet) - now
            if left <= 0:
                return False
            self.send_heartbeat()  # which is answered
            await asyncio.wait([work], timeout=min(left, _ASK_EVERY))
        return True

    def open_channel(
        self,
        op: str,
        params: dict[str, Any],
        stdout: Bytes | None = None,
        stderr: Bytes | None = None,
        output: Bytes | None = None,
        event: Event | None = None,
    ) -> Channel:
        """Send a request; its answers go to the functions given, on the loop's thread.

        Raises:
            ConnectionLostError: If the link has ended.
            ValueError: If it is longer than what an agent takes; nothing is sent then.
        """
        if self._lost_error is not None:
            raise ConnectionLostError(self.host, self._lost_error.detail)
        self.send_modules(op)
        number = self._next
        asked = {**params, "op": op}
        if Environment.trust_group:
            asked["trust_group"] = True
        request = message_frame(number, wire.REQUEST, asked)
        self._next += 1
        channel = Channel(self, number, asked, stdout, stderr, output, event)
        self._channels[number] = channel
        self.send_soon(request)
        return channel

    def send_modules(self, operation: str) -> None:
        """Send the agent the modules that a request needs and that it does not have, before whatever is sent next."""
        if operation in self._sent_for:
            return
        self._sent_for.add(operation)
        missing = further_modules(operation) - self._sent_modules
        if not missing:
            return
        self._sent_modules |= missing
        number, data = self._next, packed_modules(missing, self._cache_tag)
        self._next += 1
        self.send_soon(message_frame(number, wire.REQUEST, {"op": "modules"}))
        for start in range(0, len(data), wire.MAX_PAYLOAD):
            self.send_soon(wire.frame(number, wire.INPUT, data[start : start + wire.MAX_PAYLOAD]))
        self.send_soon(wire.frame(number, wire.INPUT_END))

    def forget(self, number: int) -> None:
        """Let a channel go that has ended."""
        self._channels.pop(number, None)

    # --- out -----------------------------------------------------------------------------------
    def send_soon(self, *parts: bytes | memoryview) -> None:
        """Queue a frame, however much waits already; for short ones."""
        if self._lost_error is None:
            self._outbox.put(*parts)
            if self.is_attached and not self._writing and self._closing is None:
                self._flush()

    async def send(self, *parts: bytes | memoryview) -> None:
        """Queue a frame, which may be in parts, once there is room for it."""
        while self._is_full() and self._lost_error is None:
            self._room.clear()
            await self._room.wait()
        self.send_soon(*parts)

    def _is_full(self) -> bool:
        return self._outbox.size > _HIGH_WATER or self._outbox.held > wire.HELD

    def _flush(self) -> None:
        try:
            self._outbox.write(self._out)
        except OSError as error:
            # What the agent said before it stopped listening is still to be read, up to the end of that stream.
            self._write_later(False)
            self._closing = self._loop.call_later(_LAST_WORDS, self._ended, error)
            return
        if self._outbox.size <= _HIGH_WATER // 2 and self._outbox.held <= wire.HELD:
            self._room.set()
        self._write_later(self._outbox.size > 0)

    def _write_later(self, waiting: bool) -> None:
        if waiting != self._writing:
            self._writing = waiting
            if waiting:
                self._loop.add_writer(self._out, self._flush)
            else:
                self._loop.remove_writer(self._out)

    # --- in ------------------------------------------------------------------------------------
    def _readable(self) -> None:
        try:
            data = os.read(self._in, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error)
            return
        except MemoryError:
            if not memory_pressure.relieve():
                self._handle_later(_NO_MEMORY_PAUSE)
            return
        if data:
            self.heard = self._loop.time()
            self._feed(data)
        else:
            self._ended(None)

    def _feed(self, data: bytes) -> None:
        self._undecoded.append(data)
        if self._resuming is None:
            self._handle()

    def _handle(self) -> None:
        """Handle what was read: of much a part, the rest after what else is to be done on the loop."""
        self._resuming = None
        try:
            pause = self._decode()
            if pause is not None:
                self._handle_later(pause)
        except wire.FrameError as error:
            self._undecoded.clear()
            self._ended(error)
            return
        except MemoryError:
            self._make_room()
        finally:
            self._listen()
        if self._outbox.retains and self.received - self._acknowledged >= wire.ACK_UNIT:
            self.send_heartbeat()

    def _make_room(self) -> None:
        """Try again to handle what was read, once something else was given up, or later."""
        room = memory_pressure.relieve()
        self._tries = 0 if room else self._tries + 1
        if self._tries > _NO_MEMORY_TRIES and not self._undecoded:  # a frame is there, but has no room
            self._tries = 0
            self._out_of_memory(self._decoder.skip())
        self._handle_later(0.0 if room else _NO_MEMORY_PAUSE)

    def _handle_later(self, seconds: float) -> None:
        self.heard = self._loop.time()  # it is not the host that is late
        self._resuming = self._loop.call_later(seconds, self._handle) if seconds else self._loop.call_soon(self._handle)
        self._listen()

    def _decode(self) -> float | None:
        """Handle frames; returns after how many seconds to go on, None if all are handled."""
        while self._undecoded:
            self._decoder.put(self._undecoded[0])
            self._undecoded.popleft()
        end = time.perf_counter() + _TURN
        for number, kind, data in self._decoder.frames():
            self._dispatch(number, kind, data)
            if time.perf_counter() > end:
                return 0.0
        return None

    def _out_of_memory(self, number: int) -> None:
        channel = self._channels.get(number)
        if channel is not None:
            channel.give_up(MemoryError(f"this process has no memory left for the answer of {self.host}"))

    def _dispatch(self, number: int, kind: int, payload: bytes) -> None:
        channel = self._channels.get(number)
        if channel is not None:
            try:
                channel.received(kind, payload)
            except wire.FrameError:
                raise
            except MemoryError:
                memory_pressure.relieve()
                self._out_of_memory(number)
            except Exception:
                if log_limit.may_log(self.host):
                    logger.exception("%s: the answer to a request could not be handled", self.host)
        elif kind == wire.ACK:
            if self._outbox.retains:
                self._outbox.acknowledge(int.from_bytes(payload[: wire.TOTAL_SIZE], "big"))
            if not self._is_full():
                self._room.set()
        elif number == 0 and kind == wire.EVENT:
            self._said_of_itself(payload)

    def _said_of_itself(self, payload: bytes) -> None:
        try:
            message = decoded(payload)
        except ValueError as error:
            text = f"the agent's first message is invalid: {error}"
            if self.started.done():
                raise wire.FrameError(text) from None
            self.started.set_exception(InvalidRuntimeError(self.host, "protocol", text))
            self.started.exception()  # whoever waits gets it; that nobody does is no error
            return
        self._said(message)

    def _said(self, message: dict[str, Any]) -> None:
        """Handle what the agent says of itself."""
        if "crash" in message:
            if not log_limit.may_log(self.host):
                return
            logger.error("%s: the agent has crashed:\n%s", self.host, printable(str(message["crash"])[-_CRASH:]))
        elif "problem" in message:
            text = printable(str(message["problem"])[-_CRASH:])
            (when, before), now = self.problem, self._loop.time()
            self.problem = now, text
            if (text != before or now - when > _WARN_AGAIN) and log_limit.may_log(self.host):
                logger.warning("%s: %s", self.host, text)
        elif not self.started.done():
            self.started.set_result(message)

    # --- end -----------------------------------------------------------------------------------
    def _ended(self, error: Exception | None) -> None:
        self.detach()
        self._on_ended(error)

    def lost(self, detail: str) -> None:
        """End the link: close its streams, tell everyone who waits that it has gone, and why."""
        self.detach()
        self._outbox.clear()
        self._undecoded.clear()
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        self._lost_error = ConnectionLostError(self.host, detail)
        self._room.set()
        if not self.started.done():
            self.started.set_exception(ConnectionLostError(self.host, detail))
            self.started.exception()
        for channel in list(self._channels.values()):
            channel.fail(ConnectionLostError(self.host, detail))
        self._channels.clear()
