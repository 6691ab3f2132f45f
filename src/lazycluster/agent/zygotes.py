"""The interpreters that functions run on: starting their zygotes, choosing one for a call, warming and ending them."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import sys

from .processes import spawn
from .zygote_link import HEAD, STUB, ZygoteLink, program

TYPE_CHECKING = False  # importing typing would cost more than the rest of the module
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, FrozenSet, Iterable, List, Optional, Set, Tuple

    from .server import Agent
    from .zygote_link import Report

MOST_INTERPRETERS = 4  # interpreters (with an environment) for which zygotes are kept
START_LIMIT = 30.0  # seconds for an interpreter to start
WARM_LIMIT = 60.0  # seconds for imports; calls that wait for them then do without
WARM_DELAY = 0.05  # seconds after a call that imported something, so that a burst of calls leads to one attempt
_CAN_WARM = os.path.isdir("/proc/self/task")  # else it cannot be known whether a fork is safe
_ERROR_SIZE = 4000


class ForkQueue:
    """Calls that wait until there are descriptors for their processes; one queue for all interpreters of an agent.

    Attributes:
        running: How many calls hold descriptors.
    """

    def __init__(self, agent: Agent) -> None:
        self.running = 0
        self._loop = agent.loop
        self._waiting: List[Callable[[], Any]] = []

    def wait(self, start: Callable[[], Any]) -> bool:
        """Have a call started when another one has ended; returns False if there is none."""
        if self.running:
            self._waiting.append(start)
        return bool(self.running)

    def leave(self, start: Callable[[], Any]) -> bool:
        """Forget a call; returns False if it does not wait."""
        waits = start in self._waiting
        if waits:
            self._waiting.remove(start)
        return waits

    def next(self) -> None:
        """Start the call that has waited longest."""
        if self._waiting:
            self._loop.call_soon(self._waiting.pop(0))


class Interpreter:
    """One interpreter with one environment: its clean zygote, and perhaps a warmed one.

    Calls are forked from the warmed zygote where that does no harm. The clean one is what warmed ones are made of, and
    what is left if importing cannot be done safely beforehand.

    Args:
        agent: The agent.
        python: The interpreter.
        env: The whole environment of its processes.
        queue: Where calls wait for descriptors.

    Raises:
        OSError: It cannot be started.
    """

    _numbers = itertools.count(1)

    def __init__(self, agent: Agent, python: str, env: Dict[str, str], queue: ForkQueue) -> None:
        self.loop = agent.loop
        self.queue = queue
        self.facts: Dict[str, Any] = {}  # version and executable, when it has started
        self.error = ""  # why it does not work
        self._waiting: List[Callable[[], Any]] = []
        self._library = ""
        self._calls = 0
        self._warmed: Optional[ZygoteLink] = None
        self._have: Set[str] = set()  # what the warmed zygote has imported
        self._stamps: List[Tuple[str, int]] = []
        self._bad: Set[str] = set()  # what must not be imported before a fork, or cannot be
        self._unsafe: Set[str] = set()  # packages of which something must not be imported before a fork
        self._candidate: Optional[ZygoteLink] = None
        self._wanted: List[str] = []
        self._asked: Set[str] = set()
        self._warm_limit: Any = None
        self._warm_waiting: List[Callable[[], Any]] = []
        self._timer: Any = None
        self._said = bytearray()
        ours, theirs = socket.socketpair()
        errors, their_errors = os.pipe()
        os.set_blocking(errors, False)
        try:
            pid = spawn([python, "-c", STUB], env, agent.directory, theirs.fileno(), their_errors, their_errors)
        except BaseException:
            ours.close()
            os.close(errors)
            raise
        finally:
            theirs.close()
            os.close(their_errors)
        self._errors = errors
        self.loop.add_reader(errors, self._read_errors)
        self.clean = ZygoteLink(self.loop, ours, self._on_message, self._on_end)
        self.clean.pid = pid
        self._limit = self.loop.call_later(START_LIMIT, self._too_slow)
        self.clean.write(program())

    @property
    def busy(self) -> bool:
        """True if something is under way or waits."""
        return bool(self._calls or self._waiting or self._warm_waiting)

    @property
    def ended(self) -> bool:
        """True if it can be used no more."""
        return self.clean.ended

    # --- the start -----------------------------------------------------------------------------
    def when_ready(self, then: Callable[[], Any]) -> None:
        """Call `then` when it has started, or has failed to (see `error`)."""
        if self.facts or self.error:
            then()
        else:
            self._waiting.append(then)

    def _on_message(self, message: Dict[str, Any]) -> None:
        if "library" in message:
            self.error = message.get("error", "")
            return
        self.facts = {"version": message["version"], "executable": message["executable"]}
        self._limit.cancel()
        self._settle()

    def _on_end(self) -> None:
        self._read_errors()
        said = self._said.decode("utf-8", "replace").strip()
        self.error = said or "it ended without any output"
        self._settle()
        self.close()

    def _too_slow(self) -> None:
        self.error = "it did not start within {:.0f} s".format(START_LIMIT)
        self._settle()
        self.close()

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()

    def _read_errors(self) -> None:
        while self._errors >= 0:
            try:
                data = os.read(self._errors, 65536)
            except BlockingIOError:
                return
            self._said += data
            del self._said[:-_ERROR_SIZE]
            if not data:
                self.loop.remove_reader(self._errors)
                os.close(self._errors)
                self._errors = -1

    # --- calls ---------------------------------------------------------------------------------
    def give_library(self, digest: str, data: bytes) -> None:
        """Have the pickling library imported, once."""
        if self._library != digest:
            self._library = digest
            self.clean.write(HEAD.pack(len(data)) + data)

    def prepare(self, imports: Iterable[str], then: Callable[[], Any]) -> None:
        """Call `then` when a call that will import these modules had best be forked.

        The first such call waits until the warmed zygote has imported them: doing it there takes no longer than in the
        call's own process, and the next calls find it done.
        """
        self._check_stamps()
        missing = [name for name in imports if name not in self._have and not self._is_bad(name)]
        under_way = self._candidate is not None
        if not missing or not _CAN_WARM or (under_way and not self._asked.issuperset(missing)):
            self.note(missing)
            then()
            return
        self._warm_waiting.append(then)
        if not under_way:
            self._wanted.extend(missing)
            self._make_candidate()

    def fork(self, message: Dict[str, Any], fds: List[int], fresh: bool, report: Report) -> None:
        """Fork a process and hand it descriptors.

        Args:
            message: What it is told.
            fds: The descriptors, closed on our side.
            fresh: Whether it must not find anything imported.
            report: Is called with its pid, and with its wait status (None if that is unknown).
        """
        zygote = self.clean if fresh or self._warmed is None else self._warmed
        number = next(self._numbers)
        self._calls += 1

        def on_report(said: Dict[str, Any]) -> None:
            if "status" in said:
                self._calls -= 1
            report(said)

        zygote.reports[number] = on_report
        zygote.tell(dict(message, id=number), fds)
        if zygote.ended:  # it died just now: nobody reports
            zygote.reports.pop(number, None)
            self._calls -= 1
            report({"status": None})

    # --- warming -------------------------------------------------------------------------------
    def note(self, imported: Iterable[str]) -> None:
        """Learn what a call imported; soon a zygote will have it imported already."""
        fresh = [name for name in imported if name not in self._have and not self._is_bad(name)]
        fresh = [name for name in fresh if name not in self._wanted]
        if fresh and _CAN_WARM:
            self._wanted.extend(fresh)
            if self._timer is None:
                self._timer = self.loop.call_later(WARM_DELAY, self._warm_later)

    def _warm_later(self) -> None:
        self._timer = None
        if self._candidate is None:
            self._make_candidate()

    def _is_bad(self, name: str) -> bool:
        return name in self._bad or name.partition(".")[0] in self._unsafe

    def _make_candidate(self) -> None:
        names = [name for name in self._wanted if name not in self._have and not self._is_bad(name)]
        source = self.clean if self._warmed is None else self._warmed
        if source.ended or not names:
            self._warm_settled()
            return
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # no descriptors left: the calls do without
            self._warm_settled()
            return
        self._asked = set(names)
        number = next(self._numbers)
        candidate = ZygoteLink(self.loop, ours, self._on_candidate, self._candidate_ended)
        self._candidate = candidate

        def report(said: Dict[str, Any]) -> None:
            candidate.pid = said.get("pid", 0)
            source.reports.pop(number, None)  # it outlives what it was forked from

        source.reports[number] = report
        self._warm_limit = self.loop.call_later(WARM_LIMIT, self._candidate_fails)
        source.tell({"id": number, "warm": names}, [theirs.detach()])

    def _on_candidate(self, message: Dict[str, Any]) -> None:
        candidate = self._candidate
        if candidate is None:
            return
        if "unsafe" in message:
            # The other modules of that package would most likely do the same, each after as long an import.
            root = message["unsafe"].partition(".")[0]
            self._unsafe.add(root)
            self._bad.update(name for name in self._asked if name.partition(".")[0] == root)
            self._drop_candidate()
            self._make_candidate()
            return
        self._warm_limit.cancel()
        self._candidate = None
        if self._warmed is not None:
            self._warmed.retire()
        self._warmed = candidate
        self._have.update(message["modules"])
        self._bad |= self._asked - self._have
        self._stamps = [(path, stamp) for path, stamp in message["stamps"]]
        self._check_stamps()  # something may have been installed since it began to import
        self._warm_settled()
        self._make_candidate()  # more may have been wanted meanwhile

    def _candidate_ended(self) -> None:
        """Handle the end of a zygote that crashed while importing, or of the warmed one."""
        if self._warmed is not None and self._warmed.ended:
            self._forget_warmed()
        if self._candidate is not None and self._candidate.ended:
            self._candidate_fails()

    def _candidate_fails(self) -> None:
        self._bad |= self._asked - self._have
        self._drop_candidate()
        self._make_candidate()

    def _drop_candidate(self) -> None:
        if self._candidate is not None:
            self._warm_limit.cancel()
            self._candidate.kill()
            self._candidate = None

    def _warm_settled(self) -> None:
        waiting, self._warm_waiting = self._warm_waiting, []
        for then in waiting:
            then()

    def _check_stamps(self) -> None:
        """Drop the warmed zygote if something was installed since it imported its modules."""
        for path, stamp in self._stamps if self._warmed is not None else ():
            try:
                same = os.stat(path).st_mtime_ns == stamp
            except OSError:
                same = False
            if not same:
                self._forget_warmed()
                return

    def _forget_warmed(self) -> None:
        if self._warmed is not None:
            self._warmed.retire()
        self._warmed = None
        self._have, self._bad, self._unsafe = set(), set(), set()
        self._wanted = []

    # --- the end -------------------------------------------------------------------------------
    def close(self) -> None:
        """End its zygotes."""
        self._limit.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._candidate is not None:
            self._drop_candidate()
        self._warm_settled()
        self._forget_warmed()
        if self.facts:
            self.clean.retire()
        else:
            self.clean.kill()
        if self._errors >= 0:
            self.loop.remove_reader(self._errors)
            os.close(self._errors)
            self._errors = -1


def _program(python: str, env: Dict[str, str]) -> str:
    if python == "python3" and sys.executable and shutil.which(python, path=env.get("PATH", os.defpath)) is None:
        return sys.executable
    return os.path.expanduser(python)


class Zygotes:
    """The interpreters that the agent keeps, the one used longest ago first."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._queue = ForkQueue(agent)
        self._kept: Dict[Tuple[str, FrozenSet[Tuple[str, str]]], Interpreter] = {}
        self.libraries: Dict[str, bytes] = {}  # digest -> the message that has a zygote import it

    def get(self, python: Optional[str], env: Dict[str, str]) -> Interpreter:
        """Return an interpreter with an environment, starting it if need be.

        Args:
            python: A path or a name on the PATH of `env`; by default `python3`, and if there is none, the agent's own.
            env: The whole environment.

        Raises:
            OSError: It cannot be started.
        """
        python = python or "python3"
        key = (python, frozenset(env.items()))
        found = self._kept.pop(key, None)
        if found is None or found.ended or found.error:
            self._make_room()
            found = Interpreter(self._agent, _program(python, env), env, self._queue)
        self._kept[key] = found
        return found

    def own(self, env: Dict[str, str]) -> Interpreter:
        """Return the interpreter that the agent itself runs on."""
        return self.get(sys.executable or None, env)

    def _make_room(self) -> None:
        for key, interpreter in list(self._kept.items()):
            if interpreter.ended or (len(self._kept) >= MOST_INTERPRETERS and not interpreter.busy):
                interpreter.close()
                del self._kept[key]
