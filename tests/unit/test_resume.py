"""A session whose streams drop anywhere: whatever is said arrives, once and in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycluster.agent import ssh_session, wire
from lazycluster.agent.partial_files import PartialFile, PartialFiles, received
from lazycluster.agent.receiver import Receiver
from lazycluster.agent.sender import Sender
from lazycluster.agent.session import FrameSession, RequestChannel
from lazycluster.agent.spool import Spool
from lazycluster.agent.stream import ByteCounter, FrameStream
from lazycluster.ssh.link import AgentLink


class Side:
    """One end: what it sends goes through a pipe to the other."""

    def __init__(self) -> None:
        self.outbox = wire.Outbox()
        self.outbox.retains = True
        self.decoder = wire.Decoder()
        self.got: list[tuple[int, int, bytes]] = []
        self.sent: list[tuple[int, int, bytes]] = []
        self.pipe: tuple[int, int] = (-1, -1)
        self.connect()

    def connect(self) -> None:
        self.close()
        self.pipe = os.pipe()
        for fd in self.pipe:
            os.set_blocking(fd, False)

    def close(self) -> None:
        for fd in self.pipe:
            if fd >= 0:
                os.close(fd)

    def send(self, size: int) -> None:
        frame = (len(self.sent), wire.STDOUT, os.urandom(size))
        self.sent.append(frame)
        self.outbox.put(wire.frame(*frame))

    def receive(self, data: bytes) -> None:
        self.got += self.decoder.feed(data)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 1), st.integers(0, 3000)),
        st.tuples(st.just("move"), st.integers(0, 1), st.integers(1, 4000)),
        st.tuples(st.just("acknowledge"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("cut"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def _step(sides: list[Side], what: str, which: int, size: int) -> None:
    side, other = sides[which], sides[1 - which]
    if what == "send":
        side.send(size)
    elif what == "move":
        side.outbox.write(side.pipe[1])
        with contextlib.suppress(BlockingIOError):
            other.receive(os.read(side.pipe[0], size))
    elif what == "acknowledge":
        other.outbox.acknowledge(side.decoder.total)
    else:
        for one in sides:
            one.connect()
        for one, peer in ((side, other), (other, side)):
            one.outbox.rewind(peer.decoder.total)


@given(STEPS)
@settings(deadline=None, max_examples=150)
def test_nothing_is_lost_or_doubled_wherever_the_streams_are_cut(steps: list[tuple[str, int, int]]) -> None:
    sides = [Side(), Side()]
    try:
        for what, which, size in [*steps, ("cut", 0, 0)]:
            _step(sides, what, which, size)
        for which in (0, 1):
            while sides[which].outbox.size or sides[which].sent != sides[1 - which].got:
                before = sides[1 - which].decoder.total
                _step(sides, "move", which, 4000)
                assert sides[1 - which].decoder.total > before
            _step(sides, "acknowledge", 1 - which, 0)
            assert sides[which].outbox.held == 0
    finally:
        for side in sides:
            side.close()


@given(st.integers(-5, 200))
def test_more_than_was_sent_cannot_have_arrived(total: int) -> None:
    outbox = wire.Outbox()
    outbox.retains = True
    read, write = os.pipe()
    try:
        outbox.put(b"x" * 100)
        outbox.write(write)
        outbox.acknowledge(40)
        if total > 100:
            with pytest.raises(wire.FrameError):
                outbox.acknowledge(total)
        else:
            outbox.acknowledge(total)
            assert outbox.held == 100 - max(40, total)
        if total < 40:
            with pytest.raises(wire.FrameError):
                outbox.rewind(total)
    finally:
        os.close(read)
        os.close(write)


# --- the two real ends ----------------------------------------------------------------------------
class Reactor:
    """The agent's reactor, for a test that has an event loop already."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.add_reader, self.remove_reader = loop.add_reader, loop.remove_reader
        self.add_writer, self.remove_writer = loop.add_writer, loop.remove_writer
        self.call_later = loop.call_later


class Echo:
    """An agent that answers each input with as much output, and the end of it with what it counted."""

    def __init__(self, directory: str) -> None:
        self.loop: Any = Reactor()
        self.directory = directory
        self.identity = "echo"
        self.ended = asyncio.Event()
        self.errors: list[Exception] = []

    def handle(self, channel: RequestChannel) -> None:
        count = 0

        def take(data: bytes) -> None:
            nonlocal count
            count += len(data)
            channel.consumed(len(data))
            channel.output(data)
            channel.event(count=count)

        channel.on_input = take
        channel.on_input_end = lambda: channel.result(count=count)

    def heard(self) -> None:
        pass

    def streams_ended(self, session: FrameSession, error: Exception | None) -> None:
        if isinstance(error, wire.FrameError):
            self.errors.append(error)
        session.mute()
        self.ended.set()


class Wire:
    """Two socket pairs with a carrier between, who drops everything after so many bytes."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        pairs = [socket.socketpair() for _ in range(2)]
        self.manager, self.agent = pairs[0][0], pairs[1][0]
        self._ends = [pairs[0][1], pairs[1][1]]
        for end in self._ends:
            end.setblocking(False)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._carry(*ends)) for ends in (self._ends, self._ends[::-1])]

    async def _carry(self, source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 5000):
            part = data[: self._left]
            self._left -= len(part)
            await loop.sock_sendall(target, part)
            if not self._left:
                break
        for end in self._ends:
            end.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in self._ends:
            end.close()


def descriptors(end: socket.socket) -> tuple[int, int]:
    fd = end.detach()
    return fd, os.dup(fd)


async def _conversation(directory: Path, sizes: list[int], cuts: list[int]) -> None:
    agent = Echo(str(directory))
    session = FrameSession(agent)
    session.retain()
    manager_ended = asyncio.Event()
    line = Wire(cuts[0])
    session.attach(*descriptors(line.agent))
    link = AgentLink("host", *descriptors(line.manager), lambda error: manager_ended.set())
    link.begin_retaining()
    out, counts = bytearray(), []
    channel = link.open_channel("echo", {}, output=out.extend, event=lambda said: counts.append(said["count"]))
    data = [os.urandom(size) for size in sizes]

    async def talk() -> dict[str, Any]:
        for part in data:
            await channel.send(part)
        await channel.send_end()
        return await channel.result()

    talking = asyncio.ensure_future(talk())
    for budget in [*cuts[1:], 1 << 40]:
        ending = [asyncio.ensure_future(event.wait()) for event in (manager_ended, agent.ended)]
        await asyncio.wait([talking, asyncio.gather(*ending)], return_when=asyncio.FIRST_COMPLETED)
        for waiting in ending:
            waiting.cancel()
        if talking.done():
            break
        assert not agent.errors
        await line.close()
        session.detach()
        link.detach()
        manager_ended.clear()
        agent.ended.clear()
        line = Wire(budget)
        link.rewind(session.received)
        session.rewind(link.received)
        session.attach(*descriptors(line.agent))
        link.attach(*descriptors(line.manager))
    assert (await asyncio.wait_for(talking, 20)) == {"count": sum(sizes)}
    assert bytes(out) == b"".join(data)
    assert counts == sorted(set(counts))
    assert counts[-1] == sum(sizes)
    session.close()
    link.lost("the end")
    await line.close()


def _run(work: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(work, 60))
    finally:
        loop.close()


@given(
    st.lists(st.integers(1, 400_000), min_size=1, max_size=6),
    st.lists(st.one_of(st.integers(1, 300), st.integers(1, 500_000)), min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=40)
def test_a_channel_does_not_notice_that_its_streams_drop(sizes: list[int], cuts: list[int]) -> None:
    _run(_conversation(Path("/nonexistent"), sizes, cuts))


# --- output that waits ----------------------------------------------------------------------------
def with_session(body: Callable[[FrameSession, Echo], None], directory: Path) -> None:
    async def whole() -> None:
        agent = Echo(str(directory))
        body(FrameSession(agent), agent)

    _run(whole())


def test_output_of_a_host_that_cannot_be_reached_goes_to_a_file_and_comes_in_order(tmp_path: Path) -> None:
    piece = bytes(range(256)) * 1024

    def body(session: FrameSession, agent: Echo) -> None:
        session.retain()
        channel = RequestChannel(session, 1, {})
        count = 0
        while session.writable and count < 200:  # 50 MB: far more than memory is meant for
            channel.stdout(count.to_bytes(4, "big") + piece[4:])
            count += 1
        assert count == 200
        assert list(tmp_path.iterdir()) == []  # it has no name
        read, write = os.pipe()
        silent, held = os.pipe()
        decoder, got = wire.Decoder(), []
        try:
            session.attach(silent, write)
            os.set_blocking(read, False)
            while len(got) < count:
                got += decoder.feed(os.read(read, 1 << 20))
                session._drain()
        finally:
            os.close(read)
            os.close(held)
        assert [payload[:4] for _, _, payload in got] == [n.to_bytes(4, "big") for n in range(count)]
        assert all(payload[4:] == piece[4:] for _, _, payload in got)
        session.close()

    with_session(body, tmp_path)


def test_who_prints_has_to_wait_when_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazycluster.agent.spool.LIMIT", 1_000_000)

    def body(session: FrameSession, agent: Echo) -> None:
        channel = RequestChannel(session, 1, {})
        count = 0
        while session.writable:
            channel.stdout(bytes(100_000))
            count += 1
            assert count < 100
        assert count > 45
        session.close()

    with_session(body, tmp_path)


def test_a_full_disk_loses_nothing_and_lets_no_more_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(str(tmp_path))
    written = 0
    real = os.pwrite

    def pwrite(fd: int, data: Any, position: int) -> int:
        nonlocal written
        if written >= 150:
            raise OSError(errno.ENOSPC, "no space left on device")
        written += 100
        return real(fd, bytes(data)[:100], position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    spool.put(b"a" * 100)
    assert not spool.full
    spool.put(b"b" * 150)
    spool.put(b"c" * 10)
    assert spool.full
    assert spool.size == 260
    got = b""
    while spool.size:
        got += spool.take()
    assert got == b"a" * 100 + b"b" * 150 + b"c" * 10
    spool.close()


def test_without_any_place_for_a_file_memory_has_to_do(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "missing"))
    assert spool.full
    spool.put(b"abc")
    assert spool.take() == b"abc"
    spool.close()


# --- hosts that end everything at logout ----------------------------------------------------------
MAIN = "etc/systemd/logind.conf"


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, False),
        ({MAIN: "[Login]\n#KillUserProcesses=yes\n"}, False),
        ({MAIN: "[Login]\nKillUserProcesses=yes\n"}, True),
        ({MAIN: "KillUserProcesses=yes\n", "etc/systemd/logind.conf.d/a.conf": "KillUserProcesses=no"}, False),
        ({"usr/lib/systemd/logind.conf.d/a.conf": "KillUserProcesses = true"}, True),
        ({MAIN: "KillUserProcesses=yes\nKillExcludeUsers=root ME\n"}, False),
        ({MAIN: "KillUserProcesses=yes\nKillOnlyUsers=somebody\n"}, False),
        ({MAIN: "KillUserProcesses=yes\nKillExcludeUsers=\nKillOnlyUsers=ME\n"}, True),
    ],
)  # fmt: skip
def test_whether_the_system_ends_processes_at_logout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], kills: bool
) -> None:
    monkeypatch.setattr(ssh_session, "_user", lambda: "me")
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("ME", "me"))
    why = ssh_session.kills_at_logout(str(tmp_path), session="5")
    assert bool(why) == kills
    assert not why or "KillUserProcesses=yes in /" in why


def test_without_a_session_of_logind_nothing_is_ended_at_logout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_SESSION_ID", raising=False)
    (tmp_path / "etc/systemd").mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf").write_text("KillUserProcesses=yes\n")
    assert ssh_session.kills_at_logout(str(tmp_path)) == ""


# --- files that are not complete ------------------------------------------------------------------
def unnamed(directory: Path, data: bytes) -> int:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, data)
    return fd


@pytest.mark.parametrize(("now", "sent"), [(b"x" * 100 + b"y" * 900, 900), (b"z" * 1000, 1000)])
def test_a_part_of_a_file_that_has_grown_is_taken_up_if_it_is_its_beginning(
    tmp_path: Path, now: bytes, sent: int
) -> None:
    parts, source, there = PartialFiles(), tmp_path / "source", tmp_path / "there"
    source.write_bytes(now)
    parts.put(PartialFile(os.fsencode(there), 500, 5, unnamed(tmp_path, b"x" * 100), 100))
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        place = lambda folder, name: (os.fsencode(tmp_path), b"there", False)  # noqa: E731
        receiver = Receiver(FrameStream(ours.fileno(), ours.fileno()), place, ByteCounter(), parts)
        stream = FrameStream(theirs.fileno(), theirs.fileno())
        went: list[int] = []
        fill = stream.fill
        stream.fill = lambda kind, length: (went.append(length), fill(kind, length))[1]  # type: ignore[method-assign]
        receiving = threading.Thread(target=receiver.run)
        receiving.start()
        Sender(stream, lambda: (os.fsencode(source), b"source"), ByteCounter()).run()
        receiving.join()
    assert (there.read_bytes(), sum(went)) == (now, sent)
    parts.close()


def test_a_part_with_holes_is_taken_up(tmp_path: Path) -> None:
    """Its end may be a hole, which was never written."""
    parts, source, there = PartialFiles(), tmp_path / "source", tmp_path / "there"
    with source.open("wb") as file:
        file.write(b"begin")
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"middle")
    fd = unnamed(tmp_path, b"begin")
    os.ftruncate(fd, 1 << 38)
    mtime = source.stat().st_mtime_ns
    parts.put(PartialFile(os.fsencode(there), 1 << 40, mtime, fd, 1 << 38))
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        place = lambda folder, name: (os.fsencode(tmp_path), b"there", False)  # noqa: E731
        receiver = Receiver(FrameStream(ours.fileno(), ours.fileno()), place, ByteCounter(), parts)
        stream = FrameStream(theirs.fileno(), theirs.fileno())
        receiving = threading.Thread(target=receiver.run)
        receiving.start()
        counter = ByteCounter()
        Sender(stream, lambda: (os.fsencode(source), b"source"), counter).run()
        receiving.join()
    with there.open("rb") as file:
        assert file.read(10) == b"begin" + bytes(5)
        assert os.pread(file.fileno(), 10, 1 << 39) == b"middle" + bytes(4)
    assert there.stat().st_size == 1 << 40
    assert there.stat().st_blocks <= 2 * source.stat().st_blocks + 128
    parts.close()


def test_a_part_is_taken_up_by_one_and_only_while_it_has_no_name(tmp_path: Path) -> None:
    first, second = PartialFiles(), PartialFiles()
    fd = unnamed(tmp_path, b"x" * 100)
    part = PartialFile(b"/to/file", 1000, 5, fd, 100)
    first.put(part)
    second.put(part._replace(fd=os.dup(fd)))
    assert first.take(b"/to/file", 1000, 6) is None
    assert first.take(b"/to/other", 1000, 5) is None
    taken = first.take(b"/to/file", 1000, 5)
    assert taken is not None
    assert taken[:3] == part[:3]
    assert second.take(b"/to/file", 1000, 5) is None  # another process has it
    third = PartialFiles()
    third.put(taken._replace(fd=os.dup(taken.fd)))
    folder = os.open(tmp_path, os.O_RDONLY)
    os.link(f"/proc/self/fd/{taken.fd}", "file", dst_dir_fd=folder)  # with it, links are followed
    os.close(folder)
    os.close(taken.fd)
    assert third.take(b"/to/file", 1000, 5) is None  # it is somebody's file by now
    assert (tmp_path / "file").read_bytes() == b"x" * 100


def test_parts_are_handed_over_and_only_the_latest_few_are_kept(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    parts, heir = PartialFiles(), PartialFiles()
    for number in range(10):
        parts.put(PartialFile(b"/caf\xe9%d" % number, 10, 20, unnamed(tmp_path, b"abc"), 3))
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            parts.send_to(theirs)
        while part := received(ours):
            heir.put(part)
    parts.close()
    assert len(heir.descriptors) == 4
    taken = heir.take(b"/caf\xe99", 10, 20)
    assert taken is not None
    assert os.pread(taken.fd, 10, 0) == b"abc"
    os.close(taken.fd)
    heir.close()
    heir.put(PartialFile(b"/late", 1, 2, unnamed(tmp_path, b"x"), 1))
    assert heir.descriptors == []
    assert set(os.listdir("/proc/self/fd")) <= before
