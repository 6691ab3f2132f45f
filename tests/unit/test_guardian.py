"""The guardian's clean-up of what a manager that was killed has left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazycluster.agent import guardian
from patience import until


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("removed_before", [False, True])
def test_nobody_waits_for_ever_to_write_to_a_pipe_whose_reader_was_killed(tmp_path: Path, removed_before: bool) -> None:
    """An ssh that was just started opens the pipe for its log: one that comes later finds no directory."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").write_text("x")
    os.mkfifo(place / "1.log")
    os.mkfifo(place / "2.log")
    if removed_before:
        guardian.remove([str(place), str(tmp_path / "missing")])
    writer = subprocess.Popen(["sh", "-c", ': 2>&- >>"$0"', str(place / "1.log")], stderr=subprocess.DEVNULL)
    try:
        if not removed_before:
            until(lambda: state(writer.pid) == "S", "the shell to wait for a reader")
            guardian.remove([str(place), str(tmp_path / "missing")])
        # It may find that its reader has ended again; what counts is that it does not wait.
        assert writer.wait(30) in ((2,) if removed_before else (0, -signal.SIGPIPE))
    finally:
        writer.kill()
        writer.wait()
    assert not place.exists()


_MANAGER = """
import os, sys
sys.path[:0] = [sys.argv[1]]
from lazycluster.agent import guardian
guardian._DYING = float(sys.argv[3])
manager = os.getpid()
if os.fork() == 0:
    print(guardian._has_ended(manager, sys.argv[2]), flush=True)
    os._exit(0)
if sys.argv[4] == "ends":
    os.close(1)
    os._exit(0)  # about as soon as the other one has begun to look
os.wait()
"""


@pytest.mark.parametrize(
    ("kept", "moment", "what", "answer"),
    [(True, 60.0, "ends", "True"), (False, 60.0, "stays", "False"), (True, 0.1, "stays", "False")],
)
def test_a_manager_that_was_killed_gets_a_moment_to_end(
    tmp_path: Path, kept: bool, moment: float, what: str, answer: str
) -> None:
    """Its streams end first: taken for alive, it would leave its private directory."""
    if kept:
        (tmp_path / guardian.AT_MANAGER_END_FILE).write_text("{}")
    sources = str(Path(guardian.__file__).parents[2])
    command = [sys.executable, "-W", "ignore", "-c", _MANAGER, sources, str(tmp_path), str(moment), what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout.strip() == answer
