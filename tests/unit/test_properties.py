"""Properties that hold for any input: frames, paths, copies, names of hosts, quoting."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import string
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from lazycluster.agent import stream, wire
from lazycluster.agent.directory_tree import part_name
from lazycluster.agent.files import destination, source
from lazycluster.agent.path_expansion import absolute, expand
from lazycluster.agent.receiver import Receiver
from lazycluster.agent.sender import Sender
from lazycluster.exceptions import printable
from lazycluster.ssh.agent_program import bulk_command, choosing_command, rejoining_stub, remote_command, stub
from lazycluster.ssh.config import Settings, ssh_argv
from lazycluster.ssh.destination import parse_destination
from lazycluster.utils import safe_name

# The same examples in every run: what is new is looked for with LAZYCLUSTER_TEST_EXPLORE=1.
_EXPLORE = bool(os.environ.get("LAZYCLUSTER_TEST_EXPLORE"))


def examples(count: int) -> Any:
    return settings(
        max_examples=count * (20 if _EXPLORE else 1),
        deadline=None,
        derandomize=not _EXPLORE,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# JSON text with anything in it, lone surrogates included: they stand for bytes that are not UTF-8.
texts = st.text(st.characters(), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
messages = st.dictionaries(texts, values, max_size=6)
kinds = st.sampled_from(sorted(wire._KINDS))
payloads = st.binary(max_size=300) | st.integers(300, 20_000).map(bytes)
frames = st.tuples(st.integers(0, 2**32 - 1), kinds, payloads)
cuts = st.lists(st.integers(1, 400) | st.integers(400, 8000), max_size=60)


def portions(data: bytes, lengths: list[int]) -> list[bytes]:
    found = []
    for length in lengths:
        found.append(data[:length])
        data = data[length:]
    return [*found, data]


# --- frames of the agent -----------------------------------------------------------------------
@examples(150)
@given(st.lists(frames, max_size=12), cuts)
def test_frames_arrive_as_they_were_sent(sent: list[tuple[int, int, bytes]], lengths: list[int]) -> None:
    data = b"".join(wire.frame(*one) for one in sent)
    decoder = wire.Decoder()
    assert [one for part in portions(data, lengths) for one in decoder.feed(part)] == sent


@examples(150)
@given(
    st.binary(max_size=2000)
    | st.builds(lambda a, b: wire.frame(*a) + b, frames, st.binary(max_size=200))
    | st.builds(wire.frame, st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=200)),
    cuts,
)
def test_any_bytes_are_frames_or_an_error(data: bytes, lengths: list[int]) -> None:
    decoder = wire.Decoder(wire.FROM_AGENT)
    with contextlib.suppress(wire.FrameError):
        for part in portions(data, lengths):
            for _, kind, payload in decoder.feed(part):
                assert kind in wire._KINDS
                with contextlib.suppress(wire.FrameError):
                    assert isinstance(wire.loads(payload), dict)
    assert len(decoder._buffer) <= len(data)


@examples(150)
@given(st.integers(0, 2**32 - 1), kinds, messages)
def test_messages_arrive_as_they_were_sent(number: int, kind: int, message: dict[str, Any]) -> None:
    [(got_number, got_kind, payload)] = wire.Decoder().feed(wire.json_frame(number, kind, message))
    assert (got_number, got_kind, wire.loads(payload)) == (number, kind, json.loads(json.dumps(message)))


@examples(60)
@given(st.lists(st.binary(max_size=3000), max_size=60))
def test_what_waits_to_be_written_is_written_in_order(parts: list[bytes]) -> None:
    box = wire.Outbox()
    ours, theirs = os.pipe()
    for fd in (ours, theirs):
        os.set_blocking(fd, False)
    got = bytearray()
    try:
        for part in [*parts, b"", b""]:
            box.put(part)
            box.write(theirs)
            with contextlib.suppress(BlockingIOError):
                got += os.read(ours, 1000)
        for _ in range(1000):
            with contextlib.suppress(BlockingIOError):
                got += os.read(ours, 65536)
            box.write(theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert got == b"".join(parts)
    assert box.size == 0


# --- copies ------------------------------------------------------------------------------------
names = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & {0, 47} and name not in (b".", b".."))
parts = st.lists(
    st.sampled_from([b"..", b".", b"", b"a", b"b", b"link", b"file", b"x\0y", b"-rf", b"\xff", b"n\nl"]),
    min_size=1,
    max_size=4,
)
ways_out = st.sampled_from([b"../outside/file", b"../new", b"link/file", b"link/new", b"a/../../new", b"link/../new"])
wild_names = ways_out | st.builds(
    lambda pieces, root: root + b"/".join(pieces), parts, st.sampled_from([b"", b"/", b"//"])
)
targets = st.sampled_from(["../outside", "../outside", "/", "..", "a", "../outside/file", "/etc", "."])


@st.composite
def scripts(draw: Any) -> list[tuple[int, bytes]]:
    """What a host might send that means harm: anything that has the form of a copy."""
    told: list[tuple[int, bytes]] = []
    for _ in range(draw(st.integers(1, 6))):
        name = draw(wild_names).decode("utf-8", "surrogateescape")
        kind = draw(st.sampled_from("ffldx"))
        mtime = draw(st.sampled_from([0, 1, 2**62, -1, 2**63]))
        mode = draw(st.sampled_from([0o755, 0o4777, 0, -1, 2**40]))
        entry = ["l", name, mtime, draw(targets)] if kind == "l" else [kind, name, mtime, mode, 4]
        told.append((stream.ENTRIES, json.dumps([entry]).encode()))
        if kind == "f" and draw(st.booleans()):
            told.append((stream.DATA, b"evil"))
            summary = stream.SUMMARY.pack(4, 0o4777, 1)
            told.append((draw(st.sampled_from([stream.LAST, stream.LAST, stream.SAME])), summary))
    return told


@examples(150)
@given(scripts(), st.booleans(), st.booleans(), st.sampled_from(["x", "..", "/etc/x", "", ".ssh"]))
def test_nothing_is_written_outside_whatever_a_host_sends(
    script: list[tuple[int, bytes]], folder: bool, there: bool, name: str
) -> None:
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        (top / "outside").mkdir(mode=0o750)
        (top / "outside" / "file").write_text("mine")
        if there:
            (top / "to" / "a").mkdir(parents=True)
            (top / "to" / "link").symlink_to("../outside")
        before = _everything(top, b"to")
        start = (stream.START, json.dumps({"folder": folder, "name": name, "now": time.time_ns()}).encode())
        _receive([start, *script], top / "to")
        assert _everything(top, b"to") == before
        for path in top.rglob("*"):
            assert path.lstat().st_mode & 0o7000 == 0


def _everything(top: Path, but: bytes) -> dict[bytes, Any]:
    found: dict[bytes, Any] = {}
    for folder, folders, files in os.walk(os.fsencode(top)):
        if folder == os.fsencode(top):
            folders[:] = [name for name in folders if name != but]
            files = [name for name in files if name != but]
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            inode = os.lstat(path)
            found[path] = inode.st_mode, inode.st_mtime_ns, inode.st_size
    return found


def _receive(script: list[tuple[int, bytes]], to: Path) -> None:
    ours, theirs = socket.socketpair()
    told = b"".join(struct.pack("!BI", kind, len(data)) + data for kind, data in script)
    ends = struct.pack("!BI", stream.END, 2) + b"[]" + struct.pack("!BI", stream.ABORT, 2) + b"{}"
    with ours, theirs:
        theirs.sendall(told + ends)  # short enough for the buffers of a socket
        theirs.shutdown(socket.SHUT_WR)
        receiver = Receiver(
            stream.FrameStream(ours.fileno(), ours.fileno()),
            lambda folder, name: destination(os.fsencode(to), b"/", {}, folder, name),
            stream.ByteCounter(),
        )
        with contextlib.suppress(stream.CopyError, stream.StreamClosedError):
            receiver.run()


trees = st.dictionaries(
    st.lists(names, min_size=1, max_size=3).map(tuple), st.binary(max_size=200) | st.just("folder") | names.map(str),
    max_size=8,
)  # fmt: skip


@examples(40)
@given(trees)
def test_a_tree_arrives_as_it_is(tree: dict[tuple[bytes, ...], Any]) -> None:
    with tempfile.TemporaryDirectory() as made:
        root, there = os.path.join(os.fsencode(made), b"from"), os.path.join(os.fsencode(made), b"to")
        os.mkdir(root)
        for path, content in tree.items():
            _make(root, path, content)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            tally = stream.ByteCounter()
            sender = Sender(stream.FrameStream(theirs.fileno(), theirs.fileno()), lambda: source(root, b"/", {}), tally)
            sending = threading.Thread(target=sender.run)
            sending.start()
            receiving = stream.FrameStream(ours.fileno(), ours.fileno())
            Receiver(receiving, lambda f, n: destination(there, b"/", {}, f, n), stream.ByteCounter()).run()
            sending.join()
        assert _contents(there) == _contents(root)


def _make(root: bytes, path: tuple[bytes, ...], content: Any) -> None:
    where = os.path.join(root, *path)
    with contextlib.suppress(OSError):  # a file where another entry wants a folder
        os.makedirs(os.path.dirname(where), exist_ok=True)
        if content == "folder":
            os.mkdir(where)
        elif isinstance(content, str):
            os.symlink(content, where)
        else:
            with open(where, "xb") as file:
                file.write(content)


def _contents(root: bytes) -> dict[bytes, Any]:
    found: dict[bytes, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            kind: Any = os.readlink(path) if os.path.islink(path) else os.path.isdir(path)
            content = Path(os.fsdecode(path)).read_bytes() if kind is False else b""
            found[os.path.relpath(path, root)] = kind, content, os.lstat(path).st_mtime_ns
    return found


@examples(100)
@given(st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & {0, 47}))
def test_names_of_unfinished_files(name: bytes) -> None:
    part = part_name(name)
    assert part.startswith(b".") and b"/" not in part and b"\0" not in part and len(part) < 255
    assert part != part_name(name)


# --- paths -------------------------------------------------------------------------------------
plain_paths = st.binary(max_size=40).filter(lambda path: not set(path) & {0, ord("$")} and not path.startswith(b"~"))


@examples(150)
@given(plain_paths)
def test_a_path_without_variables_is_what_it_says(path: bytes) -> None:
    assert expand(path, {}) == path


@examples(100)
@given(
    plain_paths,
    st.dictionaries(st.sampled_from(["A", "B_1", "HOME"]), st.text(string.printable, max_size=9).filter(
        lambda text: "\0" not in text) | st.sampled_from(["$A", "${B_1}/x", "$HOME", "~"]), min_size=3),
    plain_paths,
)  # fmt: skip
def test_variables_are_replaced_once(before: bytes, env: dict[str, str], after: bytes) -> None:
    """What comes out of a variable is not looked at again, as in a shell in double quotes."""
    a, b = env["A"].encode(), env["B_1"].encode()
    assert expand(before + b"${A}" + after, env) == before + a + after
    assert expand(b"/$A/$B_1/" + after, env) == b"/" + a + b"/" + b + b"/" + after
    assert expand(b"$NO_SUCH_VARIABLE_" + after, {}) == b"$NO_SUCH_VARIABLE_" + after or after[:1].isalnum()


@examples(100)
@given(plain_paths, plain_paths)
def test_paths_are_absolute(path: bytes, cwd: bytes) -> None:
    whole = absolute(path, cwd, {"HOME": "/home/me"})
    assert whole.startswith(b"/")
    if path.startswith(b"/"):
        assert whole == path


# --- names -------------------------------------------------------------------------------------
@examples(300)
@given(st.text(max_size=30) | st.text(st.sampled_from("ab-@:[]/.%=,$`'\"\\ \n\t;&|{}"), max_size=12))
@example("-oProxyCommand=x")
@example("ssh://-x@y")
def test_a_host_is_refused_or_harmless(text: str) -> None:
    try:
        user, host, port = parse_destination(text)
    except ValueError as error:
        assert str(error).isprintable()
        return
    for name in (host, user or "x"):
        assert name
        assert not name.startswith("-")
        assert not set(name) & set(" \n\t\0'`\";&<>|(){}")
        assert name.isprintable()
    assert port is None or 0 < port < 65536
    argv = ssh_argv(Settings.parse(text), "/tmp/x", "true", (9, 2))
    assert argv[-3:] == ["--", host, "true"]


labels = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)


@examples(150)
@given(st.none() | labels, labels | st.just("fe80::1"), st.none() | st.integers(1, 65535))
def test_a_host_is_taken_apart_as_it_was_put_together(user: str | None, host: str, port: int | None) -> None:
    assume(":" not in host or port is None)
    text = (f"{user}@" if user else "") + host + (f":{port}" if port else "")
    assert parse_destination(text) == (user, host, port)
    if ":" in host:
        assert parse_destination(f"[{host}]:22") == (None, host, 22)


@examples(300)
@given(texts | st.text(max_size=300), texts)
def test_a_name_stays_in_its_directory_and_differs_from_others(one: str, other: str) -> None:
    name = safe_name(one)
    assert name not in ("", ".", "..")
    assert len(os.fsencode(name)) <= 120
    assert not set(name) & set("/\0\n %") - {"%"}
    assert (safe_name(other) == name) == (one == other)


@examples(200)
@given(st.text(st.characters(), max_size=60))
def test_what_is_shown_is_harmless(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert not set(shown) & {"\x1b", "\x07", "\r", "\x08", "\x7f", "\x9b", "\u202e"}
    assert printable(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


# --- quoting -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shell", ["sh", "bash"])
@examples(25)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12))
@example('it\'s; $(touch x) `y` "z" \\')
@example("-c")
@example("line\nbreak")
def test_an_interpreters_name_is_one_word_for_a_shell(shell: str, python: str) -> None:
    """The one line that a login shell is given, with `printf` in the place of `exec PYTHON`."""
    sockets = ["/tmp/it's $HOME/agent.sock", "/caf\u00e9/agent.sock"]
    programs = (stub("0123"), rejoining_stub("0123", sockets, 7))
    commands = [bulk_command(python, "0123", sockets, 7)]
    commands += [remote_command(python, program) for program in programs]
    commands += [choosing_command("0123", program, python) for program in programs]
    for command in commands:
        line = "printf '%s\\0' " + command.rsplit("exec ", 1)[1]
        done = subprocess.run([shell, "-c", line], capture_output=True, check=True)
        words = done.stdout.decode().split("\0")
        assert words[:2] == [python, "-ISc"]
        assert len(words) == 4
        compile(words[2], "stub", "exec")
    assert shlex.split(shlex.join([python])) == [python]
