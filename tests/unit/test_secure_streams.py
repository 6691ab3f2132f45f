"""Streams over TLS between two hosts: who may take part, and that nothing is lost or waits for ever."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("cryptography")

from lazycluster.agent.direct_copy import Party
from lazycluster.agent.secure_stream import SecureStream, TlsCredentials, check
from lazycluster.agent.stream import DATA, END, StreamClosedError
from lazycluster.core.certificates import make_identities

SIZE = 5_000_000


def credentials(*names: str) -> dict[str, TlsCredentials]:
    authority, identities = make_identities(*names)
    return {
        name: TlsCredentials({"certificate": one.certificate, "key": one.key, "authority": authority})
        for name, one in identities.items()
    }


def never() -> bool:
    return False


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.0\r\n\r\n"])
def test_strangers_who_say_nothing_or_nonsense_do_not_keep_the_host_before_waiting(said: bytes) -> None:
    known = credentials("before", "after")
    party = object.__new__(Party)
    party._credentials, party._previous = known["after"], "lazycluster before"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        strangers = [socket.create_connection(listener.getsockname()) for _ in range(20)]
        for stranger in strangers:
            stranger.sendall(said)

        def connect() -> None:
            plain = socket.create_connection(listener.getsockname(), timeout=10.0)
            with known["before"].context(server=False).wrap_socket(plain) as connection:
                assert connection.recv(1) == b""

        thread = threading.Thread(target=connect)
        thread.start()
        with party._accepted(listener) as connection:
            check(connection, "lazycluster before")
        thread.join(30.0)
        for stranger in strangers:
            stranger.close()


def between(
    server: TlsCredentials,
    client: TlsCredentials,
    serve: Callable[[ssl.SSLSocket], Any],
    use: Callable[[ssl.SSLSocket], Any],
) -> list[Any]:
    """Have two parties talk; returns what comes of it on both sides."""
    ours, theirs = socket.socketpair()
    found: list[Any] = [None, None]

    def side(number: int, plain: socket.socket, own: TlsCredentials, work: Callable[[ssl.SSLSocket], Any]) -> None:
        try:
            with own.context(server=not number).wrap_socket(plain, server_side=not number) as connection:
                found[number] = work(connection)
        except (OSError, StreamClosedError) as error:
            found[number] = error
            plain.close()

    threads = [
        threading.Thread(target=side, args=(0, ours, server, serve)),
        threading.Thread(target=side, args=(1, theirs, client, use)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_what_is_sent_arrives() -> None:
    """More than the buffers of TLS and of the system hold together."""
    data = os.urandom(SIZE)
    parties = credentials("a", "b")

    def receive(connection: ssl.SSLSocket) -> bytes:
        stream, parts = SecureStream(connection, never), []
        while stream.header() == DATA:
            parts.append(stream.payload())
        stream.put(END)
        stream.flush()
        return b"".join(parts)

    def send(connection: ssl.SSLSocket) -> Any:
        stream = SecureStream(connection, never)
        for start in range(0, SIZE, 200_000):
            stream.put(DATA, data[start : start + 200_000])
            assert not stream.readable()
        stream.put(END)
        stream.flush()
        return stream.header()

    assert between(parties["a"], parties["b"], receive, send) == [data, END]


def test_each_side_must_be_the_one_that_is_expected() -> None:
    """Another host of the same copy is as wrong as a stranger."""
    parties = credentials("a", "b", "c")

    def knows(name: str) -> Callable[[ssl.SSLSocket], None]:
        return lambda connection: check(connection, f"lazycluster {name}")

    assert between(parties["a"], parties["b"], knows("b"), knows("a")) == [None, None]
    found = between(parties["a"], parties["c"], knows("b"), knows("a"))
    assert "lazycluster c is there, not lazycluster b" in str(found[0])
    stranger = credentials("b")["b"]
    found = between(parties["a"], stranger, knows("b"), knows("a"))
    assert all(isinstance(one, ssl.SSLError) for one in found)


def test_who_has_no_certificate_is_sent_away() -> None:
    parties = credentials("a")
    ours, theirs = socket.socketpair()
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    found: list[Any] = []

    def serve() -> None:
        try:
            parties["a"].context(server=True).wrap_socket(ours, server_side=True)
        except ssl.SSLError as error:
            found.append(error)
        ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with theirs, anybody.wrap_socket(theirs) as connection, pytest.raises((ssl.SSLError, OSError)):
        connection.sendall(b"x")
        assert connection.recv(1)
        raise OSError
    thread.join(30)
    assert "certificate" in str(found[0])


def test_no_file_holds_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Where there are no files in memory, it is private and gone at once."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[int] = []
    loading = ssl.SSLContext.load_cert_chain

    def load(context: ssl.SSLContext, path: str) -> None:
        seen.extend(one.stat().st_mode & 0o777 for one in tmp_path.iterdir())
        loading(context, path)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load)
    party = credentials("a")["a"]
    party.context(server=True)
    assert not seen
    monkeypatch.delattr(os, "memfd_create", raising=False)
    party.context(server=True)
    assert seen == [0o600]
    assert not list(tmp_path.iterdir())


def test_nobody_waits_for_what_was_given_up() -> None:
    """The other side is there, and says nothing."""
    parties = credentials("a", "b")
    given_up, over = threading.Event(), threading.Event()

    def wait(connection: ssl.SSLSocket) -> Any:
        try:
            given_up.set()
            return SecureStream(connection, given_up.is_set).header()
        finally:
            over.set()

    found = between(parties["a"], parties["b"], wait, lambda _: over.wait(30))
    assert "nobody waits for it any more" in str(found[0])
