"""Directories of agents that a crash has left, and those of others, which stay."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest

from lazycluster.agent import leftovers
from lazycluster.agent.host_load import count_tunnels
from lazycluster.agent.leftovers import abandoned, remove_unfinished


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    monkeypatch.setattr(leftovers, "every_parent_directory", lambda: [str(tmp_path / "other")])
    return tmp_path


def directory(place: Path, name: str, host: str | None, listens: bool = False) -> socket.socket:
    path = place / name
    path.mkdir(mode=0o700)
    if host is not None:
        (path / "host").write_text(host)
    (path / "tunnels").write_text("2")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{name}/agent.sock")
    if listens:
        listener.listen()
    os.utime(path, (0, 0))
    return listener


def test_what_another_host_uses_in_a_shared_place_stays(place: Path) -> None:
    here = os.uname().nodename
    listeners = [
        directory(place, "lazycluster-a", here),
        directory(place, "lazycluster-b", "another-host"),
        directory(place, "lazycluster-c", None),
        directory(place, "lazycluster-d", here, listens=True),
        directory(place, "something-e", here),
    ]
    own = str(place / "lazycluster-own")
    assert sorted(os.path.basename(path) for path in abandoned(own)) == ["lazycluster-a", "lazycluster-c"]
    assert count_tunnels(own) == 6
    for listener in listeners:
        listener.close()


def test_what_is_not_a_private_directory_stays(place: Path) -> None:
    for name in ("lazycluster-project", "something"):
        directory(place, name, None).close()
    os.chmod(place / "lazycluster-project", 0o755)  # somebody's own, whatever is in it
    (place / "lazycluster-link").symlink_to("something")
    assert abandoned(str(place / "lazycluster-own")) == []


def test_what_agents_left_that_could_not_start_is_removed(place: Path) -> None:
    (place / "other").mkdir()
    names = [f"{number:012x}" for number in range(10)]
    empty, unknown, ours, theirs, used, young, public, linked, forbidden, elsewhere = (
        place / ("other" if number == names[-1] else "") / f"lazycluster-{number}" for number in names
    )
    for path in (empty, unknown, ours, theirs, used, young, forbidden, elsewhere, public):
        path.mkdir(mode=0o700)
    (unknown / "host").touch()  # the disk was full
    (ours / "host").write_text(os.uname().nodename)
    (theirs / "host").write_text("another-host")
    (used / "results").touch()
    public.chmod(0o755)
    forbidden.chmod(0)  # an umask of 777
    linked.symlink_to(empty)
    (place / "lazycluster-results").mkdir(mode=0o700)  # no agent names it so
    for path in (*place.iterdir(), *(place / "other").iterdir()):
        if path != young:
            os.utime(path, (0, 0), follow_symlinks=False)
    removed = remove_unfinished(str(place / "lazycluster-own"))
    assert sorted(removed) == sorted(map(str, (empty, unknown, ours, forbidden, elsewhere)))
    left = {path.name for path in place.iterdir()}
    assert left == {path.name for path in (theirs, used, young, public, linked)} | {"other", "lazycluster-results"}
    assert list((place / "other").iterdir()) == []


def test_an_agent_that_takes_nobody_in_holds_up_no_other(place: Path) -> None:
    with contextlib.ExitStack() as stack:
        for name, listens in (("lazycluster-stopped", True), ("lazycluster-dead", False)):
            stack.enter_context(directory(place, name, None, listens))
        full = False
        while not full:
            visitor = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            visitor.setblocking(False)
            try:
                visitor.connect("lazycluster-stopped/agent.sock")
            except BlockingIOError:
                full = True
        found: list[list[str]] = []
        own = str(place / "lazycluster-own")
        looking = threading.Thread(target=lambda: found.append(abandoned(own)), daemon=True)
        looking.start()
        looking.join(20)
        assert found == [[str(place / "lazycluster-dead")]]
