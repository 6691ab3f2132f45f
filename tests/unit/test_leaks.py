"""The check that every test leaves everything clean notices what it should."""

from __future__ import annotations

import os
import subprocess
import threading

import leaks


def test_what_is_left_is_named_until_it_is_gone(tmp_path):
    marker = f"LAZYCLUSTER_TEST_LEAKS={os.getpid()}"
    manager = leaks.Manager(tmp_path, marker).remember()
    assert manager.leftovers() == []
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="forgotten")
    thread.start()
    name, value = marker.split("=")
    # A grandchild whose parent is gone is found by its environment only.
    with (tmp_path / "pid").open("w") as pid_file:
        subprocess.run(
            ["sh", "-c", "sleep 99 >/dev/null 2>&1 & echo $!"],
            env={**os.environ, name: value},
            check=True,
            stdout=pid_file,
        )
    orphan = int((tmp_path / "pid").read_text())
    try:
        left = "\n".join(manager.leftovers())
        assert "thread forgotten" in left
        assert "sleep 99" in left
        assert str(tmp_path / "pid") in left
    finally:
        os.kill(orphan, 9)
        done.set()
        thread.join()
        (tmp_path / "pid").unlink()
    assert leaks.settle(manager.leftovers) == []
