"""Frames between two hosts, over TLS: each side knows the other by a certificate of this one copy."""

from __future__ import annotations

import os
import select
import socket
import ssl
import tempfile
from typing import Any, Callable, Dict

from .stream import FrameStream, StreamClosedError

_EARLY = 64 * 1024
_LOOK_EVERY = 1000  # milliseconds
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))  # seconds, seconds, times
_UNACKNOWLEDGED = 25_000  # milliseconds after which a link counts as cut
_TCP_USER_TIMEOUT = 18


class SecureStream(FrameStream):
    """Frames over TLS, whose handshake is over. For one thread.

    Args:
        connection: The socket, which stays the caller's to close.
        is_given_up: Tells whether the other side is not to be waited for any more.
    """

    def __init__(self, connection: ssl.SSLSocket, is_given_up: Callable[[], bool]) -> None:
        super().__init__(connection.fileno(), connection.fileno())
        connection.setblocking(False)
        self._socket, self._is_given_up = connection, is_given_up
        self._early = b""  # what was read to know whether there is something

    def _transmit(self, data: memoryview) -> int:
        while True:
            try:
                return self._socket.send(data)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def _receive(self, place: memoryview) -> int:
        if self._early:
            count = min(len(self._early), len(place))
            place[:count] = self._early[:count]
            self._early = self._early[count:]
            return count
        filled = 0
        while filled < len(place):  # one call returns 16 KiB at most
            try:
                count = self._socket.recv_into(place[filled:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                if filled:
                    break
                self._wait(select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT)
                continue
            if not count:
                break  # the next call tells the end once more
            filled += count
        return filled

    def _has_more(self) -> bool:
        # That there are bytes says nothing: they may be about the session only.
        if not self._early:
            try:
                self._early = self._socket.recv(_EARLY)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            except OSError as error:
                raise StreamClosedError(str(error)) from error
            if not self._early:
                raise StreamClosedError("it has ended")
        return True

    def _wait(self, event: int) -> None:
        ready = select.poll()
        ready.register(self._socket, event)
        while not ready.poll(_LOOK_EVERY):
            if self._is_given_up():
                raise StreamClosedError("nobody waits for it any more")


class TlsCredentials:
    """Certificate and key of one host, and the authority that has signed those of all.

    Args:
        texts: ``certificate``, ``key`` and ``authority``, as PEM text.
    """

    def __init__(self, texts: Dict[str, str]) -> None:
        self._texts = texts

    def context(self, server: bool) -> ssl.SSLContext:
        """Return what makes connections that both sides have to prove themselves on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # `check` asks for the one party that it must be
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=self._texts["authority"])
        path = _private_file(self._texts["certificate"] + self._texts["key"])
        try:
            context.load_cert_chain(path)
        finally:
            os.unlink(path) if not path.startswith("/proc/") else os.close(int(os.path.basename(path)))
        return context


def _private_file(text: str) -> str:
    """Return the path of a file that only this user can read, where possible one in memory that nobody else sees."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        fd = os.memfd_create("tls")
        path = "/proc/self/fd/{}".format(fd)
    else:
        fd, path = tempfile.mkstemp(prefix="tls-")
    with open(fd, "w", closefd=not path.startswith("/proc/")) as file:
        file.write(text)
    return path


def check(connection: ssl.SSLSocket, party: str) -> None:
    """Check who is at the other end.

    Raises:
        OSError: Another one than the party that is meant.
    """
    found: Any = connection.getpeercert() or {}
    names = [value for part in found.get("subject", ()) for name, value in part if name == "commonName"]
    if names != [party]:
        raise OSError("{} is there, not {}".format(names[0] if names else "nobody known", party))


def notice_cuts(connection: socket.socket) -> None:
    """Have a connection end whose link is cut, within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = [(getattr(socket, name, None), value) for name, value in _KEEPALIVE]
    options.append((getattr(socket, "TCP_USER_TIMEOUT", _TCP_USER_TIMEOUT), _UNACKNOWLEDGED))
    for option, value in options:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)  # type: ignore[arg-type]
        except (OSError, TypeError):
            pass  # this system has no such option
