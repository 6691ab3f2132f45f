"""The process of a cluster in the background, as another process of its user uses it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from lazycluster.core import unix
from lazycluster.core.suggestions import suggestion
from lazycluster.exceptions import BackgroundError

from . import protocol, state
from .state import Named

__all__ = ["BackgroundProcess", "Handler", "answer", "end", "running"]

Handler = Callable[[Mapping[str, Any]], "dict[str, Any] | None"]
"""Handler of messages that come before the answer: a question may be answered, progress shown."""

_ANSWER = 10.0  # seconds for an answer that takes a process no more than milliseconds
_SILENCE = 10.0  # seconds without a sign of life of a process that is ending
_GONE = 10.0  # seconds until a process that has said that it has ended is not there any more
_TERMINATE, _KILL = 30.0, 10.0  # seconds for a process that does not answer to end by SIGTERM, and by SIGKILL
_AGAIN = 0.02


class BackgroundProcess:
    """The process of a cluster, asked over its socket; each request is a connection of its own.

    Args:
        found: The cluster as the state directory has it.
    """

    def __init__(self, found: Named) -> None:
        self.found = found

    @property
    def name(self) -> str:
        """The name of the cluster."""
        return self.found.name

    def status(self) -> dict[str, Any]:
        """Return the state of the cluster, of whatever version its process is.

        Raises:
            BackgroundError: If the process does not answer.
        """
        return dict(self.request("status"))

    def request(
        self,
        command: str,
        /,
        *,
        on_message: Handler | None = None,
        on_stream: Callable[[protocol.MessageStream], object] | None = None,
        timeout: float | None = _ANSWER,
        **arguments: Any,
    ) -> Any:
        """Ask the process for something, and return the answer.

        Args:
            command: What.
            on_message: See `Handler`.
            on_stream: Gets the connection, over which messages may be sent.
            timeout: Seconds for the next message; None: as long as the process lives, if it answers at all.
            **arguments: What it needs to know.

        Raises:
            BackgroundError: If the process does not answer, or the request has failed there.
        """
        if timeout is None:
            self.request("status")
        try:
            stream = protocol.connected(self.found.path / state.SOCKET)
        except (OSError, ValueError) as error:
            raise self._silent(str(error)) from None
        with stream:
            if on_stream is not None:
                on_stream(stream)
            stream.send(protocol=protocol.VERSION, command=command, **arguments)
            try:
                return answer(stream, self.name, on_message, timeout)
            except TimeoutError:
                raise self._silent(f"it said nothing for {timeout:g} s") from None
            except EOFError as end_of_process:
                raise self._ended(str(end_of_process)) from None

    def _silent(self, why: str) -> BackgroundError:
        record = self.found.record
        pid = f" (pid {record.pid})" if record is not None and record.pid is not None else ""
        return BackgroundError(
            f"the process of {self.name!r}{pid} does not answer: {why}\n"
            f"  Next step: try again if this machine has much to do, or lazycluster down {self.name} ends the cluster"
        )

    def _ended(self, problem: str) -> BackgroundError:
        found = state.find(self.name)
        if found is None:
            return BackgroundError(f"{problem}: somebody has ended the cluster (lazycluster down)")
        why = f": {found.gone}" if found.gone else ""
        return BackgroundError(f"{problem}{why}\n  Next step: lazycluster logs {self.name} shows what it said")


def answer(
    stream: protocol.MessageStream, name: str, on_message: Handler | None = None, timeout: float | None = None
) -> Any:
    """Return the answer that comes over a stream, after whatever comes before.

    Raises:
        BackgroundError: If there is none, or it is an error.
        EOFError: If the process has ended.
        TimeoutError: If it said nothing for so long.
    """
    while True:
        try:
            message = stream.receive(timeout)
        except ValueError as error:
            raise BackgroundError(f"the process of {name!r} does not answer: {error}") from None
        if message is None:
            raise EOFError(f"the process of {name!r} has ended")
        if "error" in message:
            raise BackgroundError(str(message["error"]), str(message.get("type", "")))
        if "result" in message:
            return message["result"]
        reply = on_message(message) if on_message is not None else None
        if reply is not None:
            stream.send(**reply)


def running(name: str) -> BackgroundProcess:
    """Return the process of a cluster of this user on this machine.

    Raises:
        BackgroundError: If there is none; says why.
        ValueError: If the name cannot be one.
    """
    found = state.find(name)
    if found is None:
        others = suggestion(name, [one.name for one in state.all_named() if one.is_held])
        raise BackgroundError(f"there is no cluster {name!r}{others}\n  Next step: lazycluster up {name} starts one")
    if found.problem and not found.is_held:
        raise BackgroundError(found.problem)
    if found.record is not None and found.record.kind != "cluster":
        raise BackgroundError(f"{name!r} is detached work, not a cluster")
    if found.gone:
        raise BackgroundError(
            f"the cluster {name!r} is gone: {found.gone}\n"
            f"  Next step: lazycluster logs {name} shows what it said, lazycluster up {name} starts it anew"
        )
    if found.is_elsewhere:
        assert found.record is not None
        raise BackgroundError(f"the cluster {name!r} was started on {found.record.host}: use it there")
    return BackgroundProcess(found)


def end(found: Named, on_message: Handler | None = None) -> str:
    """End a cluster, and forget it; one that is gone is only forgotten.

    A process that does not answer is ended by signals: its hosts are clean as after any death of a manager.

    Returns:
        What was done: ``ended``, ``killed``, or ``forgotten``.

    Raises:
        BackgroundError: If it cannot be ended here, or its process said that something has failed.
    """
    if not found.is_held:
        found.remove()
        return "forgotten"
    done, failed = "ended", None
    try:
        BackgroundProcess(found).request("down", on_message=on_message, timeout=_SILENCE)
    except BackgroundError as error:
        failed = error
        if error.type:  # it has answered, and ends nevertheless
            _wait(found, _GONE)
        elif not _wait(found, _AGAIN):
            done = _kill(found)
            failed = None
    if not _wait(found, _GONE):
        raise BackgroundError(f"the process of {found.name!r} does not end") from failed
    found.remove()
    if failed is not None and failed.type:
        raise failed
    return done


def _wait(found: Named, seconds: float) -> bool:
    """Wait until a process is gone; return whether it is."""
    deadline = time.monotonic() + seconds
    while True:
        again = state.find(found.name)
        if again is None or not again.is_held:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_AGAIN)


def _kill(found: Named) -> str:
    record = found.record
    pid = record.pid if record is not None else None
    if record is None or pid is None or record.is_of_another_boot or found.is_elsewhere:
        raise BackgroundError(f"the process of {found.name!r} does not answer, and is not known: try again in a moment")
    for number, patience in ((signal.SIGTERM, _TERMINATE), (signal.SIGKILL, _KILL)):
        if unix.process_start_time(pid) != record.process_started:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if _wait(found, patience):
            break
    return "killed"
