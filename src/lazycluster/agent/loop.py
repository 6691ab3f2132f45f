"""The agent's reactor: file descriptors, timers and the ends of child processes, in one thread.

Not asyncio: importing it would take longer than everything else that the agent does when it starts.
"""

from __future__ import annotations

import itertools
import os
import time
from _heapq import heappop, heappush

from .poller import READ, WRITE, Poller

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    import signal
    from collections import deque
    from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

    Callback = Callable[[], Any]
else:
    import _signal as signal  # the module proper makes enumerations, for which it imports much
    from _collections import deque

_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds for which a descriptor is left alone whose callback has failed


class Timer:
    """A call that is due later."""

    def __init__(self, due: float, callback: Callback) -> None:
        self.due = due
        self.callback: Optional[Callback] = callback

    def cancel(self) -> None:
        """Make sure that the call is not made."""
        self.callback = None


class Loop:
    """Runs callbacks when descriptors are ready, timers are due or children have ended.

    Attributes:
        report: Is told in a sentence of what goes wrong and ends nothing; None: an `OSError` of a callback ends `run`.
    """

    def __init__(self) -> None:
        self._poller = Poller()
        self._callbacks: Dict[int, List[Optional[Callback]]] = {}  # fd -> [reader, writer]
        self._timers: List[Tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: Deque[Callback] = deque()
        self._exit_callbacks: Dict[int, Callable[[int], Any]] = {}
        self._running = False
        self._paused: Dict[
            Tuple[int, int], Tuple[float, Optional[Callback]]
        ] = {}  # what failed: for how long, and what
        self.report: Optional[Callable[[str], Any]] = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    # --- descriptors ---------------------------------------------------------------------------
    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever `fd` can be read."""
        self._set(fd, 0, callback)

    def remove_reader(self, fd: int) -> None:
        """Stop watching `fd` for reading."""
        self._set(fd, 0, None)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever `fd` can be written."""
        self._set(fd, 1, callback)

    def remove_writer(self, fd: int) -> None:
        """Stop watching `fd` for writing."""
        self._set(fd, 1, None)

    def watch_writer(self, fd: int, callback: Optional[Callback]) -> None:
        """Call `callback` whenever `fd` can be written; None: do not watch it. That it is so already costs little."""
        pair = self._callbacks.get(fd)
        if callback != (pair[1] if pair else None) or self._paused:
            self._set(fd, 1, callback)

    def _set(self, fd: int, index: int, callback: Optional[Callback]) -> None:
        if self._paused:
            self._paused.pop((fd, index), None)  # whoever watches it does something else with it now
        self._watch(fd, index, callback)

    def _watch(self, fd: int, index: int, callback: Optional[Callback]) -> None:
        pair = self._callbacks.get(fd)
        if pair is None:
            if callback is None:
                return
            pair = self._callbacks[fd] = [None, None]
        before = self._mask(pair)
        pair[index] = callback
        mask = self._mask(pair)
        if not mask:
            del self._callbacks[fd]
        if mask == before:
            return
        if not before:
            self._poller.register(fd, mask)
        elif not mask:
            self._poller.unregister(fd)
        else:
            self._poller.modify(fd, mask)

    @staticmethod
    def _mask(pair: List[Optional[Callback]]) -> int:
        return (READ if pair[0] else 0) | (WRITE if pair[1] else 0)

    # --- time ----------------------------------------------------------------------------------
    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call `callback` once, in `seconds`."""
        timer = Timer(time.monotonic() + seconds, callback)
        heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Call `callback` in the next round."""
        self._soon.append(callback)

    # --- children ------------------------------------------------------------------------------
    def on_exit(self, pid: int, callback: Callable[[int], Any]) -> None:
        """Call `callback` with the wait status of the child `pid` when it has ended."""
        self._exit_callbacks[pid] = callback

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            callback = self._exit_callbacks.pop(pid, None)
            if callback is not None:
                self._call(callback, status)

    # --- what goes wrong -----------------------------------------------------------------------
    def _call(self, callback: Callable[..., Any], *args: Any) -> bool:
        """Call something, whose failure is no reason to end all the rest; returns whether it went well."""
        try:
            callback(*args)
        except OSError as error:
            if self.report is None:
                raise
            self.report(_described(error))
            return False
        return True

    def _pause(self, fd: int, index: int, callback: Callback) -> None:
        """Leave a descriptor alone for a while: it is still ready, and its callback would fail again at once."""
        pair = self._callbacks.get(fd)
        if pair is None or pair[index] != callback:
            return  # the callback has seen to it
        before = self._paused.get((fd, index), (0.0, None))[0]
        pause = min(_LONGEST_PAUSE, 2 * before) if before else _PAUSE
        self._watch(fd, index, None)
        self._paused[fd, index] = pause, callback

        def again() -> None:
            if self._paused.get((fd, index)) == (pause, callback):
                self._paused[fd, index] = pause, None
                try:
                    self._watch(fd, index, callback)
                except OSError:  # it has been closed
                    self._callbacks.pop(fd, None)
                    del self._paused[fd, index]

        self.call_later(pause, again)

    # --- running -------------------------------------------------------------------------------
    def run(self) -> None:
        """Run until `stop` is called."""
        self._running = True
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the signal reaches the wake-up descriptor
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self.add_reader(self._wake_read, self._woken)
        self._reap()
        while self._running:
            self._round()

    def stop(self) -> None:
        """Let `run` return after this round."""
        self._running = False

    def _woken(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass
        self._reap()

    def _round(self) -> None:
        for fd, mask in self._poller.wait(self._timeout()):
            # A callback may have removed a later one of the same round: look each up when its turn comes.
            for index, event in ((0, READ), (1, WRITE)):
                callback = self._callbacks.get(fd, (None, None))[index] if mask & event else None
                if callback is None:
                    continue
                if not self._call(callback):
                    self._pause(fd, index, callback)
                elif self._paused:
                    self._paused.pop((fd, index), None)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heappop(self._timers)[2]
            if timer.callback is not None:
                self._call(timer.callback)
        for _ in range(len(self._soon)):
            self._call(self._soon.popleft())

    def _timeout(self) -> Optional[float]:
        if self._soon:
            return 0.0
        while self._timers and self._timers[0][2].callback is None:
            heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())


def _described(error: OSError) -> str:
    import traceback

    trace = traceback.format_exception(type(error), error, error.__traceback__)
    return "something could not be done, the rest goes on:\n" + "".join(trace)
