"""The guardian's clean-up of what a manager that was killed has left."""

from __future__ import annotations

import os
import signal
import subprocess
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
