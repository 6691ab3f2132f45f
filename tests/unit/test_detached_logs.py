"""Logs of detached tasks: bounded, whatever is printed and whatever the disk does, and read from any byte on."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazycluster.agent import detached, detached_log
from lazycluster.background import state
from lazycluster.cli import work
from lazycluster.cli.commands import logs as logs_command
from lazycluster.cli.commands import work as work_commands
from lazycluster.cli.work_logs import _LastLines
from lazycluster.exceptions import LazyclusterError

HEAD, TAIL = 50, 40
_NOTE = re.compile(rb"\n\[lazycluster: ([0-9]+) bytes of the output are left out here\]\n")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached_log, "HEAD", HEAD)
    monkeypatch.setattr(detached_log, "TAIL", TAIL)


class Channel:
    """Takes what is sent; one part of it at a time."""

    def __init__(self) -> None:
        self.data, self.end = b"", None
        self.on_drain = self.on_abandon = lambda: None
        self.writable = True

    def output(self, data: bytes) -> None:
        self.data += data
        self.writable = False

    def result(self, end: int) -> None:
        self.end = end


def read(directory: Path, offset: int = 0) -> tuple[bytes, int]:
    channel: Any = Channel()
    detached_log.LogOutput(channel, str(directory), offset)
    while channel.end is None:
        channel.writable = True
        channel.on_drain()
    return channel.data, channel.end


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(st.integers(1, 130), max_size=12))
def test_beginning_and_end_are_kept_and_the_gap_is_told(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("task")
    log = detached_log.LogWriter(str(directory))
    printed = b""
    for size in sizes:
        part = bytes(65 + (len(printed) + n) % 26 for n in range(size))
        log.write(part)
        printed += part
        assert sum(path.stat().st_size for path in directory.iterdir()) <= HEAD + 2 * TAIL
    log.close()
    data, end = read(directory)
    assert end == len(printed)
    head, *rest = _NOTE.split(data)
    if rest:
        left, tail = int(rest[0]), rest[1]
        assert head == printed[:HEAD]
        assert printed.endswith(tail)
        assert len(tail) >= min(TAIL, len(printed) - HEAD)
        assert len(head) + left + len(tail) == len(printed)
    else:
        assert head == printed


def test_it_is_followed_from_where_the_reading_ended(tmp_path: Path) -> None:
    log = detached_log.LogWriter(str(tmp_path))
    log.write(b"a" * 30)
    data, end = read(tmp_path)
    log.write(b"b" * 30)
    more, end = read(tmp_path, end)
    assert data + more == b"a" * 30 + b"b" * 30
    assert read(tmp_path, end) == (b"", 60)
    log.write(b"c" * 300)
    assert _NOTE.search(read(tmp_path, end)[0])
    assert read(tmp_path, 10_000) == (b"", 10_000)
    log.close()


def test_a_full_disk_costs_output_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = detached_log.LogWriter(str(tmp_path))
    log.write(b"a" * 60)
    write = os.write

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    for _ in range(20):
        log.write(b"b" * 25)
    monkeypatch.setattr(os, "write", write)
    log.write(b"c" * 10)
    log.close()
    head, left, tail = _NOTE.split(read(tmp_path)[0])
    assert (head, int(left), tail) == (b"a" * 60, 500, b"c" * 10)


def test_the_log_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 1000)
    assert read(tmp_path, 400) == (b"x" * 600, 1000)


@pytest.mark.parametrize(
    ("text", "count", "last"),
    [(b"", 2, b""), (b"a", 1, b"a"), (b"a\n", 1, b"a\n"), (b"a\nb\nc\n", 2, b"b\nc\n"), (b"a\nb", 5, b"a\nb")],
)
def test_the_last_lines(text: bytes, count: int, last: bytes) -> None:
    got: list[bytes] = []
    lines = _LastLines(count, got.append)
    for byte in text:
        lines.take(bytes([byte]))
    lines.release()
    lines.take(b"more")
    assert b"".join(got) == last + b"more"


# --- whose tasks ----------------------------------------------------------------------------------
def test_a_name_is_one_task_of_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    here = detached._id_of("train")
    assert here == detached._id_of("train")
    assert here != detached._id_of("other")
    monkeypatch.setattr(detached, "_machine", lambda: "another host")
    assert here != detached._id_of("train")
    assert detached._is_here({"machine": "another host", "state": "done"})
    assert not detached._is_here({"machine": "the first host", "state": "lost"})
    assert detached._is_here({"state": "done"}), "of an earlier version"


def test_a_directory_that_was_left_empty_gives_its_name_back(tmp_path: Path) -> None:
    path = tmp_path / "task"
    path.mkdir()
    with pytest.raises(FileExistsError):
        detached._make_directory(str(path))
    old = time.time() - 2 * detached._BEING_MADE
    os.utime(path, (old, old))
    detached._make_directory(str(path))
    assert time.time() - path.stat().st_mtime < 60


# --- records on this machine ----------------------------------------------------------------------
def test_names_of_work_are_completed_and_those_of_clusters_are_not_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for kind, name in (("work", "train"), ("work", "test"), ("cluster", "tree")):
        state.claim(state.NamedRecord.new(kind, name, hosts=["host1"], config=None)).close()
    context: Any = None
    assert work_commands.complete_work(context, context, "t") == ["test", "train"]
    assert logs_command._complete(context, context, "tr") == ["tree", "train"]
    assert work.cluster_named("tree") is not None
    assert work.cluster_named("train") is None
    assert work.cluster_named("../x") is None
    empty = tmp_path / "config"
    empty.touch()
    options = {"hosts": (), "exclude_hosts": (), "hostfile": None, "config": str(empty), "connect_timeout": None}
    options["accept_new_host_key"] = False
    with pytest.raises(LazyclusterError, match="'tree' is a cluster in the background, not detached work"):
        work.hosts_of("tree", options)
    with pytest.raises(LazyclusterError, match=r"no work 'trane' was started here.*; did you mean 'train' or 'tree'\?"):
        work.hosts_of("trane", options)
    assert work.hosts_of("train", options).names == ["host1"]
    with pytest.raises(LazyclusterError, match="no record of work 'tree'"):
        work.forget("tree")
    work.forget("train")
    assert work.recorded_names() == ["test"]


def test_a_name_is_free_when_work_is_removed_from_all_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state.claim(state.NamedRecord.new("work", "train", hosts=["host1", "host2"], config=None)).close()
    work.removed_from("train", ["host1"])
    record = work._record_of("train")
    assert record is not None
    assert record.details["hosts"] == ["host2"]
    work.removed_from("train", ["host1"])
    assert work.recorded_names() == ["train"]
    work.removed_from("train", ["host2"])
    assert work.recorded_names() == []
    work.removed_from("train", ["host2"])


@pytest.mark.parametrize(
    ("command", "base"),
    [("/usr/bin/python3 x.py", "python3"), ("./run.sh", "runsh"), ("", "work"), ("123", "work"), ("\u00e9\n", "work"),
     ("x" * 99, "x" * 32), ("A=1 b", "A1")],
)  # fmt: skip
def test_a_name_that_is_made_is_one(command: str, base: str) -> None:
    name = work.new_name(command)
    assert state.checked_name(name).rpartition("-")[0] == base
