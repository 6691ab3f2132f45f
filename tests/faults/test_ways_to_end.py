"""A manager that ends, in any way, in the middle of anything: its status says how, and nothing is left.

Of the ways and stages, these combinations, since the others are made of the same parts:

* Every way with tasks that do not want to end. The ways differ in what the interpreter still does: a normal end and an
  exception run the clean-up, a first Ctrl-C raises in whatever waits, a second one in the clean-up; TERM runs the
  clean-up in a thread of its own; HUP and KILL let nothing run; a closed terminal is HUP to a whole group. While the
  interpreter finalises, a thread may be in the middle of a call ("thread"), or somebody comes when all has been cleaned
  up ("finalise"); a forked child runs the clean-up of what is not its own. Ending tasks is what every
  other stage comes to.
* Connecting, with Ctrl-C and TERM: no agent is there yet that could notice.
* Copying, with Ctrl-C, which ends a thread and a process on the host that are in the middle of it, and with TERM, where
  only that process is there to see it.
* Calls on all hosts (`map`), with Ctrl-C, which hits an iteration that has handed out more than it waits for; with
  TERM, since the workers are children of zygotes and know no agent; with a fork, whose child has the iteration, too.
* Cleaning up, with Ctrl-C twice and KILL: the only stage that is interrupted by what it does itself.
* Clusters, and the rest, are left to the soak: to the library HUP is what KILL is, and that is tested for all
  of them in `test_sudden_ends.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from managers import Victim

from filetrees import make_large
from patience import until

INTERRUPTED = -signal.SIGINT


def _signals(*numbers: int) -> Callable[[Victim], Any]:
    def send(victim: Victim) -> None:
        for number in numbers:
            victim.process.send_signal(number)

    return send


def _terminal_closed(victim: Victim) -> None:
    """What a shell or a terminal does to those that it started when it goes."""
    subprocess.run(["kill", "-HUP", "--", f"-{victim.process.pid}"], check=True)


def _order(word: str) -> Callable[[Victim], Any]:
    return lambda victim: victim.tell(word)


WAYS: dict[str, tuple[Callable[[Victim], Any], int]] = {
    "return": (_order("return"), 0),
    "raise": (_order("raise"), 1),
    "exit": (_order("exit"), 3),
    "thread": (_order("thread"), 0),
    "fork": (_order("fork"), 0),
    "finalise": (_order("finalise"), 0),
    "interrupt": (_signals(signal.SIGINT), INTERRUPTED),
    "interrupt twice": (_signals(signal.SIGINT, signal.SIGINT), INTERRUPTED),
    "terminate": (_signals(signal.SIGTERM), -signal.SIGTERM),
    "hang up": (_terminal_closed, -signal.SIGHUP),
    "kill": (_signals(signal.SIGKILL), -signal.SIGKILL),
}

SOAK = pytest.mark.soak
TABLE = [
    *(("ordered", way) for way in WAYS if way not in ("kill", "exit", "hang up", "raise", "thread")),
    *(("connecting", way) for way in ("interrupt", "terminate")),
    *(("send", way) for way in ("interrupt", "terminate")),
    *(("calls", way) for way in ("interrupt", "terminate")),
    ("closing", "kill"),
    *(pytest.param("ordered", way, marks=SOAK) for way in ("exit", "hang up", "raise", "thread")),
    *(pytest.param("closing", way, marks=SOAK) for way in ("interrupt", "interrupt twice", "terminate")),
    *(
        pytest.param("calls", way, marks=SOAK)
        for way in ("return", "raise", "fork", "thread", "interrupt twice", "kill")
    ),
    pytest.param("cluster", "interrupt", marks=SOAK),
    *(pytest.param(work, way, marks=SOAK) for work in ("cluster", "start") for way in ("terminate", "hang up")),
    *(pytest.param("start", way, marks=SOAK) for way in ("interrupt", "interrupt twice")),
    *(pytest.param(work, "hang up", marks=SOAK) for work in ("send", "tunnels", "connecting")),
]


@pytest.mark.parametrize(("work", "way"), TABLE)
def test_nothing_is_left(hosts: Any, work: str, way: str) -> None:
    if work in ("cluster", "start"):
        pytest.importorskip("distributed")
    end, status = WAYS[way]
    with Victim(work, hosts) as victim:
        if work == "send":
            make_large(victim.folder / "huge")
        if work == "tunnels":
            (victim.folder / "port").write_text("24102")  # nobody needs to listen there
        assert victim.said() == "working"
        if work == "ordered":
            for host in hosts:
                until(lambda host=host: "sleep 7005" in str(host.processes()), "the tasks")
        got, said = victim.end(lambda: end(victim))
        # A second interrupt may come when the first has been dealt with already, or end the clean-up at exit.
        assert got in ((status, 0, 1) if way == "interrupt twice" else (status,)), said
        if way == "raise":
            assert "the user's own" in said
        if way == "finalise":
            assert "too late: " in said
        assert "Fatal Python error" not in said


@pytest.mark.parametrize("work", ["ordered", "calls", pytest.param("cluster", marks=SOAK)])
def test_process_1_of_a_container_is_stopped(hosts: Any, work: str) -> None:
    """SIGTERM does not end such a process by itself, and SIGKILL ends all that could tell the hosts."""
    with Victim(work, hosts, first=True) as victim:
        assert victim.said() == "working"
        pid = victim.pid
        got, said = victim.end(lambda: os.kill(pid, signal.SIGTERM))
        assert got == 128 + signal.SIGTERM, said
        assert "Traceback" not in said


# Programs that have something to clean up, what they print when they get SIGTERM once they are ready, and their status.
_BEFORE = "import os, signal, sys, threading; from lazycluster.core import lifetime\n"
_THING = """
class Thing:
    def cleanup(self): os.write(1, b"cleaned up\\n")
thing = Thing()
lifetime.register(thing)
"""
# Again and again: a signal just before a wait that has no end is handled by Python only after the wait.
_FOR_EVER = "while True: threading.Event().wait(0.2)\n"
_WAIT = "print('ready', flush=True)\n" + _FOR_EVER
_PROGRAMS = {
    "default": (_THING + _WAIT, ["cleaned up"], -signal.SIGTERM),
    "buffered output": (_THING + "print('buffered'); os.write(1, b'ready\\n'); threading.Event().wait()\n",
                        ["cleaned up", "buffered"], -signal.SIGTERM),
    "handler before": ("signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n" + _THING + _WAIT, [], 7),
    "handler after": (_THING + "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n" + _WAIT, [], 7),
    "ignored": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + _THING
                + "print('ready', flush=True); sys.stdin.read()\n", ["cleaned up"], 0),
    "default again": (_THING + "signal.signal(signal.SIGTERM, signal.SIG_DFL); lifetime.register(thing)\n" + _WAIT,
                      [], -signal.SIGTERM),
    "finally": (_THING + "try:\n    print('ready', flush=True); threading.Event().wait()\n"
                "finally: os.write(1, b'own\\n')\n", ["cleaned up", "own"], -signal.SIGTERM),
    "swallowed": (_THING + "print('ready', flush=True)\nwhile True:\n    try: threading.Event().wait()\n"
                  "    except BaseException: pass\n", ["cleaned up"], -signal.SIGTERM),
    "another thread": (_THING + "threading.Thread(target=threading.Event().wait).start(); print('ready', flush=True)\n",
                       ["cleaned up"], -signal.SIGTERM),
    "not the main thread": ("def work():\n    global thing" + _THING.replace("\n", "\n    ") + "\nt = threading.Thread("
                            "target=work); t.start(); t.join()\n" + _WAIT, [], -signal.SIGTERM),
    # Python forgets a signal that a child gets before it has begun.
    "a forked child": (_THING + "begun = os.pipe()\npid = os.fork()\nif not pid:\n    os.write(begun[1], b'.')\n"
                       "    " + _FOR_EVER + "os.read(begun[0], 1)\nos.kill(pid, signal.SIGTERM)\n"
                       "print(os.WTERMSIG(os.waitpid(pid, 0)[1]))\n" + _WAIT, ["15", "cleaned up"], -signal.SIGTERM),
    "a forked child with things of its own": (_THING + "pid = os.fork()\nif not pid:\n" + _THING.replace("\n", "\n    ")
                                              + "\n    os.kill(os.getpid(), signal.SIGTERM); threading.Event().wait()\n"
                                              "print(os.WTERMSIG(os.waitpid(pid, 0)[1]))\n" + _WAIT,
                                              ["cleaned up", "15", "cleaned up"], -signal.SIGTERM),
}  # fmt: skip


@pytest.mark.parametrize("case", _PROGRAMS)
def test_sigterm_and_what_the_user_does_about_it(case: str) -> None:
    program, expected, status = _PROGRAMS[case]
    with subprocess.Popen(
        [sys.executable, "-c", _BEFORE + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        while not said.endswith("ready\n"):
            said += process.stdout.readline() or pytest.fail(f"it has ended: {said}")
        process.send_signal(signal.SIGTERM)
        said = said.removesuffix("ready\n") + process.communicate()[0]
        assert process.returncode == status, said
        assert sorted(said.splitlines()) == sorted(expected)
