"""How the command line begins and ends, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazycluster.cli import console, fanout
from lazycluster.cli.commands import run
from lazycluster.cli.console import INTERRUPTED, OutputGoneError
from lazycluster.cli.fanout import everywhere
from lazycluster.cli.options import Targets
from lazycluster.core import event_loop
from lazycluster.exceptions import NoAnswerError

# Ctrl-C at the first import that is not the interpreter's own, as of a busy machine or a slow disk.
_INTERRUPTED_IMPORT = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from lazycluster.cli import main
main()
"""


def test_ctrl_c_while_it_is_being_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED_IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")


def _status_of(*words: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "lazycluster", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr


@pytest.mark.parametrize("option", ["--debug", "--version"])
def test_options_that_come_before_the_command(option: str) -> None:
    status, err = _status_of("run", option, "-w", "a", "--", "b")
    assert status == 2
    assert f"{option} must come before the command: lazycluster {option} ..." in err


def test_a_view_that_stays_needs_a_terminal() -> None:
    status, err = _status_of("list-runtimes", "--watch", "-w", "a.invalid")
    assert (status, err.partition("\n")[0]) == (2, "error: --watch needs a terminal")


@pytest.mark.parametrize(
    ("words", "told"),
    [(("exit", "3"), "one word: -- 'exit 3'"), (("echo", "$A"), "one word: -- 'echo $A'"), (("x",), "")],
)
def test_what_only_a_shell_knows_is_said_to_be_a_line(words: tuple[str, ...], told: str) -> None:
    job = run._Job({}, console, None, None, "python3", words)  # type: ignore[arg-type]
    message = job._told("not found on the PATH of the host: exit")
    assert message.endswith(told)
    assert ("Next step" in message) == bool(told)


def test_a_program_may_have_an_option_as_ours() -> None:
    config = ["--config", os.devnull, "-w", "-a"]  # a name that no host has, so an error after all has been read
    assert "Traceback" not in _status_of("run", *config, "--", "tool", "--debug")[1]
    assert "Traceback" in _status_of("--debug", "delete-runtime", "--config", os.devnull, "a")[1]


class _Connected:
    def __init__(self, host: str) -> None:
        self.host = host
        self.silent = asyncio.Event()

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass


def test_a_host_whose_system_hangs_is_told_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(connection: Any) -> fanout.HostOutcome:
        if connection.host == "bad":
            raise NoAnswerError("bad", "an answer to 'info'", 30)
        return fanout.HostOutcome(connection.host)

    monkeypatch.setattr(Targets, "connection", lambda self, name: _Connected(name))
    bad, good = asyncio.run(everywhere(Targets(["bad", "good"]), work))
    assert (bad.kind, bad.status, good.kind) == ("error", 1, "done")
    assert bad.error.startswith("connected, but timed out after 30 s, waiting for an answer to 'info'\n")
    assert bad.error.endswith("memory and disks, e.g. with: ssh bad df")


def test_an_output_that_nobody_reads_ends_it(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host a.invalid\n")
    taken, given = os.pipe()
    os.close(taken)
    argv = [sys.executable, "-m", "lazycluster", "list-runtimes", "--config", str(config)]
    done = subprocess.run(argv, stdout=given, stderr=subprocess.PIPE, text=True, check=False, stdin=subprocess.DEVNULL)
    os.close(given)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_output_that_goes_while_hosts_answer_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(connection: Any) -> fanout.HostOutcome:
        return fanout.HostOutcome(connection.host)

    taken, given = os.pipe()
    os.close(taken)
    monkeypatch.setattr(Targets, "connection", lambda self, name: _Connected(name))
    with open(given, "w", buffering=1) as nobody:
        out = console._console(file=nobody)
        with pytest.raises(OutputGoneError):
            event_loop.run(everywhere(Targets(["a", "b"]), work, on_done=lambda outcome: out.print(outcome.host)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), given)  # what is left in the buffer
