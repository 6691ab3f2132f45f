"""Ports on the host's loopback: which are free, and whether two parties share one network."""

from __future__ import annotations

import errno
import os
import socket
from typing import List, Optional

from .session import RequestChannel

_NONCE_LIMIT = 10.0
_ELSEWHERE = "127.0.0.2"  # an address of every Linux host, that nobody who means 127.0.0.1 listens on


def is_free(port: int) -> Optional[int]:
    """Return None if a service could listen on the port now, else the errno that tells why not."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")):  # noqa: S104
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do, so that connections which just ended (TIME_WAIT) do not count as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:
                    continue  # no IPv6 here
                return error.errno
    return None


def free(channel: RequestChannel) -> None:
    """Handle the request `ports`: tell which of some ports are free, or only the first that is."""
    found: List[int] = []
    denied: List[int] = []
    for port in channel.params["ports"]:
        why = is_free(port)
        if why is None:
            found.append(port)
            if channel.params.get("first"):
                break
        elif why in (errno.EACCES, errno.EPERM):
            denied.append(port)
    channel.result(free=found, denied=denied)


def exposed(channel: RequestChannel) -> None:
    """Handle the request `exposed`: tell on which of some ports somebody listens for the whole network.

    They are known to have been free on all addresses, until something was asked to listen on 127.0.0.1 only.
    """
    found: List[int] = []
    for port in channel.params["ports"]:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_ELSEWHERE, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    found.append(port)
    channel.result(exposed=found)


def nonce(channel: RequestChannel) -> None:
    """Handle the request `nonce`: listen on a port, and tell whoever connects to it first a secret.

    The manager that reads the secret has reached this very host.
    """
    secret = os.urandom(16).hex()
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(2)
    listener.setblocking(False)
    loop = channel.loop

    def close() -> None:
        timer.cancel()
        if listener.fileno() >= 0:
            loop.remove_reader(listener.fileno())
            listener.close()

    def accept() -> None:
        try:
            connection = listener.accept()[0]
        except OSError:
            return
        with connection:
            try:
                connection.sendall(secret.encode())
            except OSError:
                return
        close()

    loop.add_reader(listener.fileno(), accept)
    timer = loop.call_later(_NONCE_LIMIT, close)
    channel.result(port=listener.getsockname()[1], nonce=secret)
