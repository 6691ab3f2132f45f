"""The small MongoDB server as a program, spoken to with PyMongo and with sockets."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pymongo")

import gridfs
from bson import encode
from pymongo import MongoClient
from pymongo.errors import ConnectionFailure, OperationFailure

from lazycluster.cluster.sent.auth_limit import (
    IDLE_LIMIT,
    LINES,
    MOST_SILENT,
    PERIOD,
    SILENT_LIMIT,
    AuthLimit,
    FewLines,
)
from lazycluster.core.certificates import make_identities
from lazycluster.engines.hyperopt.mongo import scram
from lazycluster.engines.hyperopt.programs import compat, trials, worker

_PASSWORD = "a-secret_of-32-characters"
_HEADER = struct.Struct("<iiii")


class Server:
    """The program, in a process of its own."""

    def __init__(self, path: Path, before: Callable[[], None] | None = None, tls: bool = False) -> None:
        self.path = path
        self.authority, identities = make_identities("database")
        self._identity = identities["database"] if tls else None
        self._before = before
        self.port = 0
        self.clients: list[Any] = []
        self.start()

    def start(self) -> None:
        code = "from lazycluster.engines.hyperopt.mongo.program import main; main()"
        pipe = subprocess.PIPE
        self.log = self.path.with_name("log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=log, text=True, preexec_fn=self._before
            )
        settings = {"ports": {"master": self.port}, "dbpath": str(self.path), "user": "me", "password": _PASSWORD}
        if self._identity is not None:
            settings["tls"] = {"certificate": self._identity.certificate, "key": self._identity.key}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        self.port = json.loads(line.partition(" ")[2])["port"]

    def client(self, password: str | None = _PASSWORD, **options: Any) -> Any:
        login = {} if password is None else {"username": "me", "password": password, "authSource": "admin"}
        self.clients.append(
            MongoClient("127.0.0.1", self.port, **{"serverSelectionTimeoutMS": 5000, **login, **options})
        )
        return self.clients[-1]

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        status = self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return status


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with _server(tmp_path) as server:
        yield server


@contextlib.contextmanager
def _server(path: Path, before: Callable[[], None] | None = None, tls: bool = False) -> Iterator[Server]:
    server = Server(path / "db", before, tls)
    try:
        yield server
    finally:
        for client in server.clients:
            client.close()
        if server.process.poll() is None:
            assert server.end(signal.SIGTERM) == 0


def test_what_was_acknowledged_survives_its_death(server: Server) -> None:
    acknowledged: list[int] = []

    def write(number: int) -> None:
        collection = server.client().db.c
        with contextlib.suppress(ConnectionFailure):
            for value in range(number * 100_000, number * 100_000 + 10_000):
                collection.insert_one({"_id": value})
                acknowledged.append(value)

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, number) for number in range(4)]
        while len(acknowledged) < 100:
            time.sleep(0.01)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        for writer in writers:
            writer.result()
    server.start()
    found = {document["_id"] for document in server.client().db.c.find()}
    assert set(acknowledged) <= found
    assert len(found) <= len(acknowledged) + 4


def test_only_the_owner_can_read_it(server: Server) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o700
    server.client().db.c.insert_one({})
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in server.path.iterdir())
    for password in (None, "wrong"):
        client = server.client(password)
        with pytest.raises(OperationFailure) as caught:
            client.db.c.find_one()
        assert caught.value.code in (13, 18)
        assert client.admin.command("ping")["ok"] if password is None else True


def test_no_trial_is_given_to_two(server: Server) -> None:
    server.client().db.jobs.insert_many([{"_id": number, "state": 0} for number in range(200)])

    def take(_: int) -> list[int]:
        jobs = server.client().db.jobs
        mine = []
        while (job := jobs.find_one_and_update({"state": 0}, {"$set": {"state": 1}})) is not None:
            mine.append(job["_id"])
        return mine

    with ThreadPoolExecutor(8) as pool:
        taken = [number for mine in pool.map(take, range(8)) for number in mine]
    assert sorted(taken) == list(range(200))


def test_a_trial_that_was_put_back_has_no_lease(server: Server) -> None:
    jobs = server.client().db.jobs
    mine = {"_id": 1, "state": trials.RUNNING, "owner": ["worker-0", "worker-0#1"], "version": 3, "lease": 7}
    jobs.insert_one(mine)
    assert [trial["_id"] for trial in trials.leased(jobs)] == [1]
    assert trials.put_back(jobs, "worker-0", "it has gone") == 1
    # As a worker of hyperopt's own takes it, who renews nothing: its trials are left alone.
    taken = {"state": trials.RUNNING, "owner": ["host:1"], "version": 5}
    assert jobs.update_one({"state": trials.NEW}, {"$set": taken}).modified_count == 1
    assert trials.leased(jobs) == []


def test_an_objective_may_be_ended_by_any_signal() -> None:
    assert [worker._how(status) for status in (3, -signal.SIGKILL, -40)] == [
        "exit status 3",
        "signal SIGKILL",
        "signal 40",
    ]


def test_files(server: Server) -> None:
    files = gridfs.GridFS(server.client().db)
    blob = random.Random(1).randbytes(700_000)
    number = files.put(blob, filename="domain", exp_key="one", encoding="utf-8")
    assert files.list() == ["domain"]
    assert files.exists(filename="domain", exp_key="one")
    assert not files.exists(filename="domain", exp_key="two")
    assert files.get_last_version(filename="domain", exp_key="one").read() == blob
    files.delete(number)
    assert files.list() == []


def _message(body: bytes, operation: int = 2013, length: int | None = None) -> bytes:
    return _HEADER.pack(length or 16 + len(body), 1, 0, operation) + body


def test_nobody_is_harmed_by_those_who_talk_nonsense(server: Server) -> None:
    collection = server.client().db.c
    collection.insert_one({"_id": 1})
    hello = b"\0\0\0\0\0" + encode({"hello": 1, "$db": "admin"})
    nonsense = [
        b"GET / HTTP/1.1\r\n\r\n",
        _message(hello, length=-5),
        _message(hello, length=3),
        _message(hello, length=2**31 - 1),
        _message(hello, operation=2012),
        _message(hello[:20]),
        _message(b"\0\0\0\0\x07" + hello[5:]),
        _message(b"\xff\xff\0\0" + hello[4:]),
        _message(b"\0\0\0\0\1\xff\xff\xff\x7fdocuments\0"),
        _message(hello + hello[4:]),
        _message(b"\0\0\0\0db.c\0" + b"\0" * 8 + encode({}), operation=2004),
        os.urandom(2000),
    ]
    for data in nonsense:
        with server.socket() as stranger:
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1000) == b""
    assert collection.find_one() == {"_id": 1}


def test_slow_and_silent_clients(server: Server) -> None:
    collection = server.client().db.c
    collection.insert_many([{"_id": number, "x": b"x" * 1_000_000} for number in range(20)])
    with server.socket() as silent, server.socket() as slow:
        hello = _message(b"\0\0\0\0\0" + encode({"hello": 1, "$db": "admin"}))
        for byte in hello[:-1]:
            slow.send(bytes([byte]))
        began = time.monotonic()
        assert collection.count_documents({}) == 20
        assert time.monotonic() - began < 2
        slow.send(hello[-1:])
        assert b"maxWireVersion" in slow.recv(4000)
        # One that asks again and again and never reads; what it would be sent must not pile up.
        silent.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            for _ in range(100_000):
                silent.sendall(hello * 10)
        assert collection.find_one({"_id": 3}, {"_id": 1}) == {"_id": 3}
        resident = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        assert resident < 150_000_000
    assert len(list(collection.find())) == 20


def test_unacknowledged_writes(server: Server) -> None:
    collection = server.client(w=0).db.c
    collection.insert_one({"_id": 1})
    assert collection.find_one() == {"_id": 1}


def test_strangers_keep_nobody_out(server: Server) -> None:
    hello = _message(b"\0\0\0\0\0" + encode({"hello": 1, "$db": "admin"}))
    with contextlib.ExitStack() as stack:
        speaking = stack.enter_context(server.socket())
        speaking.sendall(hello)
        assert b"maxWireVersion" in speaking.recv(4000)
        silent = [stack.enter_context(server.socket()) for _ in range(MOST_SILENT + 3)]
        assert [one.recv(1) for one in silent[:3]] == [b""] * 3
        collection = server.client().db.c
        collection.insert_one({"_id": 1})
        assert collection.find_one() == {"_id": 1}
        speaking.sendall(hello)
        assert b"maxWireVersion" in speaking.recv(4000)


def _files(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_server_has_as_many_descriptors_as_it_may(tmp_path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < 1000:
        pytest.skip("there may be too few here")
    with _server(tmp_path, _files(128, most)) as server:
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert (soft, hard) == (min(most, 4064), most)


def test_strangers_do_not_use_up_the_descriptors(tmp_path: Path) -> None:
    hello = _message(b"\0\0\0\0\0" + encode({"hello": 1, "$db": "admin"}))
    with _server(tmp_path, _files(192, 192)) as server, contextlib.ExitStack() as stack:
        for _ in range(160):
            stack.enter_context(server.socket()).sendall(hello)
        collection = server.client().db.c
        collection.insert_one({"_id": 1})
        assert collection.find_one() == {"_id": 1}


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Server]:
    """A server as clusters start it, and the file with the certificate by which it is known."""
    with _server(tmp_path, tls=True) as server:
        (tmp_path / "authority.pem").write_text(server.authority)
        yield server


def test_the_server_is_known_by_its_certificate(encrypted: Server, tmp_path: Path) -> None:
    known = {"tls": True, "tlsCAFile": str(tmp_path / "authority.pem")}
    collection = encrypted.client(**known).db.c
    collection.insert_one({"_id": 1, "x": b"x" * 10_000_000})
    assert len(collection.find_one()["x"]) == 10_000_000
    (tmp_path / "another.pem").write_text(make_identities("database")[0])
    for options in ({}, {"tls": True, "tlsCAFile": str(tmp_path / "another.pem")}, {"tls": True}):
        with pytest.raises(ConnectionFailure) as caught:
            encrypted.client(**{**options, "serverSelectionTimeoutMS": 300}).db.c.find_one()
        text = compat.unreachable(caught.value)
        assert "<" not in text
        assert text.startswith("another program than the database" if options else "the database cannot be reached")
    assert collection.count_documents({}) == 1


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"\xff" * 512, b"\x16\x03\x01\xff\xff", b"\0" * 3000]
)
def test_what_is_no_tls_ends_the_connection(encrypted: Server, tmp_path: Path, data: bytes) -> None:
    with encrypted.socket() as stranger:
        stranger.sendall(data)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass
    known = {"tls": True, "tlsCAFile": str(tmp_path / "authority.pem")}
    assert encrypted.client(**known).db.c.find_one() is None


def test_unfinished_handshakes_keep_nobody_out(encrypted: Server, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(encrypted.socket()) for _ in range(MOST_SILENT + 3)]
        for one in silent[3:]:
            one.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake
        assert [one.recv(1) for one in silent[:3]] == [b""] * 3
        known = {"tls": True, "tlsCAFile": str(tmp_path / "authority.pem")}
        assert encrypted.client(**known).db.c.find_one() is None


def test_strangers_do_not_fill_the_log(encrypted: Server, tmp_path: Path) -> None:
    for number in range(5 * LINES):
        with encrypted.socket() as stranger:
            stranger.sendall(b"%d of many" % number)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100)[:0] == b""
    known = {"tls": True, "tlsCAFile": str(tmp_path / "authority.pem")}
    assert encrypted.client(**known).db.c.find_one() is None
    lines = encrypted.log.read_text().splitlines()
    assert len(lines) == LINES
    assert "further such lines are left out" in lines[-1]


def test_lines_are_counted_whatever_they_say() -> None:
    now = [0.0]
    few = FewLines(lambda: now[0])

    def written(level: int, text: str) -> str:
        record = logging.LogRecord("strange", level, "", 1, "%s", (text,), None)
        return record.getMessage() if few.filter(record) else ""

    lines = [written((logging.INFO, logging.ERROR)[number % 2], f"line {number} %d") for number in range(LINES + 50)]
    assert [line for line in lines if line] == [
        *(f"line {number} %d" for number in range(LINES - 1)),
        f"line {LINES - 1} %d [further such lines are left out for a while]",
    ]
    now[0] = PERIOD
    assert written(logging.WARNING, "later %d") == "later %d [50 such lines were left out]"
    assert written(logging.WARNING, "then") == "then"


def test_a_stranger_cannot_keep_the_server_busy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    start = {"saslStart": 1, "mechanism": "SCRAM-SHA-256", "payload": b"n,,n=somebody,r=abc", "$db": "admin"}
    with server.socket() as stranger, contextlib.suppress(OSError):
        stranger.sendall(_message(b"\0\0\0\0\0" + encode(start)) * 1000)
        while stranger.recv(1 << 20):
            pass  # it is cut off, after some answers
    assert server.client().db.c.find_one() is None
    conversation = scram.Conversation(scram.ScramCredentials.of("me", _PASSWORD))
    monkeypatch.setattr(scram, "hashlib", None)  # what is slow is done once, at the start
    assert conversation.answer(start["payload"]).startswith(b"r=abc")


def test_strangers_have_their_time() -> None:
    now, ended = [0.0], []
    strangers: AuthLimit[str] = AuthLimit(lambda: now[0], ended.append)
    for name in ("silent", "idle", "asking", "logged in"):
        strangers.came(name)
    for name in ("idle", "asking", "logged in"):
        strangers.heard(name)
    strangers.gone("logged in")
    now[0] = SILENT_LIMIT - 1
    strangers.sweep()
    assert ended == []
    now[0] = SILENT_LIMIT
    strangers.heard("asking")
    strangers.sweep()
    assert ended == ["silent"]
    now[0] = IDLE_LIMIT
    strangers.sweep()
    assert ended == ["silent", "idle"]
    now[0] = 10 * IDLE_LIMIT
    strangers.sweep()
    strangers.sweep()
    assert ended == ["silent", "idle", "asking"]
